"""Whose processor this is: libraries are fast on one maker's and not on another's. No torch here.

What follows from the name and not from timing is the same in every run, so that runs repeat bit for bit.
"""

from __future__ import annotations

import platform
from pathlib import Path


def _amd_processor() -> bool:
    names = Path("/proc/cpuinfo")
    try:
        return "AuthenticAMD" in (names.read_text(errors="replace") if names.exists() else platform.processor())
    except OSError:
        return False


AMD = _amd_processor()
