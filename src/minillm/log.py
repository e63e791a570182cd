"""What the program says to people: plain lines on stderr, progress with rate and time left, and the
one exception whose message is meant to be read by the user."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can fix. The message says what was wrong, where, and what to do."""


_rank = 0  # of this process among those that train together
_alike = False


def speak_as(rank: int) -> None:
    """Where several processes train together: 0 says everything, the others say only what is wrong, with their rank."""
    global _rank
    _rank = rank


@contextmanager
def alike() -> Iterator[None]:
    """Within it all processes find the same to warn of: one says it for all of them."""
    global _alike
    _alike, before = True, _alike
    try:
        yield
    finally:
        _alike = before


def info(message: str) -> None:
    if _rank == 0:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    if _rank == 0 or not _alike:
        _complain("warning", message)


def error(message: str) -> None:
    _complain("error", message)


def _complain(kind: str, message: str) -> None:
    print(f"{kind}{f' (rank {_rank})' if _rank else ''}: {message}", file=sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    """Seconds as people say them: 42s, 3m 05s, 2h 07m."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def format_rate(rate: float) -> str:
    """Items a second: 1,234/s, and with a digit more where they are slow, 0.4/s."""
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"


def format_size(size: int) -> str:
    """Bytes as people say them: 96.3 MB."""
    value, unit = float(size), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


class Progress:
    """Counts finished items and says, at most every `every` seconds, how fast it goes and how long is left."""

    def __init__(self, total: int | None, description: str, every: float = 10.0) -> None:
        self.total, self.description, self.every = total, description, every
        self.done = 0
        self.started = self.spoken = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.spoken >= self.every:
            self.spoken = now
            self._speak(now)

    def _speak(self, now: float) -> None:
        rate = self.done / max(now - self.started, 1e-9)
        line = f"{self.description}: {self.done:,}"
        if self.total:
            left = (self.total - self.done) / max(rate, 1e-9)
            line += f"/{self.total:,} ({format_rate(rate)}, {format_duration(left)} left)"
        else:
            line += f" ({format_rate(rate)})"
        info(line)


class _Bar(Progress):
    """The same on a terminal, as a bar."""

    def __init__(self, total: int | None, description: str) -> None:
        super().__init__(total, description)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.bar = RichProgress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task(description, total=total, rate="")

    def advance(self, count: int = 1) -> None:
        self.done += count
        rate = self.done / max(time.monotonic() - self.started, 1e-9)
        self.bar.update(self.task, advance=count, rate=format_rate(rate))


@contextmanager
def progress(total: int | None, description: str) -> Iterator[Progress]:
    """A bar on a terminal, otherwise a line every ten seconds."""
    if _rank or not sys.stderr.isatty():
        yield Progress(total, description)
        return
    bar = _Bar(total, description)
    with bar.bar:
        yield bar
