"""Mixture of experts as in Qwen3-MoE: a router sends each token to its top-k feed-forward experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.models.config import ModelConfig
from minillm.models.layers import MLP
from minillm.models.linear import Linear


class SparseMoe(nn.Module):
    """Routed experts; the chosen experts' probabilities are renormalised to sum to one (as configured)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.experts = nn.ModuleList(
            MLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        self.top_k = config.num_experts_per_tok
        self.to_one = config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, L, D] -> output [B, L, D] and router logits [B * L, experts]."""
        flat = x.reshape(-1, x.shape[-1])
        logits = self.gate(flat)
        probabilities, chosen = logits.float().softmax(-1).topk(self.top_k, dim=-1)
        if self.to_one:
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        # Sort the (token, choice) pairs by expert, so that each expert reads one contiguous slice.
        order = chosen.flatten().argsort(stable=True)
        counts = F.one_hot(chosen.flatten(), len(self.experts)).sum(0).tolist()  # not bincount: it cannot be compiled
        slices = flat[order // self.top_k].split(counts)
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, slices)])
        # Undo the sort by gathering (its gradient is a gather too): sums stay in a fixed order.
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        per_choice = outputs[back].view(len(flat), self.top_k, -1)
        mixed = (per_choice * probabilities.to(per_choice.dtype).unsqueeze(-1)).sum(1)
        return mixed.view_as(x), logits


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, valid: Tensor | None = None) -> Tensor:
    """The Switch Transformer's auxiliary loss over all layers (arXiv 2101.03961, equations 4-6):
    experts * sum_e share_of_choices(e) * mean_probability(e); its least value, at perfect balance, is top_k.

    Args:
        router_logits: per layer, [tokens, experts].
        valid: bool [tokens], False for padding.
    """
    logits = torch.cat([layer.float() for layer in router_logits])
    probabilities = logits.softmax(-1)
    experts = logits.shape[-1]
    choices = F.one_hot(probabilities.topk(top_k, dim=-1).indices, experts).sum(1).to(probabilities.dtype)
    if valid is not None:
        weight = valid.flatten().repeat(len(router_logits)).to(probabilities.dtype).unsqueeze(-1)
        rows = weight.sum().clamp(min=1.0)
        choices, probabilities = choices * weight, probabilities * weight
    else:
        rows = torch.tensor(float(len(logits)), device=logits.device)
    return experts * ((choices.sum(0) / rows) * (probabilities.sum(0) / rows)).sum()
