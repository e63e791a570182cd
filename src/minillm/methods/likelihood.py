"""Maximum likelihood: pretraining and supervised fine-tuning. They differ only in which tokens weigh."""

from __future__ import annotations

from typing import Any

import torch

from minillm.families.base import Family, Noise, TokenBatch, View
from minillm.methods.base import Method, Metrics, MicroLoss, Prepared, real_tokens
from minillm.models.heads import weighted_cross_entropy
from minillm.models.transformer import LanguageModel


class Likelihood(Method):
    name = "likelihood"
    counts = "tokens"

    def __init__(self, family: Family, seed: int) -> None:
        self.family, self.seed = family, seed

    def prepare(self, model: LanguageModel, batch: Any, device: torch.device, step: int, first_slot: int) -> Prepared:
        tokens = TokenBatch.from_numpy(batch, device)
        view = self.family.view(model, tokens, Noise.of(self.seed, tokens, step, first_slot))
        return Prepared(view, view.count, real_tokens(tokens.segments, tokens.tokens))

    def loss(self, model: LanguageModel, view: View) -> MicroLoss:
        output = view.through(model)
        summed = weighted_cross_entropy(output.hidden, model.head_weight, view.targets, view.weights)
        counted = view.weights != 0
        metrics: Metrics = {name: (torch.tensor(value), 1.0) for name, value in view.log.items()}
        reported, hits = summed.losses, summed.hits
        if view.extra is not None:
            after_end = counted & view.extra
            metrics["ignore_acc"] = (hits[after_end].sum(), float(after_end.sum()))
            counted = counted & ~view.extra
            reported = reported.masked_fill(view.extra, 0.0)
        metrics["loss"] = (reported.sum(), float(view.count))
        metrics["accuracy"] = (hits[counted].sum(), float(counted.sum()))
        loss = summed.loss
        if output.router_loss is not None:
            # A mean over this micro-batch's tokens: weighed by their number, so that steps average it.
            loss = loss + model.config.router_aux_loss_coef * view.count * output.router_loss
            metrics["router_loss"] = (output.router_loss.detach() * view.count, float(view.count))
        return MicroLoss(loss, metrics)
