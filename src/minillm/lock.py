"""One process at a time in a folder that it writes."""

from __future__ import annotations

import os
from pathlib import Path

from minillm.log import UserError, warn


class FolderLock:
    """Keeps other processes out of a folder (which is made) until `close`, or until this process ends, however it does.

    Raises:
        UserError: another process has it.
    """

    def __init__(self, folder: Path, doing: str) -> None:
        """`doing`: what a process does there, for those who are told to wait ("training in")."""
        self._descriptor: int | None = None
        try:
            import fcntl
        except ImportError:  # Windows has no such locks
            return
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"Another process is {doing} {folder}. Wait for it, end it, or choose another folder."
            ) from None
        except OSError as error:  # some network file systems
            os.close(descriptor)
            warn(f"{folder} cannot be locked ({error.strerror or error}): make sure that nothing else is {doing} it")
            return
        self._descriptor = descriptor

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()
