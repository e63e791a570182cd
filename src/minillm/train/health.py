"""Is every process of a run alive, and does it move? A stuck or dead one ends the run with its name and its last step.

Each process leaves a post in the store of the run about once a second, from a thread of its own: a number that counts
up, its last finished step, what it is doing. Rank 0 reads all posts, everyone reads rank 0's. Clocks of different
machines are never compared: what counts is how long ago a reader saw a post change.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minillm import log, processes
from minillm.config import UsageError
from minillm.log import UserError

GONE_STATUS = 75  # of a process that ends because another is stuck or dead (EX_TEMPFAIL: try again)
GRACE_S = 10.0  # for a failed process to end by itself
MOST_NAMED = 4
PACKAGE = str(Path(__file__).resolve().parent.parent) + os.sep


@dataclass
class Post:
    """What a process says of itself."""

    rank: int
    host: str = "unknown host"
    pid: int = 0
    launcher: int = 0  # the process that started it: torchrun
    beat: int = 0  # counts up as long as the process lives
    moves: int = 0  # counts up as long as it gets on with its work
    step: int = 0
    phase: str = "starting"
    limited: bool = False  # is it in a phase whose length has a limit?
    failing: bool = False  # it was told to end, or cannot reach another process
    ended: bool = False
    place: str = ""  # where its main thread is, once it has not moved for a while
    waits: bool = False  # it is there because it waits for other processes

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


@dataclass
class Seen:
    """The newest post of a process, and when (time.monotonic) it last was another than before."""

    post: Post
    beaten: float
    moved: float

    def take(self, post: Post, now: float) -> None:
        if post.beat != self.post.beat:
            self.beaten = now
        if (post.moves, post.phase) != (self.post.moves, self.post.phase):
            self.moved = now
        self.post = post


def silent(seen: Sequence[Seen], now: float, limit: float) -> list[Seen]:
    """Those that did not answer for `limit` seconds and have not ended in good order."""
    return [one for one in seen if not one.post.ended and now - one.beaten > limit]


def idle(seen: Sequence[Seen], now: float, limit: float) -> list[Seen]:
    """Those to blame where nothing moved for `limit` seconds. All processes take the same steps, so most of them only
    wait: to blame are those that are behind, of these the ones that wait for nobody, and all where it cannot be told.
    While one is in a phase without a limit, the others may wait for it, and their time begins anew."""
    if any(not one.post.limited and not one.post.ended for one in seen):
        for one in seen:
            one.moved = now
        return []
    here = [one for one in seen if not one.post.ended]
    late = [one for one in here if now - one.moved > limit]
    if late and all(now - one.moved > limit / 2 for one in here):  # nobody moves
        behind = min(one.post.step for one in here)
        late = [one for one in here if one.post.step == behind]
        late = [one for one in late if not one.post.waits] or late
    return late


def sentence(found: Sequence[Seen], now: float, *, silence: bool) -> str:
    """Who is stuck or dead, since when, and after which step."""
    parts = []
    for one in found[:MOST_NAMED]:
        seconds = now - (one.beaten if silence else one.moved)
        what = "has not answered" if silence else "has not moved"
        why = " (dead, stopped, or cut off from the others)" if silence else f": it is at {one.post.place or 'unknown'}"
        parts.append(
            f"{one.post} {what} for {seconds:.0f} s{why}, {one.post.phase}; last finished step {one.post.step}"
        )
    if len(found) > MOST_NAMED:
        parts.append(f"and so {len(found) - MOST_NAMED} more")
    return "; ".join(parts) + ". The run ends; go on with --resume_from auto"


class Watch:
    """This process's posts, and its look at the others'."""

    def __init__(self, meeting: processes.Meeting, rank: int, size: int, timeout: float) -> None:
        from torch.distributed import PrefixStore

        self.meeting, self.timeout = meeting, timeout
        connection = meeting.store.clone()  # type: ignore[attr-defined]  # of its own: another may be blocked
        self.store = PrefixStore("health", connection)
        self.interval = min(1.0, timeout / 10)
        self.soon = min(10.0, timeout / 3)  # enough to tell the dead once something went wrong
        self.own = Post(rank, socket.gethostname(), os.getpid(), os.getppid())
        now = time.monotonic()
        self.seen = [Seen(Post(other), now, now) for other in (range(size) if rank == 0 else (0,))]
        self.known: set[int] = set()
        self.said = False  # has this process given its reason?
        self.looked = self.moved_at = now
        self.main = threading.get_ident()
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, name="health", daemon=True)

    def _run(self) -> None:
        while not self.stopping.wait(self.interval):
            try:
                self._look(time.monotonic())
            except RuntimeError:  # the connection is broken: whoever holds the store, torchrun of rank 0, has ended
                if not self.stopping.wait(self.soon):  # unless it ended because the run did
                    at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                    text = f"{self.own} lost the launcher of rank 0 at {at}; last finished step {self.own.step}. "
                    self._end(text + "The run ends; go on with --resume_from auto")

    def post(self) -> None:
        """A sign of life."""
        self.own.beat += 1
        self.store.set(f"post/{self.own.rank}", json.dumps(asdict(self.own)))

    def _look(self, now: float) -> None:
        """Post, read, judge."""
        own = self.own
        if now - self.moved_at > self.timeout / 2:
            own.place, own.waits = whereabouts(self.main)
        self.post()
        if self.store.check(["verdict"]):
            self._obey(json.loads(self.store.get("verdict")))
        for one in self.seen:
            if one.post.rank not in self.known and self.store.check([f"post/{one.post.rank}"]):
                self.known.add(one.post.rank)
        answered = [one for one in self.seen if one.post.rank in self.known]
        for one, post in zip(answered, self.store.multi_get([f"post/{one.post.rank}" for one in answered])):
            one.take(Post(**json.loads(post)), now)
        if now - self.looked > 5 + 5 * self.interval:  # this process itself was stopped: it knows nothing
            for one in self.seen:
                one.beaten = one.moved = now
        self.looked = now
        hurried = own.failing or any(one.post.failing for one in self.seen)
        dead = silent(self.seen, now, min(self.timeout, self.soon) if hurried else self.timeout)
        stuck = idle(self.seen, now, self.timeout) if own.rank == 0 and not dead else []
        if (dead or stuck) and self._claim(text := sentence(dead or stuck, now, silence=bool(dead)), GONE_STATUS):
            for one in dead:
                self._kill(one.post)
            self._end(text)

    def _claim(self, text: str, status: int) -> bool:
        """Is this process the first to say why the run ends? Only that one speaks."""
        verdict = {"text": text, "status": status, "rank": self.own.rank}
        first = json.loads(self.store.compare_set("verdict", "", json.dumps(verdict)))
        leave_word(first["text"])
        return bool(first == verdict)

    def _obey(self, verdict: dict[str, Any]) -> None:
        if verdict["rank"] != self.own.rank:
            leave_word(verdict["text"])
            os._exit(verdict["status"])

    def _kill(self, post: Post) -> None:
        """End a sibling that does not answer: a stopped process does not obey torchrun, which would wait for it."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{post.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            if post.host == self.own.host and int(status[1]) == post.launcher == os.getppid():
                os.kill(post.pid, signal.SIGKILL)

    def _end(self, text: str, status: int = GONE_STATUS) -> None:
        if not self.said:
            print(f"error: {text}", file=sys.stderr, flush=True)
        os._exit(status)

    def failed(self, error: Exception) -> int:
        """Say once for all processes why this one fails; returns the exit status. What fails because another process
        died is not worth a word: that one's name is."""
        if isinstance(error, UserError):
            text, status = str(error), 2 if isinstance(error, UsageError) else 1
        else:
            text, status = f"{type(error).__name__}: {error}", 1
            self.own.failing = True
            self.thread.join(1.5 * self.soon + 2 * self.interval)  # it ends the process if it finds who is to blame
        text = f"{self.own}{f', after step {self.own.step}' if self.own.step else ''}: {text}"
        ending = threading.Timer(GRACE_S, self._end, (text, status))  # leaving the others may take forever
        ending.daemon = True
        ending.start()
        try:
            first = self._claim(text, status)
        except RuntimeError:
            first = True
        if first:
            if not isinstance(error, UserError):
                traceback.print_exception(type(error), error, error.__traceback__)
            print(f"error: {text}", file=sys.stderr, flush=True)
        self.said = True
        return status

    def close(self) -> None:
        """This process is done, and others need not wait for a sign of it."""
        self.stopping.set()
        self.thread.join(GRACE_S)
        self.own.ended = True
        with contextlib.suppress(RuntimeError):  # the store may have ended before
            self.post()


