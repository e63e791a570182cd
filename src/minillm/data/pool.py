"""Work on a stream of items in several processes, or ahead of its use, in order, with only a few items in memory."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
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


def ahead(items: Iterator[Item], depth: int) -> Generator[Item, None, None]:
    """The items, which a thread makes while others are used, `depth` at most. What they raise is raised in its place.
    Closing the iterator ends the thread."""
    ready: queue.Queue[tuple[list[Item], BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def offer(found: list[Item], error: BaseException | None) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((found, error), timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                offer([item], None)
                if closed.is_set():
                    return
            offer([], None)
        except BaseException as error:
            offer([], error)

    thread = threading.Thread(target=work, daemon=True)  # it may hang in a read from the network
    thread.start()
    try:
        while True:
            found, error = ready.get()
            if error is not None:
                raise error
            if not found:
                return
            yield from found
    finally:
        closed.set()
        thread.join(timeout=1.0)


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
