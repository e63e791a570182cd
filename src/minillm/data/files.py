"""Rows from files: which files a path means, and the rows inside them, each with file and line.

A row that cannot be read is written into the `RowReport`, never skipped in silence.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from minillm import log
from minillm.log import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".zst")
COMPRESSED = tuple(f"{suffix}{each}" for suffix in SUFFIXES if suffix != ".parquet" for each in COMPRESSIONS)
KNOWN = ", ".join(SUFFIXES) + " (each but parquet also as .gz or .zst)"
REMOVED_SUFFIX = ".removed.jsonl"  # side files of `minillm data clean`, not data
PREPARED_SUFFIX = ".prepared.json"  # side files of `minillm data prepare-preferences`
END_OF_TEXT = "<|endoftext|>"
GROUP_CHARACTERS = 2_000  # plain lines without any separator are gathered into documents of this size
LONGEST_BYTES = 64_000_000  # of a line or a document: what is read at once must fit into memory
PLACES_KEPT = 3
REASONS_KEPT = 50  # reasons may quote the data, which must not make the report endless


@dataclass
class RowReport:
    """What became of the rows of a source: how many were used, and why the others were not."""

    source: str = ""
    used: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first few "file:line"
    samples: list[str] = field(default_factory=list)  # the first rows as they stand in the file, shortened
    bytes_read: int = 0

    def add(self, reason: str, file: str, line: int) -> None:
        """Counts one unusable row."""
        self._count(reason, 1, [f"{file}:{line}"])

    def merge(self, behind: RowReport) -> None:
        """Adds what became of the rows that follow."""
        self.used += behind.used
        for reason, count in behind.reasons.items():
            self._count(reason, count, behind.places[reason])
        self.samples += behind.samples[: 3 - len(self.samples)]

    def _count(self, reason: str, count: int, places: list[str]) -> None:
        if reason not in self.reasons and len(self.reasons) >= REASONS_KEPT:
            reason = "other reasons"
        self.reasons[reason] = self.reasons.get(reason, 0) + count
        kept = self.places.setdefault(reason, [])
        kept += places[: PLACES_KEPT - len(kept)]

    def counts(self) -> dict[str, int]:
        """Reason -> number of rows, the most frequent first."""
        return dict(sorted(self.reasons.items(), key=lambda item: (-item[1], item[0])))

    @property
    def unusable(self) -> int:
        return sum(self.reasons.values())

    def lines(self) -> list[str]:
        """The report in words; empty when every row was used."""
        if not self.reasons:
            return []
        total = self.used + self.unusable
        lines = [f"[data] {self.source}: {self.unusable:,} of {total:,} rows are not usable:"]
        for reason, count in self.counts().items():
            more = ", ..." if count > PLACES_KEPT else ""
            lines.append(f"[data]   {count:,} x {reason}: {', '.join(self.places[reason])}{more}")
        return lines

    def log(self) -> None:
        """Prints the counts by reason with the first places; nothing when every row was used."""
        for line in self.lines():
            log.info(line)

    def sample(self, raw: str | bytes) -> None:
        """Keeps the first three rows, shortened, for the error that shows them."""
        if len(self.samples) < 3:
            text = raw[:2_000].decode("utf-8", "replace") if isinstance(raw, bytes) else raw[:2_000]
            text = " ".join(text.split())
            self.samples.append(text if len(text) <= 160 else text[:157] + "...")

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "used": self.used, "reasons": self.reasons, "places": self.places}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> RowReport:
        return cls(value["source"], value["used"], dict(value["reasons"]), dict(value["places"]))


@dataclass(frozen=True, slots=True)
class Row:
    """One row: the object, and where it stands (line of the file; row number in a JSON array or parquet)."""

    value: dict[str, Any]
    file: str
    line: int


def data_suffix(path: Path) -> str:
    """The suffix that tells the form (".jsonl" for a.jsonl.gz), or "" when it is none of ours."""
    name = path.name.lower()
    found = next((s for s in COMPRESSED + SUFFIXES if name.endswith(s)), "")
    return found.removesuffix(".gz").removesuffix(".zst")


def find_files(path: str | Path) -> list[Path]:
    """The data files that a path means, sorted: a file, a folder (all inside it), or a glob.

    Raises UserError when there are none.
    """
    place = Path(path)
    if place.is_file():
        if not data_suffix(place):
            raise UserError(f"{path}: unknown file type. Readable are {KNOWN}.")
        if place.stat().st_size == 0:
            raise UserError(f"{path} is empty: there are no rows to read.")
        return [place]
    if place.is_dir():
        inside = [p for p in place.rglob("*") if not _hidden(p.relative_to(place))]
        found = sorted(p for p in inside if p.is_file() and _is_data(p))
        if not found:
            raise UserError(f"There are no data files in the folder {path}. Readable are {KNOWN}.")
    elif glob.has_magic(str(path)):
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
        found = sorted(p for p in found if p.is_file() and _is_data(p))
        if not found:
            raise UserError(f"No data file matches {path}. Readable are {KNOWN}.")
    else:
        siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        close = difflib.get_close_matches(place.name, siblings, n=1)
        hint = f" Did you mean {place.parent / close[0]}?" if close else ""
        if not place.parent.is_dir():
            hint = f" The folder {place.parent} does not exist either."
        raise UserError(f"Data not found: {path}.{hint}")
    if all(p.stat().st_size == 0 for p in found):
        raise UserError(f"All {len(found)} data files of {path} are empty.")
    return found


def _is_data(path: Path) -> bool:
    return bool(data_suffix(path)) and not path.name.endswith((REMOVED_SUFFIX, PREPARED_SUFFIX))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_rows(path: str | Path, report: RowReport) -> Iterator[Row]:
    """Rows of every file that `path` means, in file order; rows that are not JSON objects go into the report.

    Raises UserError for a file that is missing, empty, not readable or damaged (a gzip cut off, say).
    """
    report.source = report.source or str(path)
    done = 0
    for file in find_files(path):
        yield from read_file(file, report, done)
        done += file.stat().st_size
        report.bytes_read = done


def read_file(file: Path, report: RowReport, done: int = 0, column: str = "") -> Iterator[Row]:
    """Rows of one file, as `read_rows`. `done`: bytes of other files that were read before. `column`: the only
    one that is wanted, which is faster where columns are stored apart."""
    if data_suffix(file) == ".parquet":
        yield from _read_parquet(file, report, done, column)
        return
    reader = {".txt": _read_txt, ".json": _read_json}.get(data_suffix(file), _read_jsonl)
    with _clear_errors(file):
        yield from reader(file, report, done)


def read_lines(file: Path, report: RowReport) -> Iterator[tuple[int, bytes]]:
    """Lines of one file as they stand there, with their numbers from 1; for those who parse them elsewhere.

    A line longer than LONGEST_BYTES is written into the report. Raises UserError as `read_rows`.
    """
    with _clear_errors(file):
        yield from _lines(file, report, 0)


@contextmanager
def _clear_errors(file: Path) -> Iterator[None]:
    """What can go wrong while `file` is read, as a UserError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{file} is damaged: the compressed data cannot be unpacked to the end ({error}). "
            "Fetch or write the file again."
        ) from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error


