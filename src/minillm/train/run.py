"""The training commands: settings in (one object for each group of flags), a finished run folder out."""

from __future__ import annotations

from dataclasses import fields


def _train(stage: str, *groups: object) -> None:
    from minillm.train.job import build_job
    from minillm.train.loop import train
    from minillm.train.settings import Settings

    common = len(fields(Settings)) - 1
    train(build_job(stage, Settings(*groups[:common], method=groups[common:])))  # type: ignore[arg-type]


def pretrain(*groups: object) -> None:
    """Train on text."""
    _train("pretrain", *groups)


def sft(*groups: object) -> None:
    """Fine-tune on conversations; only the assistant's turns are trained."""
    _train("full_sft", *groups)


def dpo(*groups: object) -> None:
    """Learn from preference pairs."""
    _train("rlhf", *groups)
