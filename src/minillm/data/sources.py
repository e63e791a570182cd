"""Where texts come from: local files, and datasets that are streamed; one after another, from any point on."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from minillm.data.files import Row, RowReport, data_suffix, find_files, read_file
from minillm.data.formats import Unusable, text_of
from minillm.data.hub import ADDRESS, SHORT_NAMES, hub_rows, looks_like_hub_name
from minillm.log import UserError

ROWS_WITHOUT_TEXT = 1_000  # so many first rows without a text, and the column is not the right one


@dataclass(frozen=True)
class Source:
    """A local file, or (path None) the name of a dataset that is streamed. size: bytes of the file."""

    name: str
    path: Path | None = None
    size: int = 0

    def identity(self) -> dict[str, Any]:
        """What tells whether it is still the same; of a stream, only its name."""
        from minillm.data.store import file_sha256

        if self.path is None:
            return {"name": self.name}
        return {"name": self.path.name, "bytes": self.size, "sha256": file_sha256(self.path)}


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """The sources that the inputs mean: files, folders and globs in the order of their names, datasets by name.

    Raises UserError for an input that is neither there nor looks like a dataset's name.
    """
    found = []
    for each in inputs:
        if is_remote(each):
            found.append(Source(each))
        else:
            found += [Source(str(path), path, path.stat().st_size) for path in find_files(each)]
    return found


def is_remote(text: str) -> bool:
    """Is this the name of a hub dataset or an address? Not a path that is there, nor one that looks mistyped."""
    place = Path(text)
    if place.exists():
        return False
    mistyped = data_suffix(place) or place.parent.is_dir()
    return bool(text in SHORT_NAMES or ADDRESS.fullmatch(text) or looks_like_hub_name(text) and not mistyped)


def read_sources(
    sources: Sequence[Source], report: RowReport, *, column: str, split: str, start: tuple[int, int] = (0, 0)
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every usable text, with the place behind it: (index of its source, rows read of that). `start`: such a place,
    to go on from; `report` must then be as it was there.

    Rows that are not usable are written into the report. Raises UserError for a source that is missing, damaged or
    has no such column.
    """
    done = sum(source.size for source in sources[: start[0]])
    for index in range(start[0], len(sources)):
        source = sources[index]
        skip = start[1] if index == start[0] else 0
        own_column = "text" if source.path and data_suffix(source.path) == ".txt" else column
        used_before = report.used
        for number, row in enumerate(_rows(source, report, own_column, split, skip, done), skip + 1):
            try:
                text = text_of(row.value, own_column)
            except Unusable as reason:
                report.add(str(reason), row.file, row.line)
                if number == ROWS_WITHOUT_TEXT and report.used == used_before and own_column not in row.value:
                    raise UserError(_no_column(source, row.value, own_column)) from None
                continue
            report.used += 1
            yield text, (index, number)
        done += source.size
        report.bytes_read = done


def _rows(source: Source, report: RowReport, column: str, split: str, skip: int, done: int) -> Iterator[Row]:
    """Rows of one source after the first `skip`, with the report as it was before."""
    if source.path is None:
        yield from hub_rows(source.name, split=split, column=column, skip=skip)
        return
    kept = RowReport.from_dict(report.to_dict())
    kept.places = {reason: list(places) for reason, places in kept.places.items()}
    rows = read_file(source.path, report, done, column)
    if skip:
        deque(islice(rows, skip), maxlen=0)
        report.reasons, report.places = kept.reasons, kept.places
    yield from rows


def _no_column(source: Source, row: dict[str, Any], column: str) -> str:
    names = ", ".join(sorted(str(name) for name in row)[:20])
    return (
        f"{source.name}: none of the first {ROWS_WITHOUT_TEXT:,} rows has a text in {column!r}. They have: {names}. "
        "`minillm data prepare-text` takes the right one with --text_column."
    )


def no_text(sources: Sequence[Source], report: RowReport, column: str) -> str:
    """Why there is nothing to prepare, for an error."""
    lines = [f"There is no usable text in {', '.join(source.name for source in sources[:5])}."]
    lines += [f"  {count:,} x {reason}: {report.places[reason][0]}" for reason, count in report.counts().items()]
    if report.samples:
        lines += ["The first rows are:", *(f"  {sample}" for sample in report.samples)]
    if any(re.match(r"no .* field", reason) for reason in report.reasons):
        lines.append(f"Texts are looked for in {column!r}; --text_column of `minillm data prepare-text` names another.")
    return "\n".join(lines)
