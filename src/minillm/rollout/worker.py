"""A process of its own for functions that may raise, hang or kill their process: the user's, and math-verify.

It reads one JSON request a line and writes one JSON reply a line: {"value": 1.0} or {"error": kind, "detail": text}.
Started as `python -m minillm.rollout.worker`; nothing heavy is imported here.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from typing import IO, Any, NamedTuple

MATH = "math"  # the function that is not the user's
START_SECONDS = 120.0  # a process may take so long to import what it needs


class Failure(NamedTuple):
    """Why there is no reward."""

    kind: str  # the same for what fails in the same way: the name of an exception, "time-out", ...
    detail: str


class Worker:
    """The parent's side. The process starts with the first call, and again after one that had to be ended."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.process: subprocess.Popen[str] | None = None
        self.replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.known: set[str] = set()

    def open(self, function: str) -> Failure | None:
        """Import a function (`module:name` or MATH), with time to do so; why it cannot be, if so."""
        if self.process is None:
            self._start()
        if function in self.known:
            return None
        reply = self._ask({"function": function}, START_SECONDS)
        if isinstance(reply, Failure):
            return reply
        self.known.add(function)
        return None

    def call(self, function: str, *arguments: str) -> float | Failure:
        """The function's value for (prompt, completion, answer); a call that takes longer than `timeout` seconds is
        ended together with its process."""
        failure = self.open(function)
        request = {"function": function, "arguments": arguments, "seconds": self.timeout}
        return failure or self._ask(request, self.timeout)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            process, self.process = self.process, None
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _start(self) -> None:
        # what this process can import, the other one can: packages that are not installed, tests, notebooks
        path = os.pathsep.join(each for each in sys.path if each)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minillm.rollout.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", bufsize=1,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        self.known, self.replies = set(), queue.SimpleQueue()
        assert self.process.stdout is not None
        threading.Thread(target=_pass_on, args=(self.process.stdout, self.replies), daemon=True).start()

    def _ask(self, request: dict[str, Any], seconds: float) -> float | Failure:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.replies.get(timeout=seconds)
        except (OSError, ValueError):
            line = None
        except queue.Empty:
            self.close()
            return Failure("time-out", f"no reward after {seconds:g} seconds")
        if line is None:
            process = self.process
            self.close()
            return Failure("ended", f"its process ended (exit code {process.returncode})")
        reply = json.loads(line)
        return Failure(reply["error"], reply["detail"]) if "error" in reply else float(reply["value"])


def _pass_on(lines: IO[str], replies: queue.SimpleQueue[str | None]) -> None:
    try:
        for line in lines:
            replies.put(line)
    except ValueError:  # closed while it was read
        pass
    replies.put(None)


def resolve(function: str) -> Callable[..., Any]:
    """MATH, or the `name` in `module`. Importing the module runs its code, as the user asked for by naming it."""
    if function == MATH:
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we measure the time ourselves
        agrees("", "\\boxed{x}", "x")  # what math-verify builds on first use takes a second or more
        return agrees
    module, _, name = function.partition(":")
    found = getattr(import_module(module), name)
    if not callable(found):
        raise TypeError(f"{function} is no function")
    return found  # type: ignore[no-any-return]


def agrees(prompt: str, completion: str, answer: str) -> float:
    """1 where math-verify finds the two answers to be the same expression, else 0."""
    from math_verify import parse, verify

    from minillm.text.answers import after_thinking, marked_answer

    wanted = marked_answer(answer) or answer
    marked = marked_answer(completion)
    # its own time limits use signals and swallow what they stop: the parent measures the time
    gold = parse(_as_formula(wanted), parsing_timeout=None)
    found = parse(after_thinking(completion) if marked is None else _as_formula(marked), parsing_timeout=None)
    return float(verify(gold, found, timeout_seconds=None))


def _as_formula(text: str) -> str:
    """The whole answer as one formula: of several, math-verify would take whichever is right."""
    return "\\boxed{" + text.replace("$", "") + "}"


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answer requests until the parent closes the pipe."""
    functions: dict[str, Callable[..., Any]] = {}
    for line in requests:
        request = json.loads(line)
        name = request["function"]
        try:
            if name not in functions:
                functions[name] = resolve(name)
            reply = {"value": 0.0}
            if "arguments" in request:
                _end_after(request["seconds"])
                value = functions[name](*request["arguments"])
                reply["value"] = _number(value)
        except BaseException as error:  # whatever the function does, SystemExit included, is its failure
            reply = {"error": type(error).__name__, "detail": str(error)[:500]}  # type: ignore[dict-item]
        _end_after(0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError(f"a reward is a number, not {value!r:.100}")
    number = float(value)
    if number - number != 0.0:  # infinite, or not a number at all
        raise ValueError(f"the reward is {number}")
    return number


def _end_after(seconds: float) -> None:
    """A second limit, in case the parent is gone and cannot end this process: the alarm ends it, even inside a
    library that never returns to Python."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds + 2.0 if seconds else 0.0)


def main() -> None:
    # the pipes belong to this protocol: what a function prints goes to stderr, what it reads is empty
    requests, replies = os.fdopen(os.dup(0), "r", encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    serve(requests, replies)


if __name__ == "__main__":
    main()
