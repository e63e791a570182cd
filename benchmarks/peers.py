"""The models of others: how each is built with given sizes, and what its own training takes as the loss.

nanoGPT, LitGPT and MiniMind are used from a checkout that an environment variable names; nothing of them is here.
LitGPT also needs the package `lightning`.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

import torch
from common import CHECKOUTS, checkout
from torch import Tensor, nn

from minillm.log import UserError
from minillm.models.config import ModelConfig

SHARED_NAMES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
EXPERT_NAMES = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef",
)  # fmt: skip


def _values(sizes: ModelConfig, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(sizes, name) for name in names}


def use_checkout(side: str) -> None:
    """Let Python import from a peer's checkout. Raises UserError where no variable names it."""
    folder = checkout(side)
    if folder is None:
        raise UserError(f"{side}: {CHECKOUTS[side][0]} names no checkout")
    sys.path.insert(0, str(folder))


class Model(Protocol):
    """A model of others."""

    model: nn.Module

    def __init__(self, sizes: ModelConfig) -> None: ...

    def loss(self, run: Any, tokens: Tensor) -> Tensor:
        """Mean loss in nats of the tokens [B, L] but the first; `run` is the model, or what it was compiled to."""


class Transformers:
    """Qwen3ForCausalLM or Qwen3MoeForCausalLM with its own initialisation, and the loss of its `labels=`."""

    def __init__(self, sizes: ModelConfig) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

        common = {
            **_values(sizes, SHARED_NAMES),
            "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
            "use_cache": False,
        }
        config: Any = Qwen3Config(**common)
        if sizes.use_moe:
            config = Qwen3MoeConfig(**common, **_values(sizes, EXPERT_NAMES), output_router_logits=True)
        config._attn_implementation = "sdpa"
        self.model: nn.Module = (Qwen3MoeForCausalLM if sizes.use_moe else Qwen3ForCausalLM)(config)

    def loss(self, run: Any, tokens: Tensor) -> Tensor:
        return run(input_ids=tokens, labels=tokens).loss


class NanoGPT:
    """GPT-2's layers of the same width and depth, without biases as its training has them: fewer parameters."""

    def __init__(self, sizes: ModelConfig) -> None:
        use_checkout("nanogpt")
        from model import GPT, GPTConfig

        self.model: nn.Module = GPT(
            GPTConfig(
                block_size=sizes.max_position_embeddings, vocab_size=sizes.vocab_size, n_layer=sizes.num_hidden_layers,
                n_head=sizes.num_attention_heads, n_embd=sizes.hidden_size, dropout=0.0, bias=False,
            )
        )  # fmt: skip

    def loss(self, run: Any, tokens: Tensor) -> Tensor:
        targets = torch.roll(tokens, -1, dims=1)
        targets[:, -1] = -1  # what it ignores
        return run(tokens, targets)[1]


class LitGPT:
    """Its layers for Qwen3, and the chunked cross-entropy of its pretraining."""

    def __init__(self, sizes: ModelConfig) -> None:
        use_checkout("litgpt")
        from litgpt.model import GPT, Config
        from litgpt.utils import chunked_cross_entropy

        config = Config(
            block_size=sizes.max_position_embeddings, vocab_size=sizes.vocab_size, padded_vocab_size=sizes.vocab_size,
            n_layer=sizes.num_hidden_layers, n_head=sizes.num_attention_heads, n_embd=sizes.hidden_size,
            n_query_groups=sizes.num_key_value_heads, head_size=sizes.head_dim, rotary_percentage=1.0,
            rope_base=int(sizes.rope_theta), parallel_residual=False, bias=False, norm_class_name="RMSNorm",
            norm_eps=sizes.rms_norm_eps, norm_qk=True, mlp_class_name="LLaMAMLP",
            intermediate_size=sizes.intermediate_size,
        )  # fmt: skip
        model: Any = GPT(config)
        model.apply(model._init_weights)
        if sizes.tie_word_embeddings:
            model.lm_head.weight = model.transformer.wte.weight
        self.model: nn.Module = model
        self.cross_entropy = chunked_cross_entropy

    def loss(self, run: Any, tokens: Tensor) -> Tensor:
        return self.cross_entropy(run(tokens)[:, :-1], tokens[:, 1:])


class MiniMind:
    """Its model of the same sizes, and the loss of its `labels=` with that of its experts."""

    def __init__(self, sizes: ModelConfig) -> None:
        use_checkout("minimind")
        from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

        names = SHARED_NAMES + (EXPERT_NAMES if sizes.use_moe else ())
        config = MiniMindConfig(**_values(sizes, names), rope_theta=sizes.rope_theta, use_moe=sizes.use_moe)
        self.model: nn.Module = MiniMindForCausalLM(config)

    def loss(self, run: Any, tokens: Tensor) -> Tensor:
        answer = run(tokens, labels=tokens)
        return answer.loss + answer.aux_loss
