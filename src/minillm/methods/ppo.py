"""Proximal policy optimization (arXiv 1707.06347) with a critic and generalised advantages (1506.02438).

The state before a token is everything before it; where tokens have no order a completion is one step from the prompt,
and the critic values prompts. The reward comes with the last token. N completions, U units (methods/policy.py).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minillm.families.base import Family
from minillm.methods.base import Metrics
from minillm.methods.policy import Credit, Experience, PolicyMethod, Rows, Writer, Written
from minillm.methods.settings import CriticSettings, PolicySettings
from minillm.models.transformer import LanguageModel
from minillm.models.value import read


def generalised_advantages(
    rewards: np.ndarray, values: np.ndarray, units: np.ndarray, *, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns, float32 [N, U] both.

    delta_u = r_u + gamma V_{u+1} - V_u, A_u = delta_u + gamma lam A_{u+1}, return_u = A_u + V_u (equations 11 to 16).

    Args:
        rewards: float32 [N], that of the last unit; the ones before it have none.
        values: float32 [N, U], V of the state before each unit; after the last one it is 0.
        units: [N, U], not 0 where there is one.
    """
    there = units != 0
    advantages = np.zeros(values.shape, np.float64)
    later_value, later = np.zeros(len(rewards)), np.zeros(len(rewards))
    for unit in range(values.shape[1] - 1, -1, -1):
        last = there[:, unit] & (there[:, unit + 1 :].sum(1) == 0)
        delta = np.where(last, rewards, 0.0) + gamma * later_value - values[:, unit]
        later = np.where(there[:, unit], delta + gamma * lam * later, 0.0)
        later_value = np.where(there[:, unit], values[:, unit], 0.0)
        advantages[:, unit] = later
    return advantages.astype(np.float32), (advantages + np.where(there, values, 0.0)).astype(np.float32)


def whitened(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(values - mean) / (standard deviation + 1e-8) under the weights, 0 where the weight is 0: float32 [N, U]."""
    total = max(float(weights.sum()), 1.0)
    mean = float((values * weights).sum()) / total
    spread = (float(((values - mean) ** 2 * weights).sum()) / total) ** 0.5
    return np.where(weights != 0, (values - mean) / (spread + 1e-8), 0.0).astype(np.float32)


def value_terms(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error [B, U], or that of the value kept within `clip` of the old one, whichever is larger."""
    kept = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (kept - returns).square())


class ProximalPolicy(PolicyMethod):
    name = "ppo"

    def __init__(
        self, family: Family, writer: Writer, reference: LanguageModel | None, settings: PolicySettings, seed: int,
        critic: LanguageModel, flags: CriticSettings,
    ) -> None:  # fmt: skip
        super().__init__(family, writer, reference, settings, seed)
        self.critic, self.flags = critic, flags

    def trained(self) -> dict[str, LanguageModel]:
        return {"ppo_critic": self.critic}

    def learning_rates(self) -> dict[str, float]:
        return {"ppo_critic": self.flags.critic_learning_rate} if self.flags.critic_learning_rate else {}

    def values(self, rows: Rows) -> Tensor:
        """What the critic expects before each unit: float32 [B, U]."""
        batch = rows.batch
        if not self.family.ordered:  # the prompt is all that is known; a completion must not vote on its own baseline
            longest = int(rows.prompts.max())
            known = torch.arange(longest, device=rows.prompts.device) < rows.prompts[:, None]
            hidden = read(self.critic, batch.tokens[:, :longest], segments=known.int() - 1).hidden
            return self.critic.score.of_sequence(hidden, known)[:, None]
        hidden = read(self.critic, batch.tokens, segments=batch.segments).hidden
        return self.critic.score(hidden).gather(1, rows.places) * rows.mask

    def credit(self, model: LanguageModel, written: Written, places: np.ndarray) -> Credit:
        units = self.units(written)
        values = self.in_pieces(model, written, self.values)
        advantages, returns = generalised_advantages(
            written.rewards, values, units, gamma=self.flags.gamma, lam=self.flags.lam
        )
        judged = units * ~written.failed[:, None]
        returns = np.where(judged != 0, returns, values)
        kept = {"advantages": whitened(advantages, judged), "returns": returns, "values": values}
        explained = explained_variance(values, returns, judged)
        return Credit(kept, {"explained_variance": np.full(len(units), explained)})

    def beside(self, model: LanguageModel, data: Experience) -> tuple[Tensor | None, Metrics]:
        values = self.values(data.rows)
        terms = value_terms(values, data.values["values"], data.values["returns"], self.flags.cliprange_value)
        weights = data.rows.weights
        lost = (terms.detach() * weights).sum()
        return terms, {"value_loss": (lost, float(weights.sum()))}


def explained_variance(values: np.ndarray, returns: np.ndarray, weights: np.ndarray) -> float:
    """1 - Var(returns - values) / Var(returns) where the weight is not 0; NaN where the returns do not vary."""
    there = weights != 0
    if not there.any() or float(np.var(returns[there])) < 1e-12:
        return float("nan")
    return 1.0 - float(np.var(returns[there] - values[there]) / np.var(returns[there]))
