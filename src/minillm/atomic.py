"""Files and folders that appear whole: written beside their place, on the disk, then renamed. Whoever reads sees the
old one or the new one, and whatever goes wrong leaves the old one."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Have what was written to a file on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk. Windows cannot open folders and sees to it by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """A name beside `path` that nobody else uses, on this machine or on another."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it.

    Raises:
        OSError: it could not be written; names `path`.
    """
    write_together({path: write})


def write_text(path: Path, text: str) -> None:
    """As `write_atomic`, for a text."""
    write_texts({path: text})


def write_texts(contents: Mapping[Path, str]) -> None:
    """As `write_together`, for texts."""

    def writer(text: str) -> Callable[[Path], Any]:
        return lambda beside: beside.write_text(text, encoding="utf-8", newline="\n")

    write_together({path: writer(text) for path, text in contents.items()})


def write_together(writers: Mapping[Path, Callable[[Path], Any]]) -> None:
    """As `write_atomic`, for several files: none is renamed before all are written."""
    beside = {path: temporary_path(path) for path in writers}
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(beside[path])
            sync(beside[path])
        for path in writers:
            os.replace(beside[path], path)
        for folder in {path.parent for path in writers}:
            sync_folder(folder)
    except OSError as error:
        error.filename = str(path)  # a failed write names no file
        raise
    finally:
        for each in beside.values():
            each.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed process left in a folder."""
    for left in folder.glob(".*.tmp"):
        if not left.is_dir():
            left.unlink(missing_ok=True)


def put_in_place(beside: Path, output: Path, earlier: Path | None = None) -> None:
    """Rename a finished file or folder to its place. An earlier folder goes only when the new one is there, and comes
    back if that fails; `earlier` is its name meanwhile, which belongs to us."""
    earlier = earlier or beside.with_name(f"{beside.name}.earlier")
    if output.is_dir():
        shutil.rmtree(earlier, ignore_errors=True)
        os.replace(output, earlier)
    try:
        os.replace(beside, output)
    except OSError:
        if earlier.exists():
            os.replace(earlier, output)
        raise
    sync_folder(output.parent)
    shutil.rmtree(earlier, ignore_errors=True)
