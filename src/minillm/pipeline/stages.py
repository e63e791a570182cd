"""Running one stage: its command line, as a person could type it, and its process."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from minillm.log import UserError, format_duration
from minillm.pipeline.datasets import StageData
from minillm.pipeline.environment import ARGUMENT_VARIABLES, COMMANDS, STAGES, Environment, flag_values
from minillm.pipeline.output import display, say

PROGRAM = (sys.executable, "-m", "minillm")

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
# Names a stage must not find in its environment: what it starts from is on its command line.
HIDDEN_VARIABLES = ("MINILLM_PRETRAINED_PATH",)


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


def run_command(command: Sequence[str]) -> int:
    """Print and run a command, hand on signals meant to stop it, return its exit code as a shell counts it.

    The child gets a session of its own: else Ctrl-C would reach it twice, from the terminal and from here.
    """
    say("$ " + printable(command))
    variables = {name: value for name, value in os.environ.items() if name not in HIDDEN_VARIABLES}
    child: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if child is not None:
            child.send_signal(number)

    def suspend(number: int, frame: FrameType | None) -> None:
        if child is not None:
            os.killpg(child.pid, signal.SIGSTOP)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # returns when the user continues us
        signal.signal(signal.SIGTSTP, suspend)
        if child is not None:
            os.killpg(child.pid, signal.SIGCONT)

    handlers: dict[signal.Signals, Any] = {
        signal.SIGINT: forward, signal.SIGTERM: forward, signal.SIGHUP: forward, signal.SIGTSTP: suspend
    }  # fmt: skip
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
        del handlers[signal.SIGHUP]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        child = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, env=variables, start_new_session=True,
            preexec_fn=_stop_with_parent(),  # noqa: PLW1509
        )  # fmt: skip
        for number in received:  # arrived while the process was being made
            child.send_signal(number)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = code if code >= 0 else 128 - code
    return code or (128 + received[0] if received else 0)


def _stop_with_parent() -> Callable[[], None] | None:
    """On Linux: the child is asked to stop (SIGTERM) when this process disappears, even by SIGKILL."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    library = ctypes.CDLL(None)
    set_parent_death_signal = 1

    def ask_kernel() -> None:
        library.prctl(set_parent_death_signal, int(signal.SIGTERM))

    return ask_kernel


def printable(command: Sequence[str]) -> str:
    """The command as it can be typed in the working directory."""
    return shlex.join(display(Path(word)) if word.startswith("/") else word for word in command)
