"""What the cleaner writes: files that appear whole or not at all, and the rows that are kept and removed."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from minillm.atomic import temporary_path
from minillm.data.clean.duplicates import similar_rows
from minillm.data.clean.rows import Checked, Removal
from minillm.data.files import RowReport
from minillm.log import UserError

KEY_BYTES = 16


class Rows:
    """Takes checked chunks in order, finds what repeats an earlier row, and writes kept and removed rows.

    Of a row that is kept there remain in memory some 100 bytes, with near duplicates some 550; never its text. While
    similar rows are looked for, which takes a look at all of them, the rows wait in a temporary file.
    """

    def __init__(self, source: str, kept: IO[bytes], removed: IO[bytes], near_duplicates: str) -> None:
        self.report = RowReport(source)
        self.languages: Counter[str] = Counter()
        self.masked: Counter[str] = Counter()
        self._kept, self._removed = kept, removed
        self._near = near_duplicates
        self._first: dict[bytes, int] = {}  # key -> which of the distinct rows
        self._exact = bytearray()  # the exact keys of the distinct rows
        self._names: list[str] = []  # of the files, in order
        self._file, self._line = array("L"), array("Q")  # of the distinct rows
        self._values: list[np.ndarray] = []
        self._bands: list[np.ndarray] = []
        self._waiting: IO[bytes] | None = None

    def wait_in(self, stream: IO[bytes]) -> None:
        """Rows go into `stream` until `finish` has compared all of them."""
        self._waiting = stream

    def add(self, chunk: Checked) -> None:
        """Writes the rows of a chunk."""
        self.languages.update(chunk.languages)
        self.masked.update(chunk.masked)
        keys = chunk.exact_keys if self._near == "off" else chunk.same_keys
        fit = -1
        distinct = []
        if chunk.file not in self._names[-1:]:
            self._names.append(chunk.file)
        file = len(self._names) - 1
        for line, row in zip(chunk.lines, chunk.rows, strict=True):
            if isinstance(row, Removal):
                self._write_removed(row, chunk.file, line)
                continue
            fit += 1
            own = len(self._line)
            first = self._first.setdefault(keys[fit], own)
            if first != own:
                exact = self._exact[first * KEY_BYTES : (first + 1) * KEY_BYTES] == chunk.exact_keys[fit]
                removal = Removal("exact_duplicate" if exact else "near_duplicate", of=self._place(first))
                self._write_removed(removal, chunk.file, line)
                continue
            distinct.append(fit)
            self._exact += chunk.exact_keys[fit]
            self._file.append(file)
            self._line.append(line)
            self._write_kept(row)
        if chunk.values is not None and chunk.band_keys is not None:
            self._values.append(chunk.values[distinct])
            self._bands.append(chunk.band_keys[distinct])

    def finish(self) -> None:
        """Removes similar rows and writes what has waited."""
        if self._waiting is None:
            return
        waiting, self._waiting = self._waiting, None
        self._first.clear()
        similar = similar_rows(self._values, self._bands)
        self.report.used, own = 0, -1
        waiting.seek(0)
        for entry in waiting:
            if entry[:1] == b"-":
                self._removed.write(entry[1:])
                continue
            own += 1
            if own in similar:
                removal = Removal("near_duplicate", "nearly the same text", of=self._place(similar[own]))
                self._write_removed(removal, self._name(own), self._line[own])
            else:
                self._write_kept(entry[1:])

    def _name(self, row: int) -> str:
        return self._names[self._file[row]]

    def _place(self, row: int) -> str:
        return f"{self._name(row)}:{self._line[row]}"

    def _write_kept(self, row: bytes) -> None:
        self.report.used += 1
        if self._waiting is not None:
            self._waiting.write(b"+" + row)
        else:
            self._kept.write(row)

    def _write_removed(self, removal: Removal, file: str, line: int) -> None:
        import orjson

        self.report.add(removal.reason, file, line)
        entry: dict[str, Any] = {"file": file, "line": line, **removal._asdict()}
        entry = {key: value for key, value in entry.items() if value != ""}
        written = orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)
        if self._waiting is not None:
            self._waiting.write(b"-" + written)
        else:
            self._removed.write(written)


@contextmanager
def written_whole(paths: list[Path]) -> Iterator[tuple[IO[bytes], ...]]:
    """Streams to new files that take the names `paths` together, once all is written; otherwise none does.

    Raises UserError when they cannot be written.
    """
    beside = [temporary_path(path) for path in paths]
    with ExitStack() as opened:
        try:
            streams = []
            for temporary in beside:
                temporary.parent.mkdir(parents=True, exist_ok=True)
                streams.append(opened.enter_context(open(temporary, "wb")))
            yield tuple(streams)
            for stream in streams:
                stream.flush()
                os.fsync(stream.fileno())
                stream.close()
            for temporary, path in zip(beside, paths, strict=True):
                os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"{paths[0]} cannot be written: {error.strerror or error}.") from error
        finally:
            for temporary in beside:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)


@contextmanager
def temporary_beside(path: Path) -> Iterator[IO[bytes]]:
    """A file without a name in the folder of `path`, which is gone when it is closed."""
    with tempfile.TemporaryFile(dir=path.parent) as stream:
        yield stream
