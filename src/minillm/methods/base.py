"""What a method is to the loop: how many things a micro-batch counts, and its summed loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.models.transformer import LanguageModel

Metrics = dict[str, tuple[Tensor, float]]  # name -> (sum, count); divided only when printed


@dataclass(frozen=True)
class Prepared:
    """A micro-batch ready for the model, and what it counts (trained tokens, pairs): known before it runs."""

    data: Any
    count: int
    tokens: int  # tokens the model reads, without padding


def real_tokens(segments: Tensor | None, tokens: Tensor) -> int:
    """Tokens of a batch that are not padding."""
    return tokens.numel() if segments is None else int((segments >= 0).sum())


class MicroLoss(NamedTuple):
    loss: Tensor  # a sum; the loop divides by the count of the whole step
    metrics: Metrics


class Method:
    """Two functions: a batch made ready, and the loss of one."""

    name: str
    counts: str  # what `count` counts, for people: "tokens", "pairs"

    def frozen(self) -> dict[str, LanguageModel]:
        """Models it reads and never trains, such as a reference: kept beside the run's checkpoints."""
        return {}

    def prepare(self, model: LanguageModel, batch: Any, device: torch.device, step: int, first_slot: int) -> Prepared:
        """From the data's numpy batch, whose rows stand at first_slot, first_slot + 1, ... of the run's order. It keys
        the noise together with `step`; evaluation passes step -1."""
        raise NotImplementedError

    def loss(self, model: LanguageModel, data: Any) -> MicroLoss:
        """Summed loss and metrics of prepared data."""
        raise NotImplementedError
