"""Running one stage: its command line, as a person could type it, and its process."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from minillm.commands import PROGRAM, display, run_command, say
from minillm.log import UserError, format_duration
from minillm.pipeline.datasets import StageData
from minillm.pipeline.environment import ARGUMENT_VARIABLES, COMMANDS, STAGES, Environment, flag_values

# Flag values of the default run. It is meant to finish within 20 minutes on two cores with the demo data.
DEFAULTS: dict[str, dict[str, str]] = {
    "pretrain": {
        "epochs": "2", "batch_size": "16", "max_seq_len": "256", "eval_samples": "64",
    },
    "full_sft": {
        "epochs": "1", "batch_size": "8", "max_seq_len": "256", "eval_samples": "64", "log_every": "5",
    },
    "rlhf": {
        "epochs": "1", "batch_size": "8", "max_seq_len": "256", "eval_samples": "64", "log_every": "5",
    },
}  # fmt: skip
# Other people's conversations are longer than the demo's.
USER_DATA_SEQUENCE = "512"
# Ten evaluations a stage on all held-out demo rows took an eighth of the default run.
DEMO_EVALUATION_ROWS = "24"
SMOKE = {
    "max_steps": "4", "batch_size": "2", "max_seq_len": "128",
    "eval_every": "2", "eval_samples": "8", "log_every": "1", "device": "cpu",
}  # fmt: skip


def stage_flags(environment: Environment, stage: str, *, data: StageData, smoke_test: bool) -> dict[str, str]:
    """The pipeline's own flags for a stage, without those that the user's arguments replace."""
    flags = dict(SMOKE if smoke_test else DEFAULTS[stage])
    if stage != "pretrain" and not data.is_demo:
        flags["max_seq_len"] = USER_DATA_SEQUENCE
    if not smoke_test and data.is_demo:
        flags["eval_samples"] = DEMO_EVALUATION_ROWS
    given = flag_values(environment.arguments[stage])
    if "config" in given:  # a recipe would lose against flags
        flags = {name: flags[name] for name in ("device",) if name in flags}
    return {name: value for name, value in flags.items() if name not in given}


def stage_command(
    environment: Environment, stage: str, *, data: StageData, pretrained: Path | None, smoke_test: bool
) -> list[str]:
    """The whole command of a stage. `pretrained`: the weights it starts from."""
    given = flag_values(environment.arguments[stage])
    command = [*PROGRAM, COMMANDS[stage], "--data_path", str(data.train)]
    if data.validation is not None and "validation_data" not in given:
        command += ["--validation_data", str(data.validation)]
    command += ["--hidden_size", str(environment.hidden_size)]
    command += ["--num_hidden_layers", str(environment.num_layers)]
    command += ["--use_moe"] * environment.use_moe
    if environment.architecture != "ar":
        command += ["--architecture", environment.architecture]
    if pretrained is not None and "pretrained_path" not in given:
        command += ["--pretrained_path", str(pretrained)]
    command += ["--out_dir", str(environment.out_dir)]
    if "tensorboard_dir" not in given:
        command += ["--tensorboard_dir", str(environment.tensorboard_dir)]
    if smoke_test and "no_wandb" not in given:
        command += ["--no_wandb"]
    for name, value in stage_flags(environment, stage, data=data, smoke_test=smoke_test).items():
        command += [f"--{name}", value]
    return [*command, *environment.arguments[stage]]


def run_stage(environment: Environment, stage: str, command: Sequence[str]) -> float:
    """Run a stage to its end and return the seconds it took.

    Raises SystemExit with the stage's exit code when that is not 0, UserError when its weights are missing.
    """
    started = time.monotonic()
    started_at = time.time()
    code = run_command(command)
    if code != 0:
        if code not in (130, 143):
            say(f"[stage] {COMMANDS[stage]} failed with exit code {code}; nothing after it was run")
        else:
            say(f"[stage] {COMMANDS[stage]} was stopped. To go on from there: {resume_hint(environment, stage)}")
        raise SystemExit(code)
    checkpoint = environment.checkpoint(stage)
    if not checkpoint.is_file() or checkpoint.stat().st_mtime < started_at - 2:
        raise UserError(f"[stage] {COMMANDS[stage]} ended without writing {display(checkpoint)}.")
    seconds = time.monotonic() - started
    say(f"[stage] {COMMANDS[stage]} finished in {format_duration(seconds)}: {display(checkpoint)}")
    return seconds


def resume_hint(environment: Environment, stage: str) -> str:
    """The command that goes on where `stage` was stopped: stages before it that are complete end at once."""
    again = STAGES[: STAGES.index(stage) + 1]
    skip = "" if stage == "pretrain" else " --skip-pretrain"
    words = []
    for name in again[1:] if skip else again:
        given = environment.arguments[name]
        arguments = shlex.join(given if "resume_from" in flag_values(given) else [*given, "--resume_from", "auto"])
        words.append(f"{ARGUMENT_VARIABLES[name]}={shlex.quote(arguments)}")
    return " ".join(words) + f" scripts/run.sh{skip} (with the same settings otherwise)"
