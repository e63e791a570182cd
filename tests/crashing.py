"""Runs pairs of processes in which one comes to grief, all pairs at once, and prints what became of them as JSON:
name -> [exit statuses by rank, stderr, seconds]. This process plays torchrun: it starts them and holds their stores."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed import TCPStore

from minillm import processes
from minillm.log import UserError
from minillm.train import health

TIMEOUT = 7.0  # a third of it passes before a silent process is taken for dead, and a busy machine delays posts
LAST = 20


def raise_it(error: Exception) -> None:
    raise error


CASES: dict[str, tuple[int, Callable[[], object]]] = {  # who, after step LAST, does what
    "stopped": (1, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "stopped 0": (0, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "killed": (1, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "killed 0": (0, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "hanging": (1, lambda: time.sleep(600)),
    "user error": (1, lambda: raise_it(UserError("no such reward: give another --reward"))),
    "bug": (1, lambda: raise_it(ZeroDivisionError("of a kind"))),
    "all": (-1, lambda: raise_it(UserError("the same everywhere"))),
    "slow phase": (1, lambda: slow_phase()),
    "none": (-2, lambda: None),
}


def slow_phase() -> None:
    with health.unlimited("saving"):
        time.sleep(1.4 * TIMEOUT)


def train(case: str) -> None:
    """A training loop in small."""
    who, act = CASES[case]
    processes.start("cpu", 5 * TIMEOUT)  # the watch is to end it, not the collectives
    with health.watched(TIMEOUT):
        for step in range(1, 10**6):
            processes.summed(torch.ones(1))
            if step == LAST + 1 and processes.rank() in (who, 0 if who == -1 else who):
                act()
            if step == 2 * LAST and case in ("slow phase", "none"):
                break
            health.finished(step)
            time.sleep(0.05)
    processes.stop()


def start(case: str, port: int) -> tuple[list[int], str]:
    """Fork both ranks; returns their ids and the file that they write to."""
    handle, path = tempfile.mkstemp()
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            os.dup2(handle, 2)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
            os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
            status = 0
            try:
                train(case)
            except SystemExit as end:
                status = int(end.code or 0)
            os._exit(status)
        pids.append(pid)
    os.close(handle)
    return pids, path


def main() -> None:
    ports = []
    for _ in CASES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    began = time.monotonic()
    running = {case: start(case, port) for case, port in zip(CASES, ports)}
    stores = [
        TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
        for port in ports
    ]
    found: dict[str, list[object]] = {}
    statuses: dict[int, int] = {}
    while len(found) < len(CASES) and time.monotonic() - began < 60:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[pid] = os.waitstatus_to_exitcode(status)
        for case, (pids, path) in running.items():
            if case not in found and all(each in statuses for each in pids):
                with open(path, encoding="utf-8") as file:
                    said = file.read()
                found[case] = [[statuses[each] for each in pids], said, time.monotonic() - began]
        time.sleep(0 if pid else 0.02)
    for pids, path in running.values():
        os.unlink(path)
        for each in set(pids) - set(statuses):
            os.kill(each, signal.SIGKILL)
    del stores
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
