"""Chunks of rows through the rules, in order, in this process or in several."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from minillm.data.clean.rows import Checked, Chunk, Removal, Rules, check_chunk
from minillm.data.files import RowReport, data_suffix, find_files, read_lines, read_rows
from minillm.data.pool import in_order

CHUNK_BYTES = 1 << 20
LARGE_INPUT = 16 << 20  # bytes from which on starting processes pays


class _Collected(RowReport):
    """Takes up what `read_rows` could not read, in its place among the rows."""

    def __init__(self, chunk: Chunk) -> None:
        super().__init__()
        self.chunk = chunk

    def add(self, reason: str, file: str, line: int) -> None:
        names = {"invalid UTF-8": "non_utf8", "a line longer": "over_long"}
        name = next((name for start, name in names.items() if reason.startswith(start)), "broken_json")
        self.chunk.rows.append((line, Removal(name, reason)))


def read_chunks(input: Path) -> Iterator[Chunk]:
    """All rows of all files in order. Lines of .jsonl files stay bytes, which are parsed where they are checked.

    Raises UserError for files that are missing, empty or damaged.
    """
    for file in find_files(input):
        yield from _chunks_of_file(file)


def check_file(file: Path, rules: Rules) -> Iterator[Checked]:
    """The chunks of one file, checked: a task of its own where others do the other files."""
    for chunk in _chunks_of_file(file):
        yield check_chunk(chunk, rules)


def _chunks_of_file(file: Path) -> Iterator[Chunk]:
    return _chunks_of_lines(file) if data_suffix(file) in (".jsonl", ".ndjson") else _chunks_of_objects(file)


def _chunks_of_lines(file: Path) -> Iterator[Chunk]:
    chunk, size = Chunk(str(file)), 0
    report = _Collected(chunk)
    for number, line in read_lines(file, report):
        line = line.strip()
        if line:
            chunk.rows.append((number, line))
            size += len(line)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = Chunk(str(file)), 0
            report.chunk = chunk
    if chunk.rows:
        yield chunk


def _chunks_of_objects(file: Path) -> Iterator[Chunk]:
    chunk = Chunk(str(file))
    report = _Collected(chunk)
    for row in read_rows(file, report):
        chunk.rows.append((row.line, row.value))
        if len(chunk.rows) >= 1_000:
            yield chunk
            chunk = report.chunk = Chunk(str(file))
    if chunk.rows:
        yield chunk


def processes_for(input: Path, wanted: int) -> int:
    """How many processes to use: `wanted`, or when that is negative one a core for large input and none for small."""
    if wanted >= 0:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    large = sum(file.stat().st_size for file in find_files(input)) >= LARGE_INPUT
    return cores if large else 0


def checked(chunks: Iterable[Chunk], rules: Rules, num_workers: int) -> Iterator[Checked]:
    """Checks chunks and gives them back in their order, with only a few of them in memory."""
    if num_workers < 2:
        for chunk in chunks:
            yield check_chunk(chunk, rules)
        return
    yield from in_order(chunks, check_chunk, (rules,), num_workers)
