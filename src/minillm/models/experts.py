"""Mixture of experts as in Qwen3-MoE: a router sends each token to its top-k feed-forward experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.models.config import ModelConfig
from minillm.models.layers import MLP
from minillm.models.linear import Linear, by_shape

ROWS = 32  # experts' rows are rounded up to a multiple of it,
MANY_ROWS = 128  # where an expert gets so many on average


class _Dispatch(torch.autograd.Function):
    """Each choice's token, sorted by expert. Autograd would add up the gradients row by row, on a CPU at a twentieth of
    memory's speed, and on a GPU in any order."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, source: Tensor, place: Tensor) -> Tensor:
        """flat [T, D]; source [R], each sorted row's token; place [T, K], each choice's sorted row. Returns [R, D]."""
        ctx.save_for_backward(place)
        return flat.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        total = grad.index_select(0, place[:, 0])
        for choice in range(1, place.shape[1]):
            total += grad.index_select(0, place[:, choice])
        return total, None, None


class _Combine(torch.autograd.Function):
    """Each token's sum of what its experts say, weighted. Rows that stand for no choice get no gradient."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, weights: Tensor, source: Tensor, place: Tensor) -> Tensor:
        """outputs [R, D], weights [T, K], source and place as in _Dispatch: [T, D]."""
        ctx.save_for_backward(outputs, weights, source, place)
        total = outputs.index_select(0, place[:, 0]) * weights[:, :1]
        for choice in range(1, place.shape[1]):
            total.addcmul_(outputs.index_select(0, place[:, choice]), weights[:, choice : choice + 1])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        outputs, weights, source, place = ctx.saved_tensors
        of_rows = weights.new_zeros(len(outputs)).index_copy_(0, place.flatten(), weights.flatten())
        output_grad = grad.index_select(0, source) * of_rows.unsqueeze(-1)
        said = [(outputs.index_select(0, place[:, choice]) * grad).sum(-1) for choice in range(place.shape[1])]
        return output_grad, torch.stack(said, dim=-1), None, None


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
        source, place, rows = self._sorted(chosen, padded=by_shape(flat))
        slices = _Dispatch.apply(flat, source, place).split(rows)
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, slices)])
        mixed = _Combine.apply(outputs, probabilities.to(outputs.dtype), source, place)
        return mixed.view_as(x), logits

    def _sorted(self, chosen: Tensor, *, padded: bool) -> tuple[Tensor, Tensor, list[int]]:
        """The (token, choice) pairs of chosen [T, K] sorted by expert, so that each expert reads one contiguous slice:
        the token of each row [R], the row of each pair [T, K], and how many rows each expert has.

        `padded`: oneDNN compiles its product anew for every number of rows, which costs a third of the product itself.
        So that there are few, slices are filled up with rows of the first token, whose results nobody reads.
        """
        pairs = chosen.flatten()
        order = pairs.argsort(stable=True)
        counts = F.one_hot(pairs, len(self.experts)).sum(0)  # not bincount: it cannot be compiled
        padded = padded and len(pairs) >= MANY_ROWS * len(self.experts)
        room = (counts + ROWS - 1) // ROWS * ROWS if padded else counts
        moved = room.cumsum(0) - room - counts.cumsum(0) + counts  # how far padding moves an expert's rows
        rows = torch.arange(len(pairs), device=pairs.device) + moved[pairs[order]]
        sizes = room.tolist()
        source = order.new_zeros(sum(sizes)).index_copy_(0, rows, order // self.top_k)
        place = torch.empty_like(order).index_copy_(0, order, rows)
        return source, place.view_as(chosen), sizes


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
