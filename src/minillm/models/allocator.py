"""The C library's allocator."""

from __future__ import annotations

import contextlib
import ctypes
import platform


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of giving it back to the system after every operation: fresh pages
    cost up to a third of a CPU step's time. Other C libraries are left as they are."""
    if platform.system() != "Linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
