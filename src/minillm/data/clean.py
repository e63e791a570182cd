"""`minillm data clean INPUT --output OUT`: keeps the conversations that are fit for training.

A conversation is kept when its roles and their order are valid, no turn is empty, its answers are long
enough, and no earlier row has the same messages. Every removed row is named in `OUT.removed.jsonl` with file,
line and reason. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from minillm import log
from minillm.data.files import REMOVED_SUFFIX, RowReport, find_files, read_rows
from minillm.data.formats import Message, Unusable, conversation_of
from minillm.log import UserError

DUPLICATE = "the same messages as an earlier row"


@dataclass(frozen=True)
class CleanSettings:
    """Settings of `minillm data clean`."""

    input: str = field(metadata={"help": "conversations: file, folder or glob", "positional": True})
    output: str = field(metadata={"help": "jsonl file for the conversations that are kept"})
    min_chars: int = field(default=6, metadata={"help": "fewest characters of an answer, white space apart"})
    report: str = field(default="", metadata={"help": "JSON file for the counts; none by default"})


@dataclass(frozen=True)
class CleanReport:
    """How many rows were kept and removed, and how many for which reason."""

    kept: int
    removed: int
    reasons: dict[str, int]


def run(settings: CleanSettings) -> None:
    """Cleans as the settings say and prints "Processing complete: kept N, removed M" on stdout."""
    import orjson

    result = clean_conversations(Path(settings.input), Path(settings.output), min_chars=settings.min_chars)
    if settings.report:
        content = {"input": settings.input, "output": settings.output, "min_chars": settings.min_chars}
        content |= {"kept": result.kept, "removed": result.removed, "reasons": result.reasons}
        with written_whole([Path(settings.report)]) as (stream,):
            stream.write(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    print(f"Processing complete: kept {result.kept}, removed {result.removed}", flush=True)


def clean_conversations(input: Path, output: Path, *, min_chars: int = 6) -> CleanReport:
    """Writes the fit conversations of `input` to `output`, in order, as rows {"conversations": [...]}.

    input: file, folder or glob in any conversation form. min_chars: fewest characters, white space apart, of
    each answer. Removed rows are named in `<output>.removed.jsonl`. Both files appear whole or not at all.
    Raises UserError when the input cannot be read, no row is fit, or the output cannot be written.
    """
    import orjson

    _refuse_input_as_output(input, output)
    removed_path = output.with_name(output.name + REMOVED_SUFFIX)
    seen: dict[bytes, str] = {}
    with written_whole([output, removed_path]) as (kept, removed):
        report = _Removals(str(input), stream=removed)
        for row in read_rows(input, report):
            try:
                messages = conversation_of(row.value)
                _check_lengths(messages, min_chars)
            except Unusable as reason:
                report.add(str(reason), row.file, row.line)
                continue
            key = hashlib.blake2b(orjson.dumps(messages), digest_size=16).digest()
            first = seen.setdefault(key, f"{row.file}:{row.line}")
            if first != f"{row.file}:{row.line}":
                report.add(DUPLICATE, row.file, row.line, of=first)
                continue
            report.used += 1
            kept.write(orjson.dumps({"conversations": messages}, option=orjson.OPT_APPEND_NEWLINE))
        report.log()
        if not report.used:
            raise UserError(
                f"{input}: none of the {report.unusable:,} rows is a conversation fit for training, so "
                f"{output} is not written. The reasons are listed above."
            )
    log.info(f"[data] kept rows: {output}; removed rows, with reasons: {removed_path}")
    return CleanReport(report.used, report.unusable, report.counts())


@dataclass
class _Removals(RowReport):
    """A report that also writes each removed row to the side file."""

    stream: IO[bytes] | None = None

    def add(self, reason: str, file: str, line: int, **more: str) -> None:
        import orjson

        super().add(reason, file, line)
        assert self.stream is not None
        entry: dict[str, Any] = {"file": file, "line": line, "reason": reason, **more}
        self.stream.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))


def _check_lengths(messages: list[Message], min_chars: int) -> None:
    for message in messages:
        if message["role"] == "assistant" and len("".join(message["content"].split())) < min_chars:
            raise Unusable(f"answer shorter than {min_chars} characters")


def _refuse_input_as_output(input: Path, output: Path) -> None:
    target = output.resolve()
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file in it.")
    inside = input.is_dir() and input.resolve() in target.parents
    if inside or target in (file.resolve() for file in find_files(input)):
        raise UserError(f"--output {output} is part of the input {input}. Inputs stay as they are.")


@contextmanager
def written_whole(paths: list[Path]) -> Iterator[tuple[IO[bytes], ...]]:
    """Streams to new files that take the names `paths` together, once all is written; otherwise none does.

    Raises UserError when they cannot be written.
    """
    beside = [path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp") for path in paths]
    streams: list[IO[bytes]] = []
    try:
        for path in beside:
            path.parent.mkdir(parents=True, exist_ok=True)
            streams.append(open(path, "wb"))  # noqa: SIM115
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
        for stream in streams:
            stream.close()
        for temporary in beside:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
