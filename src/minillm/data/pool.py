"""Work on a stream of items in several processes, in order, with only a few items in memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from minillm.log import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    items: Iterable[Item], work: Callable[..., Result], arguments: tuple[Any, ...], num_workers: int
) -> Iterator[Result]:
    """work(item, *arguments) of each item, in their order. The arguments are sent to each process once.

    Raises:
        UserError: a process was stopped from outside.
    """
    import multiprocessing

    # spawn, because a fork of a process whose libraries have already used threads can hang
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(num_workers, context, _start, (work, arguments)) as pool:
            waiting: deque[Future[Result]] = deque()
            for item in items:
                waiting.append(pool.submit(_do, item))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "One of the processes that read the data was stopped (out of memory?). Try again with --num_workers 0, "
            "which needs no other process."
        ) from error


_task: tuple[Callable[..., Any], tuple[Any, ...]]


def _start(work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _task
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _task = (work, arguments)


def _do(item: Any) -> Any:
    work, arguments = _task
    return work(item, *arguments)


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its workers, and they would wait for work for ever."""
    import multiprocessing
    import os

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
