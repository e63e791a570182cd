"""Maximum likelihood: pretraining and supervised fine-tuning. They differ only in which tokens weigh."""

from __future__ import annotations

from typing import Any

import torch

from minillm.families.base import Family, TokenBatch, View, noise_seeds
from minillm.methods.base import MicroLoss, Prepared, real_tokens
from minillm.models.heads import weighted_cross_entropy
from minillm.models.transformer import LanguageModel


class Likelihood:
    name = "likelihood"
    counts = "tokens"

    def __init__(self, family: Family, seed: int) -> None:
        self.family, self.seed = family, seed

    def prepare(self, batch: Any, device: torch.device, step: int) -> Prepared:
        tokens = TokenBatch.from_numpy(batch, device)
        view = self.family.view(tokens, noise_seeds(self.seed, tokens.sample_ids, step))
        return Prepared((tokens, view), view.count, real_tokens(tokens.segments, tokens.tokens))

    def loss(self, model: LanguageModel, data: tuple[TokenBatch, View]) -> MicroLoss:
        batch, view = data
        output = model(view.inputs, positions=batch.positions, segments=batch.segments)
        summed = weighted_cross_entropy(output.hidden, model.head_weight, view.targets, view.weights)
        metrics = {
            "loss": (summed.loss.detach(), float(view.count)),
            "accuracy": (summed.correct, float((view.weights != 0).sum())),
        }
        loss = summed.loss
        if output.router_loss is not None:
            # A mean over this micro-batch's tokens: weighed by their number, so that steps average it.
            loss = loss + model.config.router_aux_loss_coef * view.count * output.router_loss
            metrics["router_loss"] = (output.router_loss.detach() * view.count, float(view.count))
        return MicroLoss(loss, metrics)
