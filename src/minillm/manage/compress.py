"""minillm checkpoint compress and restore: cold checkpoints in less room, and back bit for bit."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm.atomic import write_atomic, write_text
from minillm.log import UserError, format_size, info

LEVEL = 10  # of zstd: higher ones gain less than a percent on floats and take many times as long


@dataclass(frozen=True)
class CompressSettings:
    """Compress cold checkpoints"""

    checkpoints: tuple[str, ...] = field(metadata={"help": "full checkpoints (.pt)", "positional": True})
    method: str = field(
        default="zstd",
        metadata={
            "help": "the file as it is (.zst), or what differs from the parent's weights (.delta; needs the parent)",
            "choices": ("zstd", "delta"),
        },
    )


@dataclass(frozen=True)
class RestoreSettings:
    """Restore compressed checkpoints"""

    checkpoints: tuple[str, ...] = field(metadata={"help": ".pt.zst and .pt.delta files", "positional": True})


def run(settings: CompressSettings) -> None:
    """Each file becomes FILE.zst or FILE.delta; it is deleted only after what was written has been unpacked again and
    has the same SHA-256.

    Raises:
        UserError: a file is no full checkpoint, or (delta) its parent is not there or not the recorded one.
    """
    for text in settings.checkpoints:
        compress(Path(text), settings.method)


def compress(path: Path, method: str) -> Path:
    """Returns the compressed file. Raises UserError as `run`."""
    from minillm.checkpoint.compressed import change_floats, float_segments, pack, parent_tensors, unpack
    from minillm.checkpoint.files import hash_file, peek, read_tensors, remove, sha256
    from minillm.checkpoint.sharded import is_sharded
    from minillm.manage.catalog import facts

    if is_sharded(path):
        raise UserError(f"{path} is a folder: `minillm checkpoint consolidate {path}` makes a file of it")
    content = read_tensors(path)
    if path.suffix != ".pt" or not isinstance(content, dict) or "model_state_dict" not in content:
        raise UserError(f"{path} is not a full checkpoint (.pt): only those are compressed")
    del content
    target = path.with_name(path.name + {"zstd": ".zst", "delta": ".delta"}[method])
    if target.exists():
        raise UserError(f"{target} exists already")
    content = peek(path)
    parent = content.get("parent")
    body = bytearray(path.read_bytes())
    digest = sha256(path)
    header: dict[str, Any] = {"name": path.name, "sha256": digest, "size": len(body), "summary": facts(content)}
    if method == "delta":
        if not isinstance(parent, dict):
            raise UserError(f"{path} names no parent (it began with random weights): use --method zstd")
        tensors = parent_tensors(parent, path)
        segments = float_segments(path, content, tensors)
        change_floats(body, segments, tensors, packing=True)
        header |= {"parent": parent, "segments": segments}
    names, date = path.stat().st_nlink, path.stat().st_mtime

    def write(temporary: Path) -> None:
        pack(temporary, body, header, LEVEL)
        os.utime(temporary, (date, date))

    write_atomic(target, write)
    try:
        unpack(target)  # raises where it does not give back the same bytes
        write_text(hash_file(target), f"{sha256(target)}  {target.name}\n")
    except BaseException:
        remove(target)
        raise
    before, after = len(body), target.stat().st_size
    remove(path)
    info(f"[compress] {path} -> {target}: {format_size(before)} -> {format_size(after)} ({after / before:.1%})")
    if names > 1:
        info(f"[compress] {path} has other names (hard links), which still take their {format_size(before)}")
    return target


def restore(settings: RestoreSettings) -> None:
    """Each file becomes what it was, with the same SHA-256, and the compressed one is deleted.

    Raises:
        UserError: a file is damaged, its parent is not there or not the recorded one, or the target exists.
    """
    from minillm.checkpoint.compressed import SUFFIXES, unpack
    from minillm.checkpoint.files import hash_file, remove, sha256, verify_hash

    for text in settings.checkpoints:
        path = Path(text)
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path} is no compressed checkpoint: .zst and .delta are")
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        target = path.with_suffix("")
        if target.exists():
            raise UserError(f"{target} exists already")
        verify_hash(path)
        body = unpack(path)
        date = path.stat().st_mtime

        def write(temporary: Path, body: bytes | bytearray = body, date: float = date) -> None:
            temporary.write_bytes(body)
            os.utime(temporary, (date, date))

        write_atomic(target, write)
        write_text(hash_file(target), f"{sha256(target)}  {target.name}\n")
        remove(path)
        info(f"[restore] {path} -> {target}: every byte is as it was")