def _open(file: Path) -> tuple[IO[bytes], IO[bytes]]:
    """The stream of content and the stream below it, whose position tells how much of the file is read."""
    below = open(file, "rb")  # noqa: SIM115  (closed by the readers)
    if file.name.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=below), below  # type: ignore[return-value]
    if file.name.lower().endswith(".zst"):
        return io.BufferedReader(_Zstandard(file, below), 1 << 20), below
    return below, below


class _Zstandard(io.RawIOBase):
    """The content of a .zst file, which may be several frames. The library's own reader takes a file that is cut
    off for one that ends."""

    def __init__(self, file: Path, below: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                f"{file}: reading zst needs zstandard. Install it with: pip install 'minillm-trainer[data]'"
            ) from error
        self.below, self.error = below, zstandard.ZstdError
        self.new_frame = zstandard.ZstdDecompressor().decompressobj
        self.frame: Any = None
        self.packed, self.content = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.content:
            self.packed = self.packed or self.below.read(1 << 12)  # little, for it may become very much
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("it ends too early")
                return 0
            self.frame = self.frame or self.new_frame()
            try:
                self.content = memoryview(self.frame.decompress(self.packed))
            except self.error as error:
                raise EOFError(str(error)) from error
            self.packed = self.frame.unused_data if self.frame.eof else b""
            self.frame = None if self.frame.eof else self.frame
        count = min(len(buffer), len(self.content))
        buffer[:count], self.content = self.content[:count], self.content[count:]
        return count


