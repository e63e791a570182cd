"""Builders of the methods that learn from rewards: a writer, rewards, a reference where one is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.checkpoint.files import extract_weights, read_tensors
from minillm.checkpoint.loader import load_weights
from minillm.methods.base import Method
from minillm.methods.grpo import GroupRelative
from minillm.methods.ppo import ProximalPolicy
from minillm.methods.settings import CriticSettings, GroupSettings, PolicySettings, TrackerSettings
from minillm.methods.spo import SingleStream
from minillm.models.device import choose_device
from minillm.models.value import add_value_head
from minillm.rollout.rewards import RewardFunctions
from minillm.rollout.settings import RolloutSettings, open_engine
from minillm.train.experience import Judged

if TYPE_CHECKING:
    from minillm.train.methods import Surroundings


def _common(around: Surroundings) -> dict[str, Any]:
    flags = around.settings.of(PolicySettings)
    writing = around.settings.of(RolloutSettings)
    engine = open_engine(writing, around.family, around.model, around.tokenizer, around.dtype)
    rewards = RewardFunctions(flags.reward, around.tokenizer, device=str(choose_device(around.settings.run.device)))
    return {
        "family": around.family,
        "writer": Judged(engine, rewards, around.tokenizer, flags, elsewhere=bool(writing.rollout_url)),
        "reference": around.reference() if flags.beta else None,
        "settings": flags,
        "seed": around.settings.run.seed,
    }


def build_ppo(around: Surroundings) -> Method:
    """The critic begins as the policy does, with a head of zeros, or as --critic_path says."""
    flags = around.settings.of(CriticSettings)
    critic = add_value_head(around.copy_of_model())
    if flags.critic_path and around.resumed is None:
        path = Path(flags.critic_path)
        load_weights(critic, extract_weights(read_tensors(path), path), str(path), strict=True)
    return ProximalPolicy(**_common(around), critic=critic, flags=flags)


def build_grpo(around: Surroundings) -> Method:
    """GRPO and its variants."""
    return GroupRelative(**_common(around), group=around.settings.of(GroupSettings))


def build_spo(around: Surroundings) -> Method:
    """Single-stream policy optimization."""
    return SingleStream(**_common(around), flags=around.settings.of(TrackerSettings))