def whereabouts(thread: int) -> tuple[str, bool]:
    """Where a thread of this process is (the innermost line of ours, else of all), and whether it waits for others."""
    ours, innermost, waits = "", "", False
    frame = sys._current_frames().get(thread)
    while frame is not None:
        name = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}distributed{os.sep}" in name or name == processes.__file__:
            waits = True
        place = f"{name.removeprefix(PACKAGE)}:{frame.f_lineno} in {frame.f_code.co_name}"
        if name.startswith(PACKAGE) and name not in (__file__, processes.__file__):
            ours = ours or place
        innermost = innermost or place
        frame = frame.f_back
    return ours or innermost, waits


def leave_word(text: str) -> None:
    """Put the reason of the end where torchrun looks for it when it says who failed."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):
            word = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
            Path(path).write_text(json.dumps(word), encoding="utf-8")


def leave(status: int) -> None:
    """End this process among others: in an ordinary end the threads of their group abort it."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join(GRACE_S)  # a checkpoint that is being written
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


_watch: Watch | None = None  # of this process, while it trains with others


@contextlib.contextmanager
def watched(timeout: float) -> Iterator[None]:
    """What runs inside is watched, and an error is said once for all processes and ends them. Nothing of this happens
    in a process that is alone."""
    global _watch
    meeting = processes.meeting()
    if meeting is None:
        yield
        return
    _watch = watch = Watch(meeting, processes.rank(), processes.size(), timeout)
    watch.post()
    watch.thread.start()
    try:
        yield
        watch.close()
    except Exception as error:
        leave(watch.failed(error))
    except SystemExit as end:  # a signal, or another process's failure, which that one explains
        watch.close()
        leave(end.code if isinstance(end.code, int) else 1)
    finally:
        _watch = None


