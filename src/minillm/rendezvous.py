"""Where the processes of one start find each other: a part of torchrun's key-value store that nobody used before.

torchrun keeps its store while it restarts the processes of a job, and what the dead ones left there (their addresses)
leads the new ones astray. The restart count does not tell starts apart: where one machine's process died, the launchers
of the other machines restart theirs without counting it. So the processes agree on a name that is new every time.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from minillm.log import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE_S = 600.0  # how long the processes wait for each other: machines start at different times
POLL_S = 0.05


@dataclass(frozen=True)
class Meeting:
    """What the processes of one start share."""

    store: Store  # empty at the beginning
    restarted: bool  # did an earlier start of the same job train at least a step?
    job: Store  # what all starts of the job share

    def mark_training(self) -> None:
        """A step is done: a later start goes on from a checkpoint of this one."""
        self.job.set("trained", "1")


def meet(rank: int, size: int, patience: float = PATIENCE_S) -> Meeting:
    """Agree with the other processes of this start, at the address in MASTER_ADDR and MASTER_PORT.

    Everyone announces a random token. Rank 0 publishes the tokens it sees until everyone has found its own among them,
    which tokens of an earlier start cannot bring about.

    Raises:
        UserError: the address is missing, or not everyone came in `patience` seconds.
    """
    from torch.distributed import DistError, PrefixStore, TCPStore

    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"MASTER_ADDR or MASTER_PORT is missing or no number ({error}): start the processes with torchrun "
            "--nproc_per_node=N -m minillm ..."
        ) from None
    hosts_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        shared = TCPStore(
            host, port, is_master=hosts_store, timeout=timedelta(seconds=patience), wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
        job = PrefixStore("minillm", shared)
        agree = _call if rank == 0 else _answer
        name, restarted = agree(job, rank, size, time.monotonic() + patience)
    except DistError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"process {rank} of {size} did not reach the others at {host}:{port}: {reason}") from None
    return Meeting(PrefixStore(name, job), restarted, job)


def _announce(job: Store, rank: int) -> str:
    token = uuid.uuid4().hex
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    job.set(f"here/{rank}", json.dumps([token, restarts not in ("", "0")]))
    return token


def _call(job: Store, rank: int, size: int, deadline: float) -> tuple[str, bool]:
    """Rank 0's part: (the name of this start, whether the job has trained before)."""
    trained = job.check(["trained"])
    first_here = job.add("starts", 1) == 1  # in this store: it goes when the machine that holds it goes
    own = _announce(job, rank)
    others = [f"here/{other}" for other in range(1, size)]
    while True:
        missing = [key for key in others if not job.check([key])]
        if not missing:
            found = [json.loads(job.get(key)) for key in others]
            tokens = [own, *(token for token, _ in found)]
            counted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0") or any(c for _, c in found)
            restarted = trained or (first_here and counted)
            name = uuid.uuid5(uuid.NAMESPACE_OID, " ".join(tokens)).hex
            job.set("called", json.dumps([name, tokens, restarted]))
            missing = [key for key in others if not job.check([f"{name}/{key}"])]
            if not missing:
                job.set(f"{name}/go", "1")
                return name, restarted
        _wait(deadline, "rank " + ", ".join(key.removeprefix("here/") for key in missing[:8]), size)


def _answer(job: Store, rank: int, size: int, deadline: float) -> tuple[str, bool]:
    """The part of everyone else."""
    own = _announce(job, rank)
    while True:
        if job.check(["called"]):
            name, tokens, restarted = json.loads(job.get("called"))
            if len(tokens) == size and tokens[rank] == own:
                job.set(f"{name}/here/{rank}", "1")
                if job.check([f"{name}/go"]):
                    return name, restarted
        _wait(deadline, "rank 0", size)


def _wait(deadline: float, whom: str, size: int) -> None:
    if time.monotonic() > deadline:
        raise UserError(f"{whom} of {size} processes did not come; do all machines run the same torchrun command?")
    time.sleep(POLL_S)
