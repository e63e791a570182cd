"""What a method is to the loop: how many things a micro-batch counts, and its summed loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.families.base import TokenBatch
from minillm.models.transformer import LanguageModel

Metrics = dict[str, tuple[Tensor, float]]  # name -> (sum, count); divided only when printed


@dataclass(frozen=True)
class Prepared:
    """A micro-batch ready for the model, and what it counts (trained tokens, pairs): known before it runs."""

    data: Any
    count: float
    tokens: int  # tokens the model reads, without padding


def real_tokens(batch: TokenBatch) -> int:
    """Tokens of a batch that are not padding: without segments, those up to the last trained one of each row."""
    if batch.segments is not None:
        return int((batch.segments >= 0).sum())
    return int(batch.loss_mask.flip(1).cumsum(1).bool().sum())


class MicroLoss(NamedTuple):
    loss: Tensor  # a sum; the loop divides by the count of the whole step
    metrics: Metrics


class Method:
    """Two functions: a batch made ready, and the loss of one."""

    name: str
    counts: str  # what `count` counts, for people: "tokens", "pairs"
    better: str = "loss"  # the metric that says which checkpoint is best: the lowest loss, else the highest value

    measured_at_once: int = 0  # validation rows; 0: as many as in training

    def frozen(self) -> dict[str, LanguageModel]:
        """Models it reads and never trains, such as a reference: kept beside the run's checkpoints."""
        return {}

    def borrowed(self) -> dict[str, str]:
        """What it reads without a copy, such as a large teacher, and its SHA-256: a resumed run must find the same."""
        return {}

    def trained(self) -> dict[str, LanguageModel]:
        """Models that learn beside the model, such as a critic, under the names of their flat files: saved in full
        checkpoints."""
        return {}

    def learning_rates(self) -> dict[str, float]:
        """Peak learning rates of those models that do not have the model's."""
        return {}

    def state(self) -> dict[str, Any]:
        """What else a checkpoint must hold, in tensors and plain containers."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""

    def prepare(self, model: LanguageModel, batch: Any, device: torch.device, step: int, first_slot: int) -> Prepared:
        """From the data's numpy batch, whose rows stand at first_slot, first_slot + 1, ... of the run's order. It keys
        the noise together with `step`; evaluation passes step -1."""
        raise NotImplementedError

    def loss(self, model: LanguageModel, data: Any) -> MicroLoss:
        """Summed loss and metrics of prepared data."""
        raise NotImplementedError

    def before_measuring(self, model: LanguageModel) -> None:
        """An evaluation of this model begins, in all processes."""

    def measure(self, model: LanguageModel, batch: Any, device: torch.device, first_slot: int) -> Metrics:
        """Metrics of a batch of validation rows."""
        return self.loss(model, self.prepare(model, batch, device, -1, first_slot).data).metrics

    def samples(self) -> list[dict[str, Any]]:
        """Rows of a table for people to read, when there are new ones."""
        return []

    def alarm(self, means: dict[str, float]) -> str:
        """Why training must stop and what to change, judged by the means of the last steps; "" to go on."""
        return ""
