"""The processes of a run. torchrun starts them, this file joins them; alone, every function here does nothing.

Weights, gradients and meshes are `train/parallel.py`'s. Here are ranks, small sums, plain objects and waiting.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from minillm import log
from minillm.log import UserError
from minillm.rendezvous import Meeting, meet

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
Tree = TypeVar("Tree")

# A collective in training that takes longer than --timeout and half of it ends the process with an error. By then the
# watch (train/health.py) should have said who is behind: this is for the case that it could not.
COLLECTIVE_MARGIN = 1.5
# The others wait as long for what one process prepares: a large tokenized store takes hours. A process that dies ends
# this wait at once.
PREPARATION_TIMEOUT = timedelta(hours=24)

_rank, _size, _local_rank = 0, 1, 0
_patient: Any = None  # a group on the CPU, for plain objects and long waits
_meeting: Meeting | None = None  # what the processes of this start share beside their groups


def rank() -> int:
    """The number of this process, from 0."""
    return _rank


def size() -> int:
    """How many processes train together; 1: this one alone."""
    return _size


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return _local_rank


def local_size() -> int:
    """How many of the processes are on this machine, as on every other; else all of them."""
    told = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) if _size > 1 else 1
    return told if told > 0 and _size % told == 0 else _size


def is_main() -> bool:
    """Does this process print, log and write files?"""
    return _rank == 0


def launched() -> bool:
    """Did torchrun (or whoever sets its variables) start this process as one of several?"""
    try:
        return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    except ValueError:
        return False


def meeting() -> Meeting | None:
    """The store of this start, and whether the job trained before; None: this process is alone."""
    return _meeting


def start(device: str, timeout: float = 600.0) -> None:
    """Join the others where torchrun started this process: over gloo on CPUs, and nccl between GPUs.

    Args:
        device: what --device says.
        timeout: what --timeout says, in seconds.
    Raises:
        UserError: a variable of torchrun is missing, or the others were not found.
    """
    global _rank, _size, _local_rank, _patient, _meeting
    if _size > 1 or not launched():
        return
    import torch
    import torch.distributed as dist

    try:
        rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE says that several processes train together, and RANK or LOCAL_RANK is missing or no number "
            f"({error}): start them with torchrun --nproc_per_node=N -m minillm ..."
        ) from None
    on_gpu = device not in ("cpu", "mps") and torch.cuda.is_available()
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}. Give torchrun "
                f"--nproc_per_node={torch.cuda.device_count()}, or --device cpu"
            )
        torch.cuda.set_device(local)
    _meeting = meet(rank, size)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=COLLECTIVE_MARGIN * timeout),
            store=_meeting.store, rank=rank, world_size=size,
        )  # fmt: skip
        _patient = dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"process {rank} of {size} could not join the others: {reason}") from error
    _rank, _size, _local_rank = rank, size, local
    log.speak_as(rank)


def stop() -> None:
    """Leave the others. After an error nobody waits for anyone."""
    global _rank, _size, _local_rank, _patient, _meeting
    if _size == 1:
        return
    import torch.distributed as dist

    dist.destroy_process_group()
    _rank, _size, _local_rank, _patient, _meeting = 0, 1, 0, None, None
    log.speak_as(0)


def another_group() -> Any:
    """A further group of all processes on the CPU, for a thread that talks to its likes; None: this one is alone."""
    if _size == 1:
        return None
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of everyone's tensor (same shape, dtype and kind of device), in place; the same bits everywhere."""
    if _size > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def summed_numbers(*numbers: float) -> tuple[float, ...]:
    """The sums of everyone's numbers; alone, the numbers as they are."""
    if _size == 1:
        return numbers
    import torch

    return tuple(summed(torch.tensor(numbers, dtype=torch.float64)).tolist())


def gathered(value: Tree) -> list[Tree]:
    """Everyone's plain object (numbers, strings, arrays, containers), in the order of ranks."""
    if _size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _size
    dist.all_gather_object(values, value, group=_patient)
    return values


def from_main(value: Tree) -> Tree:
    """The main process's plain object."""
    if _size == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0, group=_patient)
    return values[0]


def scattered(parts: list[Tree] | None) -> Tree:
    """This process's part of the list that the main process gives, one for each rank; the others give None."""
    if _size == 1:
        assert parts is not None
        return parts[0]
    import torch.distributed as dist

    found: list[Any] = [None]
    dist.scatter_object_list(found, parts if is_main() else None, src=0, group=_patient)
    return found[0]


def wait() -> None:
    """Go on when everyone is here."""
    if _size > 1:
        import torch.distributed as dist

        dist.barrier(group=_patient)


def agree(flag: bool) -> bool:
    """Does anyone say yes?"""
    return any(gathered(flag))


def main_only(work: Callable[[], Result]) -> Result:
    """The main process does the work once everyone is here, and everyone gets its result, a plain object. Where it
    fails, the others end, too."""
    if _size == 1:
        return work()
    wait()
    result: list[Any] = [None, None]
    if is_main():
        try:
            result = [work(), None]
        except BaseException as error:  # told to the others first: they would wait for it
            from_main([None, True])
            raise error
    value, failed = from_main(result)
    if failed:
        raise SystemExit(1)
    return value


def main_first(work: Callable[[], Result]) -> Result:
    """Everyone does the work, the main process before the others, and then the first process of each machine: files
    that it prepares are there when the others look for them. Where it fails, the others end, too."""
    if _size == 1:
        return work()
    result: list[Result] = []
    for turn in range(3):
        failed: BaseException | None = None
        if turn == (0 if is_main() else 1 if _local_rank == 0 else 2):
            try:
                result.append(work())
            except BaseException as error:  # told to the others first: they would wait for it
                failed = error
        someone_failed = agree(failed is not None)
        if failed is not None:
            raise failed
        if someone_failed:
            raise SystemExit(1)  # its own process says why
    return result[0]
