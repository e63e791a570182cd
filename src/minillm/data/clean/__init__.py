"""`minillm data clean INPUT --output OUT`: keeps the conversations that are fit for training.

Each row is held to rules by itself (rows.py and what it imports), then to the rows before it (duplicates.py). Every
removed row is named in `OUT.removed.jsonl` with file, line and reason. The same input and settings give the same
bytes, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minillm import log
from minillm.config import UsageError
from minillm.data.clean import contamination, language
from minillm.data.clean.output import Rows, temporary_beside, written_whole
from minillm.data.clean.rows import Checked, Rules
from minillm.data.clean.workers import check_file, checked, processes_for, read_chunks
from minillm.data.executors import LOCAL, Again, ExecutorSettings, FileTasks, folder_for, run_tasks
from minillm.data.files import REMOVED_SUFFIX, find_files
from minillm.data.formats import EXPECTED
from minillm.log import UserError

NEAR_DUPLICATES = ("off", "same", "similar")


@dataclass(frozen=True)
class CleanSettings:
    """Settings of `minillm data clean`."""

    input: str = field(metadata={"help": "conversations: file, folder or glob", "positional": True})
    output: str = field(metadata={"help": "jsonl file for the conversations that are kept"})
    report: str = field(default="", metadata={"help": "JSON file for the counts; none by default"})
    min_chars: int = field(default=6, metadata={"help": "fewest characters of an answer, white space apart", "min": 1})
    max_chars: int = field(default=32_768, metadata={"help": "most characters of a conversation", "min": 1})
    languages: str = field(
        default="", metadata={"help": "languages to keep, such as en,zh; by default all are, and counted"}
    )
    near_duplicates: str = field(
        default="similar",
        metadata={
            "help": "what counts as a repeated row: the same messages (off), also the same letters and digits "
            "(same), also nearly the same text (similar)",
            "choices": NEAR_DUPLICATES,
        },
    )
    mask_pii: bool = field(
        default=False,
        metadata={"help": "mask e-mail and IP addresses, telephone, identity card and credit card numbers"},
    )
    decontaminate: tuple[str, ...] = field(
        default=(),
        metadata={"help": "evaluation files, none by default: rows with 13 words in a row in common are removed"},
    )
    num_workers: int = field(
        default=-1, metadata={"help": "processes (default: one a core for large input, otherwise this one alone)"}
    )


@dataclass(frozen=True)
class CleanReport:
    """How many rows were kept and removed, how many for which reason, the languages of the conversations that passed
    the rules, and how much personal data was masked."""

    kept: int
    removed: int
    reasons: dict[str, int]
    languages: dict[str, int]
    masked: dict[str, int]


def run(settings: CleanSettings, executor: ExecutorSettings = LOCAL) -> None:
    """Cleans as the settings say and prints "Processing complete: kept N, removed M" on stdout; where Slurm does the
    work, its last job prints it."""
    if executor.executor == "local":
        result = clean_conversations(settings)
    else:
        tasks = file_tasks(settings)
        if not run_tasks(tasks, executor, Again(run, settings, executor)):
            return
        result = clean_conversations(settings, tasks.results())
        tasks.remove()
    print(f"Processing complete: kept {result.kept}, removed {result.removed}", flush=True)


def file_tasks(settings: CleanSettings) -> FileTasks:
    """The checking of each input file by itself, whose results `clean_conversations` takes. Raises UserError."""
    input, output = Path(settings.input), Path(settings.output)
    _refuse_input_as_output(input, _outputs(settings))
    files, rules = find_files(input), _rules(settings)
    identity = {
        **vars(rules),
        "evaluation": hashlib.sha256(rules.evaluation.tobytes()).hexdigest(),
        "files": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
    }
    return FileTasks(check_file, files, (rules,), folder_for(output, identity))


def clean_conversations(settings: CleanSettings, chunks: Iterator[Checked] | None = None) -> CleanReport:
    """Writes the fit conversations of the input, in order, as rows {"conversations": [...]}; removed rows into
    `<output>.removed.jsonl`; counts into the report, where one is wanted. The files appear whole or not at all.
    `chunks`: the rows of the input where they have been checked already.

    Raises UserError when the input cannot be read, no row is fit, a file cannot be written or a package is missing.
    """
    input, output = Path(settings.input), Path(settings.output)
    paths = _outputs(settings)
    _refuse_input_as_output(input, paths)
    if chunks is None:
        chunks = checked(read_chunks(input), _rules(settings), processes_for(input, settings.num_workers))
    with written_whole(paths) as streams, ExitStack() as stack:
        rows = Rows(str(input), streams[0], streams[1], settings.near_duplicates)
        if settings.near_duplicates == "similar":
            rows.wait_in(stack.enter_context(temporary_beside(output)))
        with log.progress(None, "[data] cleaning rows") as bar:
            for chunk in chunks:
                rows.add(chunk)
                bar.advance(len(chunk.rows))
        rows.finish()
        rows.report.log()
        if not rows.report.used:
            raise UserError(
                f"{input}: none of the {rows.report.unusable:,} rows is a conversation fit for training, so "
                f"{output} is not written. The reasons are listed above. A conversation looks like this: "
                f"{EXPECTED['sft'][0]}"
            )
        result = CleanReport(
            rows.report.used,
            rows.report.unusable,
            rows.report.counts(),
            dict(sorted(rows.languages.items(), key=lambda item: (-item[1], item[0]))),
            dict(sorted(rows.masked.items())),
        )
        if settings.report:
            streams[2].write(_as_json(settings, result))
    log.info(f"[data] kept rows: {paths[0]}; removed rows, with reasons: {paths[1]}")
    return result


def _outputs(settings: CleanSettings) -> list[Path]:
    """The files that are written: kept rows, removed rows and, where it is wanted, the report."""
    output = Path(settings.output)
    paths = [output, output.with_name(output.name + REMOVED_SUFFIX)]
    return [*paths, Path(settings.report)] if settings.report else paths


def _rules(settings: CleanSettings) -> Rules:
    languages = tuple(part.strip().lower() for part in settings.languages.split(",") if part.strip())
    wrong = [part for part in languages if len(part) != 2 or not part.isalpha()]
    if wrong:
        raise UsageError(f"--languages: {wrong[0]!r} is not a code of two letters such as en or zh")
    if settings.min_chars > settings.max_chars:
        raise UsageError(f"--min_chars is {settings.min_chars}: it must not be more than --max_chars")
    if languages:
        language.check_model()
    evaluation = np.zeros(0, dtype=np.uint64)
    if settings.decontaminate:
        evaluation = contamination.evaluation_ngrams(settings.decontaminate)
        log.info(f"[data] {len(evaluation):,} n-grams of {', '.join(settings.decontaminate)} must not occur")
    return Rules(
        min_chars=settings.min_chars,
        max_chars=settings.max_chars,
        languages=languages,
        near_duplicates=settings.near_duplicates,
        mask_pii=settings.mask_pii,
        evaluation=evaluation,
    )


def _as_json(settings: CleanSettings, result: CleanReport) -> bytes:
    import orjson

    content = {
        "input": settings.input,
        "output": settings.output,
        "min_chars": settings.min_chars,
        "max_chars": settings.max_chars,
        "near_duplicates": settings.near_duplicates,
        "wanted_languages": settings.languages,
        "mask_pii": settings.mask_pii,
        "decontaminate": list(settings.decontaminate),
        "kept": result.kept,
        "removed": result.removed,
        "reasons": result.reasons,
        "languages": result.languages,
        "masked": result.masked,
    }
    return orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _refuse_input_as_output(input: Path, paths: list[Path]) -> None:
    files = {file.resolve() for file in find_files(input)}
    for flag, path in zip(("output", "output", "report"), paths, strict=False):
        if path.is_dir():
            raise UserError(f"--{flag} {path} is a folder; name a file in it.")
        target = path.resolve()
        if target in files or (input.is_dir() and input.resolve() in target.parents):
            raise UserError(f"--{flag} {path} is part of the input {input}. Inputs stay as they are.")
