"""Preference losses on sequence log-probabilities, one small function each, with the equation it comes from.

Every argument is float32 [B] and every loss returns [B]. log p is that of a whole answer, in nats; `mean` is log p
divided by the answer's tokens; `ratio` is log p of the policy minus log p of the reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_NATS = 1e-6  # a token; a bound may say that an answer is certain, and then its odds are infinite


def sigmoid_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7): -log sigmoid(beta (chosen - rejected)). With label smoothing e, the share
    of pairs that are the wrong way round (its section on noisy labels): (1 - e) of this and e of the opposite."""
    margin = beta * (chosen_ratio - rejected_ratio)
    return -(1.0 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036, equation 17): (chosen - rejected - 1 / (2 beta))^2. The ratios are those of a mean
    token, as its authors take them, so that long answers do not outweigh short ones."""
    return (chosen_ratio - rejected_ratio - 1.0 / (2.0 * beta)).square()


def simpo_loss(
    chosen_mean: Tensor, rejected_mean: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """SimPO (arXiv 2405.14734, equation 6): -log sigmoid(beta chosen - beta rejected - gamma), without a reference."""
    margin = beta * (chosen_mean - rejected_mean) - gamma
    return -(1.0 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def log_odds_ratio(chosen_mean: Tensor, rejected_mean: Tensor) -> Tensor:
    """log (odds(chosen) / odds(rejected)) with odds(p) = p / (1 - p) and p = exp(mean) (arXiv 2403.07691, equations
    4 and 5)."""

    def log_odds(mean: Tensor) -> Tensor:
        mean = mean.clamp(max=-LEAST_NATS)
        return mean - torch.log(-torch.expm1(mean))

    return log_odds(chosen_mean) - log_odds(rejected_mean)


def orpo_loss(chosen_mean: Tensor, rejected_mean: Tensor, beta: float) -> Tensor:
    """ORPO (arXiv 2403.07691, equations 6 and 7): the likelihood loss of the chosen answer, and beta (there lambda)
    times -log sigmoid of the log odds ratio."""
    return -chosen_mean - beta * F.logsigmoid(log_odds_ratio(chosen_mean, rejected_mean))


def kto_loss(
    ratio: Tensor, wanted: Tensor, baseline: Tensor, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """KTO (arXiv 2402.01306, section 4): weight (1 - sigmoid(beta (ratio - z))) for a wanted answer (bool
    [B]), weight (1 - sigmoid(beta (z - ratio))) for one that is not; `baseline` [] is z, an estimate of the KL
    divergence from the reference, and has no gradient."""
    gain = beta * (ratio - baseline)
    return torch.where(
        wanted, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
    )  # 1 - sigmoid(x) = sigmoid(-x)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, center: float) -> Tensor:
    """-log sigmoid(chosen - rejected) of two rewards (arXiv 2203.02155, equation 1), and center (chosen + rejected)^2,
    which keeps their mean near 0 (arXiv 2312.09244, equation 2)."""
    return -F.logsigmoid(chosen - rejected) + center * (chosen + rejected).square()
