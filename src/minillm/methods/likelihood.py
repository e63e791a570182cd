"""Maximum likelihood: pretraining and supervised fine-tuning. They differ only in which tokens weigh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minillm.families.base import Family, Noise, TokenBatch, View
from minillm.methods.base import Method, Metrics, MicroLoss, Prepared, real_tokens
from minillm.models.heads import weighted_cross_entropy
from minillm.models.transformer import LanguageModel, Output


class Likelihood(Method):
    name = "likelihood"
    counts = "tokens"

    def __init__(self, family: Family, seed: int) -> None:
        self.family, self.seed = family, seed

    def prepare(self, model: LanguageModel, batch: Any, device: torch.device, step: int, first_slot: int) -> Prepared:
        tokens = TokenBatch.from_numpy(batch, device)
        view = self.family.view(model, tokens, Noise.of(self.seed, tokens, step, first_slot))
        return Prepared(view, view.count, real_tokens(tokens))

    def loss(self, model: LanguageModel, view: View) -> MicroLoss:
        output = view.through(model)
        summed = weighted_cross_entropy(output.hidden, model.head_weight, view.targets, view.weights)
        loss, router = with_router_loss(summed.loss, output, model, view.count)
        return MicroLoss(loss, {**reported(view, summed.losses, summed.hits), **router})


def reported(view: View, losses: Tensor, hits: Tensor) -> Metrics:
    """Mean loss and accuracy of a view from those of its positions [B, L]. What follows an end is counted apart: the
    loss stays a bound on real tokens."""
    counted = view.weights != 0
    metrics: Metrics = {name: (losses.new_tensor(value), 1.0) for name, value in view.log.items()}
    if view.extra is not None:
        after_end = counted & view.extra
        metrics["ignore_acc"] = ((hits & after_end).sum(), float(after_end.sum()))
        counted = counted & ~view.extra
        losses = losses.masked_fill(view.extra, 0.0)
    metrics["loss"] = (losses.sum(), float(view.count))
    metrics["accuracy"] = ((hits & counted).sum(), float(counted.sum()))
    return metrics


def with_router_loss(loss: Tensor, output: Output, model: LanguageModel, count: float) -> tuple[Tensor, Metrics]:
    """The summed loss of a micro-batch that counts `count`, with the balancing loss of experts where there are some."""
    if output.router_loss is None:
        return loss, {}
    # A mean over this micro-batch's tokens: weighed by their number, so that steps average it.
    balanced = loss + model.config.router_aux_loss_coef * count * output.router_loss
    return balanced, {"router_loss": (output.router_loss.detach() * count, float(count))}
