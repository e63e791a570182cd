"""A stuck or dead process ends the run within the time limit, and is named with its last step."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from nursery import Nursery

from minillm import processes
from minillm.rendezvous import Meeting
from minillm.train.health import GONE_STATUS, Post, Seen, after_restart, idle, sentence, silent
from minillm.train.loop import Interrupt

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 10.0
NOW = 100.0


class End(NamedTuple):
    statuses: list[int]
    stderr: str
    seconds: float


@pytest.fixture(scope="module")
def ends(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    """What became of the pairs of processes in crashing.py, which runs once for all workers: it mostly waits."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    found = folder / "ends.json"
    with (folder / "ends.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            done = subprocess.run(
                [nursery.python, ROOT / "tests/crashing.py"], stdout=subprocess.PIPE, text=True, check=True,
                env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}, timeout=120,
            )  # fmt: skip
            found.write_text(done.stdout)
    return {case: End(*end) for case, end in json.loads(found.read_text()).items()}


@pytest.mark.parametrize("case, rank", [("stopped", 1), ("stopped 0", 0), ("killed", 1), ("killed 0", 0)])
def test_a_stopped_or_killed_process_is_named_with_its_last_step(ends: dict[str, End], case: str, rank: int) -> None:
    statuses, stderr, _ = ends[case]
    found = re.search(rf"rank {rank} \(\S+, pid [1-9]\d*\) has not answered .* last finished step (\d+)", stderr)
    assert found and 5 <= int(found[1]) <= 20  # as of its last sign of life
    assert "--resume_from auto" in stderr
    assert statuses[1 - rank] == GONE_STATUS
    assert statuses[rank] == -9  # a stopped one is ended, too: torchrun would wait for it


def test_a_process_that_hangs_is_told_from_those_that_wait_for_it(ends: dict[str, End]) -> None:
    statuses, stderr, _ = ends["hanging"]
    assert statuses == [GONE_STATUS, GONE_STATUS]
    assert re.search(r"rank 1 \(.*\) has not moved for .* last finished step 20\b", stderr)
    assert "rank 0" not in stderr


def test_the_end_comes_within_the_time_limit(ends: dict[str, End]) -> None:
    for case in ("stopped", "stopped 0", "killed", "killed 0", "hanging"):
        assert ends[case].seconds < 45, case  # the limit is 7; twenty other processes run beside them


def test_an_error_is_said_once_with_its_rank_and_the_others_are_silent(ends: dict[str, End]) -> None:
    statuses, stderr, _ = ends["user error"]
    assert statuses == [1, 1]
    assert re.fullmatch(r"error: rank 1 \(.*\), after step 20: no such reward: give another --reward\n", stderr)
    statuses, stderr, _ = ends["all"]
    assert statuses == [1, 1]
    assert stderr.count("the same everywhere") == 1


def test_of_a_bug_only_the_process_that_has_it_shows_a_traceback(ends: dict[str, End]) -> None:
    statuses, stderr, _ = ends["bug"]
    assert statuses == [1, 1]
    assert stderr.count("Traceback") == 1
    assert re.search(r"error: rank 1 \(.*\), after step 20: ZeroDivisionError: of a kind", stderr)


def test_a_slow_phase_and_an_ordinary_end_are_no_fault(ends: dict[str, End]) -> None:
    for case in ("slow phase", "none"):
        assert (ends[case].statuses, ends[case].stderr) == ([0, 0], ""), case


def seen(rank: int, *, beaten: float = NOW, moved: float = NOW, step: int = 7, **post: object) -> Seen:
    return Seen(Post(rank, host="a", pid=1, step=step, **{"limited": True, **post}), beaten, moved)  # type: ignore[arg-type]


def ranks(found: list[Seen]) -> list[int]:
    return [one.post.rank for one in found]


def test_whoever_does_not_answer_is_dead_unless_it_has_ended() -> None:
    all_seen = [seen(0), seen(1, beaten=80), seen(2, beaten=80, ended=True), seen(3, beaten=95)]
    assert ranks(silent(all_seen, NOW, LIMIT)) == [1]
    assert ranks(silent(all_seen, NOW, 3)) == [1, 3]


def test_where_nobody_moves_the_one_behind_is_to_blame_then_the_one_that_does_not_wait() -> None:
    still = [seen(rank, moved=80, waits=True) for rank in range(3)]
    assert ranks(idle([*still, seen(3, moved=80, step=6)], NOW, LIMIT)) == [3]
    assert ranks(idle([*still, seen(3, moved=80)], NOW, LIMIT)) == [3]
    assert ranks(idle([*still, seen(3, moved=92)], NOW, LIMIT)) == [3]  # its last post was read a little later
    assert ranks(idle(still, NOW, LIMIT)) == [0, 1, 2]
    assert ranks(idle([seen(0), seen(1, moved=80)], NOW, LIMIT)) == [1]
    assert ranks(idle([seen(0), seen(1, moved=95)], NOW, LIMIT)) == []


def test_waiting_for_a_process_in_a_phase_without_a_limit_counts_only_from_its_end() -> None:
    saving = seen(0, moved=20, limited=False, phase="saving")
    waiting = seen(1, moved=20, waits=True)
    assert idle([saving, waiting], NOW, LIMIT) == []
    saving.take(Post(0, beat=9, step=7, limited=True, phase="training"), NOW + 5)
    assert idle([saving, waiting], NOW + 5, LIMIT) == []
    assert ranks(idle([saving, waiting], NOW + 16, LIMIT)) == [0]


def test_of_many_only_some_are_named() -> None:
    text = sentence([seen(rank, beaten=80) for rank in range(9)], NOW, silence=True)
    assert "rank 3 (a, pid 1) has not answered for 20 s" in text and "rank 4" not in text
    assert "and so 5 more" in text


def test_after_a_restart_a_run_goes_on_unless_the_user_names_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    assert after_restart("") == ""  # alone
    for trained, named, expected in (
        (False, "", ""),
        (True, "", "auto"),
        (True, "a.pt", "a.pt"),
        (True, "auto", "auto"),
    ):
        meeting = Meeting(None, trained, None)  # type: ignore[arg-type]
        monkeypatch.setattr(processes, "meeting", lambda meeting=meeting: meeting)
        assert after_restart(named) == expected


def test_asking_for_a_checkpoint_again_and_again_does_not_end_the_program() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Interrupt() as interrupt:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert interrupt.signal == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before
