"""Direct preference optimization (arXiv 2305.18290) and its relatives on pairs: ipo, simpo, orpo.

They need `score` of a family and nothing else. Both sides of a pair, policy and reference share their noise.
B pairs; a batch of them has 2 B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.families.base import Noise, TokenBatch
from minillm.methods.base import MicroLoss, Prepared, real_tokens
from minillm.methods.preference_losses import ipo_loss, orpo_loss, sigmoid_loss, simpo_loss
from minillm.methods.reference import WithReference
from minillm.methods.settings import PreferenceSettings
from minillm.models.transformer import LanguageModel

# Of what each loss compares (see `DirectPreference.loss`), chosen and rejected [B] each.
LOSSES: dict[str, Callable[[Tensor, Tensor, PreferenceSettings], Tensor]] = {
    "sigmoid": lambda chosen, rejected, flags: sigmoid_loss(chosen, rejected, flags.strength, flags.label_smoothing),
    "ipo": lambda chosen, rejected, flags: ipo_loss(chosen, rejected, flags.strength),
    "simpo": lambda chosen, rejected, flags: simpo_loss(
        chosen, rejected, flags.strength, flags.simpo_gamma, flags.label_smoothing
    ),
    "orpo": lambda chosen, rejected, flags: orpo_loss(chosen, rejected, flags.strength),
}
OF_A_MEAN_TOKEN = ("ipo", "simpo", "orpo")  # losses that divide log-probabilities by the answer's length


class Pairs(NamedTuple):
    """Chosen rows, then as many rejected rows, in one batch."""

    batch: TokenBatch  # 2 B rows
    noise: Noise
    reference: Tensor | None  # float32 [B, 2], chosen and rejected, where it was precomputed


def _joined(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return None if one is None or two is None else torch.cat((one, two))


def join_pairs(batch: Any, device: torch.device) -> TokenBatch:
    """A data.batches.PairBatch as one batch on the device: chosen rows, then rejected ones."""
    sides = (TokenBatch.from_numpy(side, device) for side in (batch.chosen, batch.rejected))
    return TokenBatch(*(_joined(chosen, rejected) for chosen, rejected in zip(*sides)))  # type: ignore[arg-type]


class DirectPreference(WithReference):
    name = "dpo"
    counts = "pairs"

    def _pairs(self, batch: Any, device: torch.device, step: int, first_slot: int) -> Pairs:
        chosen = TokenBatch.from_numpy(batch.chosen, device)
        return Pairs(join_pairs(batch, device), Noise.of(self.seed, chosen, step, first_slot).repeat(2), None)

    def prepare(self, model: LanguageModel, batch: Any, device: torch.device, step: int, first_slot: int) -> Prepared:
        known = self.known(batch, device, step, first_slot)
        pairs = self._pairs(batch, device, step, first_slot)._replace(reference=known)
        return Prepared(pairs, len(batch.sample_ids), real_tokens(pairs.batch))

    def ask_reference(self, batch: Any, device: torch.device, step: int, first_slot: int) -> Tensor:
        return self._of_reference(self._pairs(batch, device, step, first_slot))

    @torch.no_grad()
    def _of_reference(self, data: Pairs) -> Tensor:
        if data.reference is not None:
            return data.reference
        assert self.reference is not None
        return torch.stack(self.family.score(self.reference, data.batch, data.noise).total.chunk(2), dim=1)

    def loss(self, model: LanguageModel, data: Pairs) -> MicroLoss:
        """The loss compares a value of the chosen answer with that of the rejected one: the policy's log-probability,
        less the reference's where there is one, divided by the answer's tokens where the loss says so."""
        reference = self._of_reference(data) if self.flags.needs_reference else None
        score = self.family.score(model, data.batch, data.noise)
        values = score.total if reference is None else score.total - reference.t().flatten()
        if self.flags.loss in OF_A_MEAN_TOKEN:
            values = values / score.count.clamp(min=1)
        chosen, rejected = values.chunk(2)
        losses = LOSSES[self.flags.loss](chosen, rejected, self.flags)
        chosen, rejected = self.flags.strength * chosen.detach(), self.flags.strength * rejected.detach()
        chosen_logps, rejected_logps = score.total.detach().chunk(2)
        pairs = float(len(losses))
        metrics = {
            "loss": (losses.detach().sum(), pairs),
            "rewards/chosen": (chosen.sum(), pairs),
            "rewards/rejected": (rejected.sum(), pairs),
            "rewards/margins": ((chosen - rejected).sum(), pairs),
            "rewards/accuracies": ((chosen > rejected).float().sum(), pairs),
            "logps/chosen": (chosen_logps.sum(), pairs),
            "logps/rejected": (rejected_logps.sum(), pairs),
            # The likelihood of what is wanted: it may fall while the margin grows.
            "logps/chosen_per_token": ((chosen_logps / score.count.chunk(2)[0].clamp(min=1)).sum(), pairs),
        }
        return MicroLoss(losses.sum(), metrics)