def begin(step: int) -> None:
    """Training goes on after this step."""
    if _watch is not None:
        _watch.own.step = step


def finished(step: int) -> None:
    """A step is done. From the first one on, the next is expected within the time limit."""
    if _watch is not None:
        if _watch.own.rank == 0 and not _watch.own.limited:
            _watch.meeting.mark_training()
        _watch.own.step, _watch.own.phase, _watch.own.limited = step, "training", True
        moved()


def after_restart(resume_from: str) -> str:
    """What --resume_from means: where torchrun started the processes anew (--max-restarts), the newest checkpoint of
    the run that they trained before, unless the user names one."""
    meeting = processes.meeting()
    if resume_from or meeting is None or not meeting.restarted:
        return resume_from
    log.info("[run] started anew by torchrun: going on with the newest checkpoint")
    return "auto"


def moved() -> None:
    """A sign of life within something long, such as an evaluation."""
    if _watch is not None:
        _watch.own.moves += 1
        _watch.own.place, _watch.moved_at = "", time.monotonic()


@contextlib.contextmanager
def unlimited(phase: str) -> Iterator[None]:
    """A phase that takes as long as it takes, such as writing a checkpoint: only a process that died ends it."""
    if _watch is None:
        yield
        return
    own = _watch.own
    before = own.phase, own.limited
    own.phase, own.limited = phase, False
    try:
        yield
    finally:
        own.phase, own.limited = before
        moved()


def told_to_end() -> None:
    """A signal came: torchrun sends one when a process died, so that a silent one is soon taken for dead."""
    if _watch is not None:
        _watch.own.failing = True
