"""What a family is: three verbs about a backbone. Everything else in the product is written once over them.

B batch, L length, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from minillm.models.transformer import LanguageModel


class TokenBatch(NamedTuple):
    """Clean tokens on the device, as the data gave them."""

    tokens: Tensor  # int64 [B, L]
    loss_mask: Tensor  # bool [B, L]: tokens that are trained (or scored)
    positions: Tensor | None  # int64 [B, L]; None: 0, 1, 2, ...
    segments: Tensor | None  # int64 [B, L], -1 padding; None: one segment without padding
    sample_ids: Tensor  # int64 [B]

    @classmethod
    def from_numpy(cls, batch: Any, device: torch.device) -> TokenBatch:
        """From data.batches.Batch."""

        def move(array: Any) -> Tensor | None:
            return None if array is None else torch.from_numpy(array).to(device, non_blocking=True)

        return cls(*(move(getattr(batch, name)) for name in cls._fields))  # type: ignore[arg-type]


@dataclass(frozen=True)
class View:
    """What the model sees, what it must predict, and how much each prediction weighs."""

    inputs: Tensor  # [B, L] token ids, or [B, L, D] embeddings
    targets: Tensor  # int64 [B, L]
    weights: Tensor  # float32 [B, L]; a position of weight 0 costs nothing
    count: int  # tokens the loss is a mean over, known before the model runs


@dataclass(frozen=True)
class Score:
    """Log-probabilities in nats of each row's masked tokens."""

    total: Tensor  # float32 [B], differentiable
    count: Tensor  # int64 [B], tokens scored
    per_token: Tensor | None  # float32 [B, L], 0 where not scored; None where the family has no order


@dataclass(frozen=True)
class Sampling:
    """How to write: temperature 0 takes the most probable token."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0


class Family(Protocol):
    """The three verbs, and what may be said about the numbers they give."""

    name: str
    causal: bool
    ordered: bool  # tokens have an order, so ratios can be taken token by token
    likelihood: str  # "exact" | "upper_bound" | "none": what a mean loss of `view` is

    def view(self, batch: TokenBatch, seeds: Tensor) -> View:
        """Noise the clean tokens. `seeds` int64 [B] is all the randomness there is."""

    def score(self, model: LanguageModel, batch: TokenBatch, seeds: Tensor) -> Score:
        """Log-probability of the masked tokens given the others."""

    def generate(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """New tokens for each prompt, without the stop token; on_token(row, token) is told as they come."""


def noise_seeds(seed: int, sample_ids: Tensor, step: int) -> Tensor:
    """A seed for each sample that depends on (seed, sample id, step) only: int64 [B], not negative.

    Two rounds of a 64-bit mix (the constants of splitmix64), wrapping as int64 does.
    """
    key = (seed * 1_000_003 + step) * 2_654_435_769
    mixed = sample_ids + ((key + 2**63) % 2**64 - 2**63)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed ^ (mixed >> 31)) & ((1 << 62) - 1)
