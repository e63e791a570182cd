"""Direct preference optimization (arXiv 2305.18290). It needs `score` and nothing else of a family."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.families.base import Family, Noise, TokenBatch
from minillm.methods.base import Method, MicroLoss, Prepared, real_tokens
from minillm.models.transformer import LanguageModel


class Pairs(NamedTuple):
    """Chosen rows, then as many rejected rows, in one batch; the noise of a pair is shared."""

    batch: TokenBatch
    noise: Noise


def _joined(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return None if one is None or two is None else torch.cat((one, two))


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigmoid(beta * ((pc - rc) - (pr - rr))), equation 7; all arguments are sequence log-probabilities [B].

    Returns:
        losses [B], and the implicit rewards beta * (policy - reference) of chosen and rejected [B] each.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


class DirectPreference(Method):
    name = "dpo"
    counts = "pairs"

    def __init__(self, family: Family, reference: LanguageModel, *, beta: float, seed: int) -> None:
        self.family, self.reference, self.beta, self.seed = family, reference, beta, seed

    def frozen(self) -> dict[str, LanguageModel]:
        return {"reference": self.reference}

    def prepare(self, model: LanguageModel, batch: Any, device: torch.device, step: int, first_slot: int) -> Prepared:
        chosen = TokenBatch.from_numpy(batch.chosen, device)
        rejected = TokenBatch.from_numpy(batch.rejected, device)
        both = TokenBatch(
            tokens=torch.cat((chosen.tokens, rejected.tokens)),
            loss_mask=torch.cat((chosen.loss_mask, rejected.loss_mask)),
            positions=_joined(chosen.positions, rejected.positions),
            segments=_joined(chosen.segments, rejected.segments),
            sample_ids=torch.cat((chosen.sample_ids, rejected.sample_ids)),
        )
        pairs = Pairs(both, Noise.of(self.seed, chosen, step, first_slot).repeat(2))
        return Prepared(pairs, len(chosen.tokens), real_tokens(both.segments, both.tokens))

    def loss(self, model: LanguageModel, data: Pairs) -> MicroLoss:
        with torch.no_grad():
            reference = self.family.score(self.reference, data.batch, data.noise).total
        policy = self.family.score(model, data.batch, data.noise).total
        policy_chosen, policy_rejected = policy.chunk(2)
        reference_chosen, reference_rejected = reference.chunk(2)
        losses, chosen, rejected = dpo_loss(
            policy_chosen, policy_rejected, reference_chosen, reference_rejected, self.beta
        )
        pairs = float(len(losses))
        right = (chosen > rejected).float().sum()
        metrics = {
            "loss": (losses.detach().sum(), pairs),
            "rewards/chosen": (chosen.sum(), pairs),
            "rewards/rejected": (rejected.sum(), pairs),
            "rewards/margins": ((chosen - rejected).sum(), pairs),
            "rewards/accuracies": (right, pairs),
            "logps/chosen": (policy_chosen.detach().sum(), pairs),
            "logps/rejected": (policy_rejected.detach().sum(), pairs),
        }
        return MicroLoss(losses.sum(), metrics)
