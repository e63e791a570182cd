"""Reward models (arXiv 2203.02155, section 3.5): which of two answers people prefer, as one number an answer.

The value is read at the last token of the answer. Models that look both ways see the whole text, without noise, and
nothing behind that token. B pairs, 2 B rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minillm.families.base import TokenBatch
from minillm.methods.base import Method, MicroLoss, Prepared, real_tokens
from minillm.methods.dpo import join_pairs
from minillm.methods.preference_losses import bradley_terry_loss
from minillm.models.transformer import LanguageModel
from minillm.models.value import read


class RewardModelling(Method):
    name = "reward"
    counts = "pairs"

    def __init__(self, *, center: float) -> None:
        self.center = center

    def prepare(self, model: LanguageModel, batch: Any, device: torch.device, step: int, first_slot: int) -> Prepared:
        both = join_pairs(batch, device)
        return Prepared(both, len(both.tokens) // 2, real_tokens(both))

    def loss(self, model: LanguageModel, batch: TokenBatch) -> MicroLoss:
        output = read(model, batch.tokens, positions=batch.positions, segments=_until_answered(model, batch))
        chosen, rejected = model.score.of_sequence(output.hidden, batch.loss_mask).chunk(2)
        losses = bradley_terry_loss(chosen, rejected, self.center)
        loss, pairs = losses.sum(), float(len(losses))
        if output.router_loss is not None:
            loss = loss + model.config.router_aux_loss_coef * pairs * output.router_loss
        chosen, rejected = chosen.detach(), rejected.detach()
        metrics = {
            "loss": (losses.detach().sum(), pairs),
            "rewards/chosen": (chosen.sum(), pairs),
            "rewards/rejected": (rejected.sum(), pairs),
            "rewards/margins": ((chosen - rejected).sum(), pairs),
            "rewards/accuracies": ((chosen > rejected).float().sum(), pairs),
        }
        return MicroLoss(loss, metrics)


def _until_answered(model: LanguageModel, batch: TokenBatch) -> Tensor | None:
    """Segments int64 [B, L] in which what follows the answer is padding, so that a model that looks both ways reads
    what it will be asked about; None for one that does not."""
    if model.config.causal:
        return batch.segments
    later = batch.loss_mask.flip(1).cumsum(1).flip(1) == 0
    segments = torch.zeros_like(batch.tokens) if batch.segments is None else batch.segments
    return segments.masked_fill(later, -1)
