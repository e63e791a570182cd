"""Saving while training goes on: a copy of the state, and a thread that writes it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.checkpoint.sharded import chunk_of
from minillm.log import UserError, warn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


DEEP = (Tensor, dict, list, tuple)  # what later steps may change


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread. A failed write is a warning, and an error only for the last one,
    which `finish` waits for.

    Copies of the state are made into the same memory every time: fresh memory costs more than the copy itself, and
    pinned memory, which a GPU can copy to at full speed, much more.
    """

    def __init__(self, group: ProcessGroup | None = None, *, tells: bool = True) -> None:
        """Args:
        group: of the processes that write a checkpoint together, for the thread alone.
        tells: this process warns; where several fail together, one of them is enough.
        """
        self.group, self._tells = group, tells
        self._thread: threading.Thread | None = None
        self._failed = False
        self._copies: dict[str, Tensor] = {}

    def snapshot(self, content: dict[str, Any]) -> dict[str, Any]:
        """A copy on the CPU that later steps do not change, for the next `submit`: what this process holds of tensors
        that are spread over several comes as `sharded.Chunk`. It waits for the write under way, whose copy it takes.
        """
        self.wait()
        copied: dict[str, Any] = self._copy(content, "")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def make_room(self, content: dict[str, Any]) -> None:
        """Take the memory of a snapshot of this in the background: fresh memory is several times slower than the copy.
        What is in `content` may change meanwhile."""
        self.wait()
        self._thread = threading.Thread(target=self._copy, args=(content, ""), name="checkpoint-memory", daemon=True)
        self._thread.start()

    def _copy(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            chunk = chunk_of(value)
            if chunk is None:
                return self._copy_tensor(value, name)
            return replace(chunk, values=self._copy_tensor(chunk.values, name))
        if isinstance(value, dict):
            return {
                key: self._copy(item, f"{name}.{key}") if isinstance(item, DEEP) else item
                for key, item in value.items()
            }
        return type(value)(
            self._copy(item, f"{name}.{number}") if isinstance(item, DEEP) else item
            for number, item in enumerate(value)
        )

    def _copy_tensor(self, tensor: Tensor, name: str) -> Tensor:
        tensor = tensor.detach()
        kept = self._copies.get(name)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return kept.copy_(tensor, non_blocking=tensor.is_cuda)

    def submit(self, write: Callable[[], None]) -> None:
        """Start writing once the previous write is done. `write` must own what it writes (a snapshot)."""
        self.wait()
        self._failed = False

        def run() -> None:
            _give_way()
            try:
                write()
            except Exception as error:  # the run goes on, whatever it was
                self._failed = True
                if self._tells:
                    reason = str(error) or type(error).__name__
                    warn(
                        f"a checkpoint could not be saved ({reason}); the previous one is intact, training goes on, "
                        "and the next save tries again"
                    )

        # A process that ends after another one died does not wait for its answer.
        self._thread = threading.Thread(target=run, name="checkpoint-writer", daemon=self.group is not None)
        self._thread.start()

    def wait(self) -> bool:
        """Wait for the write under way; False if the last one failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return not self._failed

    def finish(self) -> None:
        """Wait; raises UserError if the last write failed."""
        if not self.wait():
            raise UserError("the last checkpoint could not be saved (see the warning above): free some disk space")


def _give_way() -> None:
    """Let this thread run where training leaves a core idle: a product on all cores is as slow as the slowest one."""
    if sys.platform == "linux":  # elsewhere priorities belong to processes
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
