"""What a file that comes from anywhere may hold. Nothing here executes what it reads, and nothing it promises is
believed before it is compared with what is there."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from minillm.checkpoint.format import FORMAT_VERSION
from minillm.log import UserError

DEEPEST = 32  # containers inside each other; ours have 6
MOST_VALUES = 200_000_000  # in all containers together: a log of a million steps has ten million
CONTAINERS = (dict, list, tuple, set)
MEMORY_SHARE = 0.9  # of the machine's memory that unpacking one file may ask for


def check_archive(file: Path | IO[bytes], path: Path) -> None:
    """torch writes zip archives without compression. One that unpacks to more than it is, is a bomb.

    Raises:
        UserError: it does.
    """
    size = file.stat().st_size if isinstance(file, Path) else file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        return  # an older form of torch's, or no checkpoint at all: torch.load tells
    finally:
        if not isinstance(file, Path):
            file.seek(0)
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    total = sum(entry.file_size for entry in entries)
    if packed or total > size:
        where = f"{packed[0]} in it is compressed" if packed else f"it names {total:,} bytes and is {size:,} long"
        raise UserError(f"{path} is not how torch writes a checkpoint ({where}), so it is refused unopened")


def check_memory(wanted: int, path: Path) -> None:
    """Raises UserError where a file says that it unpacks to more than this machine can hold."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > MEMORY_SHARE * total:
        raise UserError(f"{path} says that it unpacks to {wanted:,} bytes; this machine has {total:,} of memory")


def check_plain(content: Any, path: Path) -> None:
    """Only plain tensors on the CPU, each with all its elements in the file, in containers of a sane depth.

    Raises:
        UserError: names the first key that holds something else.
    """
    known: dict[int, tuple[int, int]] = {}  # of a container: values in it, depth of it

    def look(value: Any, name: str, depth: int) -> tuple[int, int]:
        if isinstance(value, Tensor):
            _check_tensor(value, f"{path}: {name or 'its content'}")
            return 1, 0
        if not isinstance(value, CONTAINERS):
            return 1, 0
        if id(value) in known:
            return known[id(value)]
        items = value.items() if isinstance(value, dict) else enumerate(value)
        values, below = 1, 0
        if depth <= DEEPEST:
            for key, item in items:
                more, deep = look(item, f"{name}.{key}" if name else str(key), depth + 1)
                values, below = values + more, max(below, deep)
        if depth > DEEPEST or below >= DEEPEST or values > MOST_VALUES:
            raise UserError(f"{path}: {name[:80]} unfolds without end: containers that hold each other are refused")
        known[id(value)] = values, below + 1
        return known[id(value)]

    look(content, "", 0)


def _check_tensor(tensor: Tensor, name: str) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        raise UserError(f"{name} is not a plain tensor (sparse, quantized or of another class), so it is refused")
    if tensor.device.type != "cpu":
        raise UserError(f"{name} has a shape and no values (device {tensor.device}), so it is refused")
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        raise UserError(
            f"{name} claims the shape {tuple(tensor.shape)}, and the file holds {held:,} bytes of it: refused"
        )


def tensors_in(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor inside containers, by its path: optimizer_state_dict.adamw.state.0.exp_avg."""
    if isinstance(value, Tensor):
        return {name: value}
    items: Any = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    found: dict[str, Tensor] = {}
    for key, item in items:
        found |= tensors_in(item, f"{name}.{key}" if name else str(key))
    return found


def check_version(content: Any, path: Path) -> None:
    """Raises UserError where `format_version` is none, or one that only a later MiniLLM knows."""
    if not isinstance(content, dict) or "format_version" not in content:
        return  # weights, or from another program
    version = content["format_version"]
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise UserError(f"{path}: format_version is {version!r}, not a number from 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}, and this MiniLLM reads up to {FORMAT_VERSION}: a later version "
            "wrote it, update MiniLLM"
        )


def member(folder: Path, name: Any, source: Path) -> Path:
    """The file of this name in `folder`, as `source` (an index) names it.

    Raises:
        UserError: the name leads elsewhere, by its path or by a symbolic link. (The hub's cache is a folder of links
            into the one beside it, which is its own.)
    """
    if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name or "\0" in name:
        raise UserError(f"{source} names the file {name!r}: only names of files in {folder} are read")
    path = folder / name
    root = folder.parents[1] if folder.parent.name == "snapshots" else folder
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{path} is a symbolic link out of its folder, so it is refused")
    return path
