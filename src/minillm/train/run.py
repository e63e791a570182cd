"""The training commands: settings in, a finished run folder out."""

from __future__ import annotations

from minillm.families.settings import FamilySettings
from minillm.models.config import ModelSettings
from minillm.train.settings import (
    DataSettings,
    OptimSettings,
    PreferenceSettings,
    RunSettings,
    Settings,
    TrackSettings,
)


def _train(stage: str, *groups: object) -> None:
    from minillm.train.job import build_job
    from minillm.train.loop import train

    train(build_job(stage, Settings(*groups)))  # type: ignore[arg-type]


def pretrain(
    model: ModelSettings,
    data: DataSettings,
    run: RunSettings,
    optim: OptimSettings,
    track: TrackSettings,
    family: FamilySettings,
) -> None:
    """Train on text."""
    _train("pretrain", model, data, run, optim, track, family)


def sft(
    model: ModelSettings,
    data: DataSettings,
    run: RunSettings,
    optim: OptimSettings,
    track: TrackSettings,
    family: FamilySettings,
) -> None:
    """Fine-tune on conversations; only the assistant's turns are trained."""
    _train("full_sft", model, data, run, optim, track, family)


def dpo(
    model: ModelSettings,
    data: DataSettings,
    run: RunSettings,
    optim: OptimSettings,
    track: TrackSettings,
    family: FamilySettings,
    preference: PreferenceSettings,
) -> None:
    """Learn from preference pairs."""
    _train("rlhf", model, data, run, optim, track, family, preference)
