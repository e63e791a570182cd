"""`minillm data prepare-preferences`: pairs, labelled answers or prompts with answers, of any form, as one file of rows
that are all written alike. What could not be used is in a side file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from minillm import log
from minillm.config import UsageError
from minillm.data.files import PREPARED_SUFFIX, Row, RowReport, find_files
from minillm.data.formats import EXPECTED, stage_of, understood
from minillm.data.preferences import labelled_of, pair_of, prompt_of
from minillm.data.preparing import input_identity, input_rows, is_held_out, on_hub
from minillm.log import UserError

GENERATOR = "minillm data prepare-preferences"
FIRST_ROWS = 100  # that tell the form


class Form(NamedTuple):
    """A form of output: the stage whose data it is, what the rows are called, and what becomes of one (raises
    Unusable)."""

    stage: str
    rows: str
    written: Callable[[dict[str, Any]], dict[str, Any]]


FORMS = {
    "pairs": Form("dpo", "pairs", lambda row: dict(zip(("chosen", "rejected"), pair_of(row), strict=True))),
    "kto": Form("kto", "labelled answers", lambda row: dict(zip(("messages", "label"), labelled_of(row), strict=True))),
    "prompts": Form("rl", "prompts", lambda row: dict(zip(("prompt", "answer"), prompt_of(row), strict=True))),
}


@dataclass(frozen=True)
class PreparePreferencesSettings:
    """Prepare preference data"""

    input: str = field(metadata={"help": "file, folder or glob (json, jsonl, parquet), or the name of a hub dataset"})
    output: str = field(metadata={"help": "jsonl file for the rows"})
    form: str = field(
        default="auto",
        metadata={"help": "what the rows are (default: what the first ones look like)", "choices": ("auto", *FORMS)},
    )
    val_fraction: float = field(
        default=0.0,
        metadata={"help": "share of the rows that is held out, in OUTPUT_val.jsonl", "min": 0.0, "max": 0.5},
    )
    split: str = field(default="train", metadata={"help": "of a hub dataset"})
    seed: int = field(default=42, metadata={"help": "which rows are held out", "min": 0})


def run(settings: PreparePreferencesSettings) -> None:
    """Prepare as the settings say.

    Raises:
        UsageError: --output is no .jsonl file, or part of the input.
        UserError: the input cannot be read, no row is usable, or something else stands where the output is to be.
    """
    output = Path(settings.output)
    if output.suffix != ".jsonl":
        raise UsageError(f"--output {output}: give a name that ends in .jsonl")
    train, val, side = output, output.with_name(f"{output.stem}_val.jsonl"), side_file(output)
    _refuse_input_as_output(settings, {"--output": train, "the held-out part": val})
    fingerprint = _fingerprint(settings)
    known = _known(train, val, bool(settings.val_fraction))
    complete = all(output.with_name(name).is_file() for name in known.get("files", {}))
    if complete and known.get("fingerprint") == fingerprint:
        log.info(f"[data] {output} is prepared from just this: nothing to do")
        return
    record = _write(settings, fingerprint, train, val, side)
    if val.name in known.get("files", {}) and val.name not in record["files"]:
        val.unlink(missing_ok=True)  # of an earlier run: it would not belong to these rows
    held_out = f", {record['val']:,} held out in {val}" if record["val"] else ""
    rows = FORMS[record["form"]].rows
    log.info(f"[data] {output}: {record['train']:,} {rows}{held_out}; what was left out: {side}")


def side_file(output: Path) -> Path:
    """The JSON beside a prepared file that says what it was made of and what was left out."""
    return output.with_name(output.name + PREPARED_SUFFIX)


def _refuse_input_as_output(settings: PreparePreferencesSettings, outputs: dict[str, Path]) -> None:
    if on_hub(settings.input):
        return
    files = {file.resolve() for file in find_files(settings.input)}
    folder = Path(settings.input).resolve()
    for name, path in outputs.items():
        if path.resolve() in files or folder.is_dir() and folder in path.resolve().parents:
            raise UsageError(f"{name} ({path}) is part of the input {settings.input}: inputs stay as they are")


def _fingerprint(settings: PreparePreferencesSettings) -> str:
    values = {name: value for name, value in asdict(settings).items() if name not in ("input", "output")}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    digest.update(input_identity(settings.input).encode())
    return digest.hexdigest()


def _known(train: Path, val: Path, with_val: bool) -> dict[str, Any]:
    """The side file of an earlier run, {} where there was none. Raises UserError for outputs that are there and are
    not what was written then: they may be somebody's work."""
    from minillm.data.store import file_sha256

    try:
        record = json.loads(side_file(train).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    ours = isinstance(record, dict) and record.get("generator") == GENERATOR
    known: dict[str, Any] = record if ours else {}
    files = known.get("files", {})
    for path in [train, val] if with_val or val.name in files else [train]:
        if path.exists() and (path.is_dir() or file_sha256(path) != files.get(path.name)):
            raise UserError(f"{path} is there and is not what {GENERATOR} wrote: give another --output")
    return known


def _write(
    settings: PreparePreferencesSettings, fingerprint: str, train: Path, val: Path, side: Path
) -> dict[str, Any]:
    """The rows, and what the side file says about them."""
    import orjson

    from minillm.data.clean.output import written_whole

    report = RowReport(settings.input)
    form, rows = _form_and_rows(settings, report)
    stage, _, written = FORMS[form]
    counts = {train: 0, val: 0}
    hashes = {train: hashlib.sha256(), val: hashlib.sha256()}
    outputs = [train, val] if settings.val_fraction else [train]
    with written_whole([*outputs, side]) as (*streams, side_stream):
        to = dict(zip(outputs, streams, strict=True))
        for value in understood(rows, report, stage, lambda row: written(row.value)):
            asked = next(message["content"] for message in next(iter(value.values())) if message["role"] == "user")
            path = val if is_held_out(asked, settings.val_fraction, settings.seed) else train
            line = orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
            to[path].write(line)
            hashes[path].update(line)
            counts[path] += 1
        report.log()
        if not counts[train]:
            raise UserError(f"{settings.input}: all {report.used:,} rows are held out. Give a smaller --val_fraction.")
        record = {
            "generator": GENERATOR, "settings": asdict(settings), "form": form,
            "train": counts[train], "val": counts[val],
            "rows": {"used": report.used, "unusable": report.counts(), "unusable_places": report.places},
            "files": {path.name: hashes[path].hexdigest() for path in outputs if counts[path]},
            "fingerprint": fingerprint,
        }  # fmt: skip
        side_stream.write(json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n")
    if settings.val_fraction and not counts[val]:
        val.unlink()
        log.warn(f"none of {report.used:,} rows was held out: too few for --val_fraction {settings.val_fraction}")
    return record


def _form_and_rows(settings: PreparePreferencesSettings, report: RowReport) -> tuple[str, Iterator[Row]]:
    """(the form that is wanted, or that most of the first rows have, all rows). Raises UserError when the first rows
    have none."""
    rows = input_rows(settings.input, settings.split, report)
    if settings.form != "auto":
        return settings.form, rows
    first = list(islice(rows, FIRST_ROWS))
    forms = {form.stage: name for name, form in FORMS.items()}
    seen = Counter(stage_of(row.value) for row in first)
    stages = sorted(forms, key=lambda stage: -seen[stage])
    if seen[stages[0]]:
        return forms[stages[0]], chain(first, rows)
    lines = [f"{settings.input}: no pairs, labelled answers or prompts with answers among the first {len(first)} rows."]
    lines += [f"  {count:,} x {reason}: {report.places[reason][0]}" for reason, count in report.counts().items()]
    lines += ["The first rows are:", *(f"  {sample}" for sample in report.samples), "Expected is one of:"]
    lines += [f"  {row}" for stage in forms for row in EXPECTED[stage]]
    lines += [f"These rows look like data for `minillm {stage}`." for stage in ("sft", "pretrain") if seen[stage]][:1]
    raise UserError("\n".join(lines))
