"""What the commands that prepare files of rows share: their input, and which rows they hold out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from minillm.data import hub
from minillm.data.files import Row, RowReport, find_files, read_rows


def on_hub(source: str) -> bool:
    """Is this the name of a hub dataset, rather than a path?"""
    return not Path(source).exists() and hub.looks_like_hub_name(source)


def input_rows(source: str, split: str, report: RowReport) -> Iterator[Row]:
    """Rows of a file, folder or glob, or of the `split` of a hub dataset. Raises UserError as their readers do."""
    if not on_hub(source):
        yield from read_rows(source, report)
        return
    for row in hub.hub_rows(source, split=split):
        if len(report.samples) < 3:
            report.sample(json.dumps(row.value, ensure_ascii=False, default=str))
        yield row


def input_identity(source: str) -> str:
    """What changes when the input does: the SHA-256 of its files; of a hub dataset only its name is known."""
    from minillm.data.store import file_sha256

    return source if on_hub(source) else "".join(file_sha256(file) for file in find_files(source))


def is_held_out(question: str, fraction: float, seed: int) -> bool:
    """Is a row held out? A hash of its question and the seed says so: equal questions are always on one side."""
    drawn = hashlib.blake2b(f"{seed}:{question}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn, "big") < fraction * 2**64