def _lines(file: Path, report: RowReport, done: int) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, split at the byte \\n only; a byte order mark is dropped. A line longer than LONGEST_BYTES
    is written into the report."""
    stream, below = _open(file)
    with below, stream:
        number = 0
        while line := stream.readline(LONGEST_BYTES):
            number += 1
            if number % 256 == 0:
                report.bytes_read = done + below.tell()
            if len(line) == LONGEST_BYTES and not line.endswith(b"\n"):
                report.add(f"a line longer than {LONGEST_BYTES // 1_000_000} MB", str(file), number)
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LONGEST_BYTES)
                continue
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def parse_json(raw: bytes) -> tuple[Any, str]:
    """(value, "") or (None, reason)."""
    import orjson

    try:
        return orjson.loads(raw), ""
    except orjson.JSONDecodeError:
        pass
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None, "invalid UTF-8"
    if "NaN" in text or "Infinity" in text:  # Python's json writes these though they are not JSON
        try:
            return json.loads(text), ""
        except (ValueError, RecursionError):
            pass
    return None, "invalid JSON"


def _read_jsonl(file: Path, report: RowReport, done: int) -> Iterator[Row]:
    for number, line in _lines(file, report, done):
        line = line.strip()
        if not line:
            continue
        report.sample(line)
        value, reason = parse_json(line)
        if not reason and not isinstance(value, dict):
            reason = "not a JSON object"
        if reason:
            report.add(reason, str(file), number)
        else:
            yield Row(value, str(file), number)


def _read_json(file: Path, report: RowReport, done: int) -> Iterator[Row]:
    """A JSON array of rows; also JSON lines under the name .json, and a single object."""
    first = next((line.strip() for _, line in _lines(file, RowReport(), done) if line.strip()), b"")
    if not first.startswith(b"[") and not parse_json(first)[1]:
        yield from _read_jsonl(file, report, done)
        return
    stream, below = _open(file)
    with below, stream:
        content = stream.read().removeprefix(b"\xef\xbb\xbf").strip()
    value, reason = parse_json(content)
    if reason:
        report.sample(content)
        report.add(f"{reason} (the file is one JSON value)", str(file), _line_of_json_error(content))
        return
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        report.sample(json.dumps(row, ensure_ascii=False)[:2_000] if len(report.samples) < 3 else "")
        if isinstance(row, dict):
            yield Row(row, str(file), number)
        else:
            report.add("not a JSON object", str(file), number)


def _line_of_json_error(content: bytes) -> int:
    try:
        json.loads(content.decode("utf-8"))
    except json.JSONDecodeError as error:
        return error.lineno
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1
    except RecursionError:
        pass
    return 1


def _read_parquet(file: Path, report: RowReport, done: int, column: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{file}: reading parquet needs pyarrow. Install it with: pip install 'minillm-trainer[data]'"
        ) from error
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [column] if column in table.schema_arrow.names else None
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for value in batch.to_pylist():
                number += 1
                if len(report.samples) < 3:
                    report.sample(json.dumps(value, ensure_ascii=False, default=str))
                yield Row(value, str(file), number)
            report.bytes_read = done + file.stat().st_size * number // max(table.metadata.num_rows, 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a readable parquet file (after row {number:,}): {error}") from error


def _read_txt(file: Path, report: RowReport, done: int) -> Iterator[Row]:
    """Documents of a plain text as rows {"text"}: separated by <|endoftext|> where that occurs, else by blank
    lines, else lines gathered up to about GROUP_CHARACTERS characters."""
    marked, blank = _separators(file)
    longest = LONGEST_BYTES if marked or blank else GROUP_CHARACTERS
    held: list[str] = []
    size, start = 0, 1
    for number, line in _lines(file, report, done):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            report.sample(line)
            report.add("invalid UTF-8", str(file), number)
            continue
        pieces = text.split(END_OF_TEXT) if marked else [text]
        for index, piece in enumerate(pieces):
            ends = index > 0 if marked else blank and not piece.strip()
            if held and (ends or size >= longest):
                yield from _document(held, file, start, report)
                held, size = [], 0
            if piece.strip() or held:
                start = start if held else number
                held.append(piece)
                size += len(piece)
    yield from _document(held, file, start, report)


def _document(held: list[str], file: Path, line: int, report: RowReport) -> Iterator[Row]:
    text = "".join(held).strip("\r\n")
    if text.strip():
        report.sample(text)
        yield Row({"text": text}, str(file), line)


def _separators(file: Path) -> tuple[bool, bool]:
    """(does <|endoftext|> occur, is there a blank line between lines of text)"""
    blank = seen_text = gap = False
    for _, line in _lines(file, RowReport(), 0):
        if END_OF_TEXT.encode() in line:
            return True, False
        if re.fullmatch(rb"\s*", line):
            gap = seen_text
        else:
            blank, seen_text = blank or gap, True
    return False, blank
