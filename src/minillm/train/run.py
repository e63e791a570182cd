"""The training commands: settings in (one object for each group of flags), a finished run folder out."""

from __future__ import annotations

from dataclasses import fields, replace


def _train(stage: str, *groups: object) -> None:
    from minillm import log, processes
    from minillm.train import health
    from minillm.train.job import build_job
    from minillm.train.loop import train
    from minillm.train.reference import precompute_reference
    from minillm.train.settings import Settings
    from minillm.train.teacher_cache import cache_teacher

    common = len(fields(Settings)) - 1
    settings = Settings(*groups[:common], method=groups[common:])  # type: ignore[arg-type, misc]
    processes.start(settings.run.device, settings.run.timeout)
    with health.watched(settings.run.timeout):
        run = replace(settings.run, resume_from=health.after_restart(settings.run.resume_from))
        with log.alike():
            job = build_job(stage, replace(settings, run=run))
        processes.main_first(lambda: precompute_reference(job))
        processes.main_first(lambda: cache_teacher(job))
        train(job)
    processes.stop()


def pretrain(*groups: object) -> None:
    """Train on text."""
    _train("pretrain", *groups)


def sft(*groups: object) -> None:
    """Fine-tune on conversations; only the assistant's turns are trained."""
    _train("full_sft", *groups)


def lora(*groups: object) -> None:
    """Fine-tune on conversations by an adapter beside frozen weights."""
    _train("lora", *groups)


def dpo(*groups: object) -> None:
    """Learn from preference pairs."""
    _train("rlhf", *groups)


def reward(*groups: object) -> None:
    """Train a reward model from preference pairs."""
    _train("reward", *groups)


def distill(*groups: object) -> None:
    """Learn from a teacher's distributions."""
    _train("full_dist", *groups)


def reason(*groups: object) -> None:
    """Learn from reasoning traces."""
    _train("reason", *groups)


def ppo(*groups: object) -> None:
    """Learn from rewards with a critic."""
    _train("ppo_actor", *groups)


def grpo(*groups: object) -> None:
    """Learn from rewards of groups of answers."""
    _train("grpo", *groups)


def spo(*groups: object) -> None:
    """Learn from rewards, one answer a prompt."""
    _train("spo", *groups)
