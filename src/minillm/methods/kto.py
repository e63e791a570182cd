"""Kahneman-Tversky optimization (arXiv 2402.01306): answers that are labelled wanted or not, without pairs.

The reward of an answer is judged against a baseline, the policy's KL divergence from the reference. It is estimated as
the paper does, from prompts with answers to other prompts: the mean of their log-ratios over the step, at least 0.
All of a step's batches are prepared before the first loss is taken, so it does not depend on how the step is cut; an
evaluation uses the mean of its rows so far. B rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm import processes
from minillm.families.base import Family, Noise, TokenBatch
from minillm.methods.base import MicroLoss, Prepared, real_tokens
from minillm.methods.preference_losses import kto_loss
from minillm.methods.reference import WithReference
from minillm.methods.settings import PreferenceSettings
from minillm.models.transformer import LanguageModel


class Baseline:
    """Log-ratios of mismatched answers, added up over a step: of all processes, where they are `shared`."""

    def __init__(self, *, shared: bool = False) -> None:
        self.total: Tensor | float = 0.0
        self.count, self.shared = 0, shared

    def add(self, ratios: Tensor) -> None:
        self.total, self.count = self.total + ratios.sum(), self.count + len(ratios)

    def value(self) -> Tensor:
        """The estimate of the divergence in nats: []."""
        assert isinstance(self.total, Tensor)
        if self.shared and processes.size() > 1:  # everyone has added what it has, and asks now for the first time
            both = processes.summed(torch.stack([self.total, self.total.new_tensor(float(self.count))]))
            self.total, self.count, self.shared = both[0], int(both[1]), False
        return (self.total / self.count).clamp(min=0.0)


class Labelled(NamedTuple):
    batch: TokenBatch
    noise: Noise
    wanted: Tensor  # bool [B]
    desirable: int  # how many of them
    baseline: Baseline
    reference: Tensor | None  # float32 [B, 2], answer and mismatched answer, where it was precomputed


class KahnemanTversky(WithReference):
    name = "kto"
    counts = "answers"

    def __init__(
        self, family: Family, reference: LanguageModel | None, flags: PreferenceSettings, *, seed: int
    ) -> None:
        super().__init__(family, reference, flags, seed=seed)
        self._baseline, self._step, self._slot = Baseline(), -1, -1

    def prepare(self, model: LanguageModel, batch: Any, device: torch.device, step: int, first_slot: int) -> Prepared:
        if step != self._step or first_slot <= self._slot:  # within a step or an evaluation, slots only rise
            self._baseline = Baseline(shared=step >= 0)
        self._step, self._slot = step, first_slot
        answers, others = (TokenBatch.from_numpy(each, device) for each in (batch.answers, batch.mismatched))
        noise = Noise.of(self.seed, answers, step, first_slot)
        known = self.known(batch, device, step, first_slot)
        with torch.no_grad():
            reference = known[:, 1] if known is not None else self._of_reference(others, noise)
            self._baseline.add(self.family.score(model, others, noise).total - reference)
        wanted = torch.from_numpy(batch.labels).to(device)
        data = Labelled(answers, noise, wanted, int(batch.labels.sum()), self._baseline, known)
        tokens = sum(real_tokens(each) for each in (answers, others))
        return Prepared(data, len(batch.sample_ids), tokens)

    @torch.no_grad()
    def _of_reference(self, batch: TokenBatch, noise: Noise) -> Tensor:
        assert self.reference is not None
        return self.family.score(self.reference, batch, noise).total

    def ask_reference(self, batch: Any, device: torch.device, step: int, first_slot: int) -> Tensor:
        answers, others = (TokenBatch.from_numpy(each, device) for each in (batch.answers, batch.mismatched))
        noise = Noise.of(self.seed, answers, step, first_slot)
        return torch.stack((self._of_reference(answers, noise), self._of_reference(others, noise)), dim=1)

    def loss(self, model: LanguageModel, data: Labelled) -> MicroLoss:
        flags, wanted = self.flags, data.wanted
        reference = self._of_reference(data.batch, data.noise) if data.reference is None else data.reference[:, 0]
        score = self.family.score(model, data.batch, data.noise)
        ratio, baseline = score.total - reference, data.baseline.value()
        losses = kto_loss(ratio, wanted, baseline, flags.strength, flags.desirable_weight, flags.undesirable_weight)
        rewards, logps = flags.strength * ratio.detach(), score.total.detach()
        gains = torch.where(wanted, ratio.detach() - baseline, baseline - ratio.detach())
        rows, chosen = float(len(losses)), float(data.desirable)

        def of(mask: Tensor, values: Tensor) -> Tensor:
            return torch.where(mask, values, 0.0).sum()

        metrics = {
            "loss": (losses.detach().sum(), rows),
            "kl": (baseline * rows, rows),
            "rewards/chosen": (of(wanted, rewards), chosen),
            "rewards/rejected": (of(~wanted, rewards), rows - chosen),
            "rewards/accuracies": ((gains > 0).float().sum(), rows),  # on their side of the baseline
            "logps/chosen": (of(wanted, logps), chosen),
            "logps/rejected": (of(~wanted, logps), rows - chosen),
            "logps/chosen_per_token": (of(wanted, logps / score.count.clamp(min=1)), chosen),
        }
        return MicroLoss(losses.sum(), metrics)
