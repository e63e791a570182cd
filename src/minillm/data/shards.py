"""The tokens that `minillm data prepare-text` leaves behind: a training and a validation part, each in one file or
several, with config.json beside them.

A part is one stream of ids [T] with the places [N+1] where its N documents begin and end. It is written in order and
can be cut back to what was committed; the files of a part are read as one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from minillm.log import UserError

CONFIG_FILE = "config.json"
FORMAT = "minillm prepared text"
FORMAT_VERSION = 1
PARTS = ("train", "val")


class ShardedTokens:
    """Ids of several mapped files as one row [T]: it has a length, a dtype and slices."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self.shards = list(shards)
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self.dtype = self.shards[0].dtype

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        """The ids of a slice without a step, copied where it reaches over the end of a file."""
        start, stop, _ = part.indices(len(self))
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        pieces = []
        while start < stop:
            end = min(stop, int(self.starts[first + 1]))
            pieces.append(self.shards[first][start - self.starts[first] : end - self.starts[first]])
            start, first = end, first + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, self.dtype), *pieces])


class PartWriter:
    """Appends documents to the files of one part; a file is full when it has `shard_tokens` tokens or more, and
    never ends inside a document."""

    def __init__(self, folder: Path, part: str, dtype: str, shard_tokens: int) -> None:
        self.folder, self.part, self.dtype, self.shard_tokens = folder, part, dtype, shard_tokens
        self.shards: list[int] = []  # tokens of each file
        self.documents = self.text_bytes = 0
        self._tokens: IO[bytes] | None = None
        self._lengths: IO[bytes] | None = None

    @property
    def tokens(self) -> int:
        return sum(self.shards)

    @property
    def lengths_path(self) -> Path:
        """The lengths of the documents while they grow, int64 [N]."""
        return self.folder / f"{self.part}_lengths.tmp"

    def shard_path(self, index: int) -> Path:
        return self.folder / f"{self.part}_tokens_{index:05d}.bin"

    def write(self, tokens: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        """Appends documents: ids [T] and their lengths [N] (which sum to T)."""
        if not len(lengths):
            return
        if self._lengths is None:
            self._lengths = open(self.lengths_path, "ab")  # noqa: SIM115  (closed by close)
        self._lengths.write(lengths.astype(np.int64).tobytes())
        self.documents += len(lengths)
        self.text_bytes += text_bytes
        ends = np.cumsum(lengths)
        written = 0
        while written < len(tokens):
            if self._tokens is None:
                if not self.shards or self.shards[-1] >= self.shard_tokens:
                    self.shards.append(0)
                self._tokens = open(self.shard_path(len(self.shards) - 1), "ab")  # noqa: SIM115
            room = self.shard_tokens - self.shards[-1]
            last = min(int(np.searchsorted(ends, written + room)), len(ends) - 1)
            self._tokens.write(tokens[written : ends[last]].tobytes())
            self.shards[-1] += int(ends[last]) - written
            written = int(ends[last])
            if self.shards[-1] >= self.shard_tokens:
                _sync(self._tokens)
                self._tokens.close()
                self._tokens = None

    def commit(self) -> dict[str, Any]:
        """What `restore` needs to come back to this point; everything up to here is on the disk."""
        for file in (self._tokens, self._lengths):
            if file is not None:
                _sync(file)
        return {"shards": list(self.shards), "documents": self.documents, "text_bytes": self.text_bytes}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a commit, cutting off what was written after it. Raises UserError if files are missing."""
        self.shards, self.documents, self.text_bytes = list(state["shards"]), state["documents"], state["text_bytes"]
        size = np.dtype(self.dtype).itemsize
        single = self.folder / f"{self.part}_tokens.bin"
        if single.exists():  # stopped while it was finished
            os.replace(single, self.shard_path(0))
        wanted = {self.shard_path(index): size * tokens for index, tokens in enumerate(self.shards)}
        wanted[self.lengths_path] = 8 * self.documents
        for path in [*self.folder.glob(f"{self.part}_tokens_*.bin"), self.lengths_path]:
            if not wanted.get(path):
                path.unlink(missing_ok=True)
        for path, length in wanted.items():
            if length and (not path.is_file() or path.stat().st_size < length):
                raise UserError(f"{path} is damaged: remove the folder {self.folder} and prepare the text again.")
            if length:
                os.truncate(path, length)

    def close(self) -> None:
        for file in (self._tokens, self._lengths):
            if file is not None:
                file.close()
        self._tokens = self._lengths = None

    def finish(self) -> dict[str, Any] | None:
        """Gives the files their final names and writes the offsets; may be repeated. The part's entry in config.json;
        None for a part without documents."""
        self.close()
        if not self.documents:
            return None
        names = [self.shard_path(index).name for index in range(len(self.shards))]
        if len(names) == 1:
            names = [f"{self.part}_tokens.bin"]
            if self.shard_path(0).exists():
                os.replace(self.shard_path(0), self.folder / names[0])
        offsets = f"{self.part}_offsets.npy"
        self._write_offsets(self.folder / offsets)
        return {
            "files": names, "offsets": offsets, "shard_tokens": self.shards, "tokens": self.tokens,
            "documents": self.documents, "text_bytes": self.text_bytes,
        }  # fmt: skip

    def _write_offsets(self, path: Path) -> None:
        """The running sum of the lengths, int64 [N+1], in pieces."""
        end = np.zeros(1, dtype=np.int64)
        with open(path, "wb") as target, open(self.lengths_path, "rb") as source:
            header = {"descr": np.lib.format.dtype_to_descr(end.dtype), "fortran_order": False}
            np.lib.format.write_array_header_1_0(target, {**header, "shape": (self.documents + 1,)})
            target.write(end.tobytes())
            while block := source.read(1 << 23):
                sums = np.cumsum(np.frombuffer(block, dtype=np.int64)) + end
                target.write(sums.tobytes())
                end = sums[-1:]
            _sync(target)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def is_prepared_text(path: str | Path) -> bool:
    """Is this a folder of `minillm data prepare-text`?"""
    try:
        return json.loads((Path(path) / CONFIG_FILE).read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a prepared folder. Raises UserError when it is of a later version than this program's."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if config["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{folder} has the format version {config['format_version']}, this program reads {FORMAT_VERSION}: "
            "prepare the text again, or use the program that wrote it."
        )
    return config


def has_validation(path: str | Path) -> bool:
    """Has this prepared folder validation tokens of its own?"""
    return is_prepared_text(path) and bool(read_config(Path(path))["val"])


def map_part(folder: Path, part: str) -> tuple[Any, np.ndarray]:
    """The ids [T] and document offsets [N+1] of a part, mapped into memory. Its files must be there."""
    config = read_config(folder)
    shards = [np.memmap(folder / name, dtype=config["dtype"], mode="r") for name in config[part]["files"]]
    offsets = np.load(folder / config[part]["offsets"], mmap_mode="r")
    return shards[0] if len(shards) == 1 else ShardedTokens(shards), offsets
