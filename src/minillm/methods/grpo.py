"""Group relative policy optimization (arXiv 2402.03300): a completion is worth what it is above its group's mean."""

from __future__ import annotations

import numpy as np

from minillm.families.base import Family
from minillm.methods.policy import Credit, PolicyMethod, Writer, Written, spread_over_units
from minillm.methods.settings import GroupSettings, PolicySettings
from minillm.models.transformer import LanguageModel

TINY_SPREAD = 1e-4  # nothing is divided by less


def group_advantages(
    rewards: np.ndarray, failed: np.ndarray, group: int, scale: str = "group"
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and the spread of each one's group, float32 [N] both; rewards float32 [N], failed bool [N], those of
    a group stand together.

    (r - mean) / (standard deviation + 1e-4) over the group (section 4.1.2), over the rollout ("batch"), or r - mean
    ("none": arXiv 2503.20783). The deviation is that of a sample, N - 1. What failed counts nowhere and is worth 0.
    """
    values = np.where(failed, np.nan, rewards.astype(np.float64)).reshape(-1, group)
    judged = (~np.isnan(values)).sum(1, keepdims=True)
    mean = np.nansum(values, 1, keepdims=True) / np.maximum(judged, 1)
    above = values - mean
    spread = np.sqrt(np.nansum(above**2, 1, keepdims=True) / np.maximum(judged - 1, 1))
    if scale == "group":
        above = above / (spread + TINY_SPREAD)
    elif scale == "batch":
        known = values[~np.isnan(values)]
        above = above / ((known.std(ddof=1) if len(known) > 1 else 0.0) + TINY_SPREAD)
    everywhere = np.broadcast_to(spread, values.shape).ravel()
    return np.nan_to_num(above).ravel().astype(np.float32), everywhere.astype(np.float32)


class GroupRelative(PolicyMethod):
    name = "grpo"

    def __init__(
        self, family: Family, writer: Writer, reference: LanguageModel | None, settings: PolicySettings, seed: int,
        group: GroupSettings,
    ) -> None:  # fmt: skip
        super().__init__(family, writer, reference, settings, seed, count=group.num_generations)
        self.scale = group.scale_rewards

    def credit(self, model: LanguageModel, written: Written, places: np.ndarray) -> Credit:
        advantages, spread = group_advantages(written.rewards, written.failed, self.count, self.scale)
        values = {"advantages": spread_over_units(advantages, self.units(written))}
        return Credit(values, {"zero_spread": spread < 1e-6})
