"""Runs under torchrun that lose a process go on by themselves to the same end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training import command, environment, equal, load, without_times

RUN = ["--max_steps", "60", "--save_every", "10", "--eval_every", "30", "--timeout", "20"]


def torchrun(data: Path, out: Path, *flags: str, restarts: int = 0) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = command("pretrain", data, out, *RUN, *flags)[1:]  # -m minillm pretrain ...
    return [*launcher, f"--max-restarts={restarts}", *words]


def worker(launcher: int, rank: int) -> int:
    """The process id of a rank that torchrun started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="utf-8").split()
    found = [
        pid for pid in children if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    ]
    assert len(found) == 1, children
    return int(found[0])


def lines_of(process: subprocess.Popen[str], until: str) -> str:
    """What a process says until a line of it contains this text."""
    assert process.stderr
    said = ""
    for line in process.stderr:
        said += line
        if until in line:
            return said
    raise AssertionError(f"it ended before {until!r}:\n{said[-3000:]}")


def result(out: Path) -> tuple[object, object]:
    content = load(out / "pretrain_32/last.pt")
    log = json.loads((out / "pretrain_32/training_log.json").read_text(encoding="utf-8"))
    kept = ("model_state_dict", "optimizer_state_dict", "progress", "data_state", "validation_log")
    return without_times({key: content[key] for key in kept}), without_times(log)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")


@pytest.mark.slow
@needs_proc
def test_a_job_that_lost_a_process_goes_on_from_its_checkpoint_to_the_same_end(demo_data: Path, tmp_path: Path) -> None:
    def start(name: str, restarts: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            torchrun(demo_data, tmp_path / name, restarts=restarts), env=environment(), text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    whole = start("whole", 0)
    assert whole.communicate(timeout=120) and whole.returncode == 0
    folder = tmp_path / "killed" / "pretrain_32"
    folder.mkdir(parents=True)
    killed = start("killed", 1)
    said = lines_of(killed, "step 30/60")
    os.kill(worker(killed.pid, 1), signal.SIGKILL)
    said += killed.communicate(timeout=120)[1]
    assert killed.returncode == 0, said[-3000:]
    found = re.search(r"error: rank 1 \(\S+, pid \d+\) has not answered .* last finished step (\d+)", said)
    assert found and 1 <= int(found[1]) <= 32, said[-3000:]  # the newest that others had heard of
    assert "started anew by torchrun: going on with the newest checkpoint" in said
    assert re.search(r"resuming \S+ at step [2-5]0 of 60", said)
    assert equal(result(tmp_path / "whole"), result(tmp_path / "killed"))
    assert not folder.with_name("pretrain_32.previous").exists()
