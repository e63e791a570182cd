"""Reasoning distillation: fine-tuning on traces `<think>...</think><answer>...</answer>` in which the four tags weigh
more than other tokens, since everything that is read out of an answer depends on them.

The weights enter the view's. The summed loss is divided by the sum of the tags' weights and 1 for every other trained
token, so it stays a weighted mean and the gradient's size does not depend on --tag_weight. What is reported is the
loss without these weights: it stays comparable with fine-tuning's, and a likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.families.base import Family, Noise, TokenBatch, View
from minillm.methods.base import Metrics, MicroLoss, Prepared, real_tokens
from minillm.methods.likelihood import Likelihood, reported, with_router_loss
from minillm.models.heads import weighted_cross_entropy
from minillm.models.transformer import LanguageModel


class Tagged(NamedTuple):
    """A view whose weights count the tags' weight, and what the sum of its losses is divided by."""

    view: View
    factor: Tensor  # float32 [B, L]: by how much each position weighs more
    total: float


class ReasoningTraces(Likelihood):
    name = "reasoning traces"

    def __init__(self, family: Family, seed: int, *, tags: Sequence[int], weight: float) -> None:
        """tags: token ids."""
        super().__init__(family, seed)
        self.tags, self.weight = tuple(tags), weight

    def prepare(self, model: LanguageModel, batch: Any, device: torch.device, step: int, first_slot: int) -> Prepared:
        rows = TokenBatch.from_numpy(batch, device)
        view = self.family.view(model, rows, Noise.of(self.seed, rows, step, first_slot))
        tags = torch.tensor(self.tags, device=device)
        factor = torch.where(torch.isin(view.targets, tags), self.weight, 1.0)
        # From the clean tokens: what a family hides differs from step to step, what it is divided by must not.
        trained = int((torch.isin(rows.tokens, tags) & rows.loss_mask).sum())
        count = view.count + (self.weight - 1.0) * trained
        data = Tagged(replace(view, weights=view.weights * factor), factor, count)
        return Prepared(data, count, real_tokens(rows))

    def loss(self, model: LanguageModel, data: Tagged) -> MicroLoss:  # type: ignore[override]
        view = data.view
        output = view.through(model)
        summed = weighted_cross_entropy(output.hidden, model.head_weight, view.targets, view.weights)
        loss, router = with_router_loss(summed.loss, output, model, data.total)
        metrics = reported(view, summed.losses / data.factor, summed.hits)
        return MicroLoss(loss, {**metrics, **self._of_tags(data, summed.hits), **router})

    def _of_tags(self, data: Tagged, hits: Tensor) -> Metrics:
        """How many of the tags are the most probable token in their place."""
        where = torch.isin(data.view.targets, torch.tensor(self.tags, device=hits.device)) & (data.view.weights != 0)
        return {"tag_accuracy": (hits[where].sum(), float(where.sum()))}
