"""Checkpoints: their format, writing and verifying them, finding one. `CheckpointLoader` is the public door."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "CheckpointLoader":
        from minillm.checkpoint.loader import CheckpointLoader

        return CheckpointLoader
    raise AttributeError(name)
