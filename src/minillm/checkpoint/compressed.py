"""Cold checkpoints: FILE.zst is the file, compressed; FILE.delta is what differs from the parent's weights. Both give
back every byte of the file.

Both begin with a frame that zstd skips over: JSON that says what is in it. In a .delta the bits of every float are
those of the file exclusive-or those of the parent's tensor of that name (where it has one, of the same type and
length), with all first bytes of the floats together, then all second bytes, and so on: signs and exponents, which are
nearly alike, then stand beside each other.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm.checkpoint.safety import check_memory
from minillm.log import UserError

SUFFIXES = (".zst", ".delta")
MAGIC = 0x184D2A5E  # one of the numbers of frames that every reader of zstd skips
LONGEST_HEADER = 1 << 26
WEIGHTS = ("model_state_dict", "ema_state_dict")


def zstandard(path: Path) -> Any:
    """The library. Raises UserError where it is not installed."""
    try:
        import zstandard as library
    except ImportError:
        raise UserError(f"{path} needs zstandard: pip install 'minillm-trainer[data]'") from None
    return library


def read_header(path: Path) -> dict[str, Any]:
    """What a compressed checkpoint says about itself: name, sha256 and size of the file, `summary`, and of a delta
    `parent` and `segments`. {} where another program compressed it.

    Raises:
        UserError: the header is damaged.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8 or struct.unpack("<I", start[:4])[0] != MAGIC:
            return {}
        length = struct.unpack("<I", start[4:])[0]
        text = file.read(length) if length <= LONGEST_HEADER else b""
    try:
        header = json.loads(text)
        size, digest = header["size"], header["sha256"]
        if not isinstance(size, int) or size < 0 or not isinstance(digest, str) or len(text) != length:
            raise ValueError("size or sha256 is missing")
        segments = header.get("segments", [])
        right = all(
            offset >= 0
            and count >= 0
            and width in (2, 4)
            and not count % width
            and offset + count <= size
            and isinstance(key, str)
            for offset, count, width, key in segments
        )
        if not right or not isinstance(header.get("parent") or {}, dict):
            raise ValueError("its segments lie outside the file")
        return header
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: its header is damaged ({error})") from None


def unpack(path: Path) -> bytes | bytearray:
    """The bytes of the file that was compressed, which have the SHA-256 that was recorded.

    Raises:
        UserError: it is damaged, or (of a delta) the parent is not found or is another file than it was.
    """
    header = read_header(path)
    if not header and path.suffix == ".delta":
        raise UserError(f"{path} is no delta that `minillm checkpoint compress` wrote")
    library = zstandard(path)
    content = path.read_bytes()
    if header:
        content = content[8 + struct.unpack("<I", content[4:8])[0] :]
    try:
        size = library.get_frame_parameters(content).content_size
        if size in (library.CONTENTSIZE_UNKNOWN, library.CONTENTSIZE_ERROR) or header.get("size", size) != size:
            raise UserError(f"{path} does not say rightly how large it is unpacked, so it is refused")
        check_memory(size, path)
        body = bytearray(library.ZstdDecompressor().decompress(content))
    except library.ZstdError as error:
        raise UserError(f"{path} cannot be unpacked ({error}): it was cut short or changed") from None
    if path.suffix == ".delta":
        try:
            change_floats(body, header["segments"], parent_tensors(header["parent"], path), packing=False)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: its header does not fit its parent ({error})") from None
    if header and hashlib.sha256(body).hexdigest() != header["sha256"]:
        raise UserError(f"{path} unpacks to another SHA-256 than it records: it was changed")
    return body


def pack(path: Path, body: bytes | bytearray, header: Mapping[str, Any], level: int) -> None:
    """Write a compressed file (not atomic: `path` is a temporary one)."""
    library = zstandard(path)
    text = json.dumps(header).encode()
    packed = library.ZstdCompressor(level=level, write_content_size=True, write_checksum=True).compress(bytes(body))
    with path.open("wb") as file:
        file.write(struct.pack("<II", MAGIC, len(text)) + text)
        file.write(packed)


