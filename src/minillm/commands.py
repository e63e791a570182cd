"""Commands of ours as processes of their own, printed as a person could type them. What runs several of them talks in
plain lines on stdout, in order with what they print."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

PROGRAM = (sys.executable, "-m", "minillm")
# What a training command must not find in its environment: what it starts from is on its command line.
HIDDEN_VARIABLES = ("MINILLM_PRETRAINED_PATH",)


def say(line: str) -> None:
    print(line, flush=True)


def display(path: Path) -> str:
    """The path as one would type it here: relative below the working directory, else absolute."""
    text = os.path.normpath(path)
    here = os.getcwd() + os.sep
    return text[len(here) :] if text.startswith(here) else text


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