def change_floats(body: bytearray, segments: list[list[Any]], tensors: Mapping[str, Tensor], *, packing: bool) -> None:
    """To the form of a .delta and back, in place.

    Args:
        segments: (offset, bytes, bytes of one float, key in `tensors` or "") of every tensor.
    """
    for offset, count, width, key in segments:
        part = np.frombuffer(body, np.uint8, count, offset)  # a view: what is assigned below changes `body`
        other = tensors[key].contiguous().view(-1).view(torch.uint8).numpy() if key else np.uint8(0)
        if packing:
            part[:] = (part ^ other).reshape(-1, width).T.reshape(-1)
        else:
            part[:] = part.reshape(width, -1).T.reshape(-1) ^ other


def float_segments(path: Path, content: Any, parent: Mapping[str, Tensor]) -> list[list[Any]]:
    """Where the floats of a checkpoint lie in its file.

    Args:
        content: what torch.load(path, mmap=True) made of it, so that tensors are addresses in the file.
        parent: tensors that the weights of the same name may be compared with.
    """
    found: dict[int, tuple[int, int, str]] = {}  # by address: bytes, bytes of one element (0: no float), key

    def look(value: Any, name: str, inside: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                look(item, str(key), inside or name)
        elif isinstance(value, list | tuple):
            for item in value:
                look(item, "", inside)
        elif isinstance(value, Tensor) and (count := value.untyped_storage().nbytes()):
            width = value.element_size() if value.is_floating_point() and value.element_size() in (2, 4) else 0
            whole = value.is_contiguous() and value.numel() * value.element_size() == count
            other = parent.get(name) if inside in WEIGHTS and whole else None
            same = other is not None and (other.dtype, other.numel()) == (value.dtype, value.numel())
            address = value.untyped_storage().data_ptr()
            if address not in found or same:
                found[address] = count, width if whole else 0, name if same else ""

    look(content, "", "")
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        starts = []
        for entry in archive.infolist():
            if "/data/" in entry.filename and entry.file_size:
                file.seek(entry.header_offset + 26)
                starts.append(entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))))
    addresses, starts = sorted(found), sorted(starts)
    gaps = [address - addresses[0] for address in addresses]
    if gaps != [start - starts[0] for start in starts]:
        return []  # stored in another way than we know: the file is compressed as it is
    placed = zip(starts, (found[address] for address in addresses), strict=True)
    return [[start, count, width, key] for start, (count, width, key) in placed if width]


def raw_weights(content: Any) -> dict[str, Tensor]:
    """The state dict of a full checkpoint or a bare one, as it is in the file."""
    weights = content.get("model_state_dict", content) if isinstance(content, dict) else {}
    return {key: value for key, value in weights.items() if isinstance(value, Tensor)}


def parent_tensors(parent: Mapping[str, Any], child: Path) -> dict[str, Tensor]:
    """The weights of the parent that a checkpoint names.

    Raises:
        UserError: it is not there, or it is another file than the recorded one.
    """
    from minillm.checkpoint.files import read_tensors

    path = find_parent(parent, child)
    if path is None:
        raise UserError(f"{child} is a difference from {parent['path']}, which is not there: put that file back")
    if original_sha256(path) != parent["sha256"]:
        raise UserError(
            f"{child} is a difference from {parent['path']}, whose SHA-256 is not the recorded one any more "
            f"({parent['sha256'][:12]}): it was overwritten"
        )
    return raw_weights(read_tensors(path))


def find_parent(parent: Mapping[str, Any] | None, child: Path) -> Path | None:
    """The file that a checkpoint names as its parent, compressed or not: where it was, or at the same place seen from
    the checkpoint's folder, or beside it. A file of the recorded content comes first."""
    if not parent or not isinstance(parent.get("path"), str):
        return None
    named = Path(parent["path"])
    places = [named, child.parent / named, child.parent.parent / named.name, child.parent / named.name]
    existing = [
        path.with_name(path.name + suffix)
        for path in dict.fromkeys(places)
        for suffix in ("", *SUFFIXES)
        if path.name and path.with_name(path.name + suffix).exists()
    ]
    for path in existing:
        if original_sha256(path) == parent.get("sha256"):
            return path
    return existing[0] if existing else None


def original_sha256(path: Path) -> str:
    """The hash of a file, or of what is compressed in it (as its header records, which `unpack` checks)."""
    from minillm.checkpoint.files import sha256

    header = read_header(path) if path.suffix in SUFFIXES else {}
    return header["sha256"] if header else sha256(path)
