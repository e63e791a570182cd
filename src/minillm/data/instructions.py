"""`minillm data prepare-instructions`: instruction data of any form as one folder that fine-tuning reads.

The folder holds the conversations (train.jsonl, val.jsonl), the tokenizer with the chosen chat template, and the same
as tensors for other programs. `minillm sft --data_dir FOLDER` finds all of it. N examples, L max_seq_len.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm import log
from minillm.atomic import put_in_place
from minillm.data.files import RowReport
from minillm.data.formats import Message, Unusable, unlabelled
from minillm.data.preparing import input_identity, input_rows, is_held_out
from minillm.log import UserError

if TYPE_CHECKING:
    from minillm.text.tokenizer import Tokenizer

GENERATOR = "minillm data prepare-instructions"
FORMATS = {
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
}
SIDES = ("train", "val")


@dataclass(frozen=True)
class PrepareInstructionsSettings:
    """Prepare instruction data"""

    input: str = field(metadata={"help": "file, folder or glob (json, jsonl, parquet), or the name of a hub dataset"})
    output_dir: str = field(metadata={"help": "folder for what fine-tuning reads"})
    format: str = field(
        default="auto", metadata={"help": "form of the rows (default: each as it is)", "choices": ("auto", *FORMATS)}
    )
    template: str = field(
        default="chatml",
        metadata={
            "help": "chatml (with an imported model's tokenizer: its own), or classic: ### Instruction / ### Input / "
            "### Response",
            "choices": ("chatml", "classic"),
        },
    )
    max_seq_len: int = field(default=512, metadata={"help": "tokens of an example at most", "min": 8})
    val_fraction: float = field(
        default=0.05, metadata={"help": "share of the examples that is held out", "min": 0.0, "max": 0.5}
    )
    tokenizer: str = field(
        default="", metadata={"help": "tokenizer.json or its folder, a checkpoint's say (default: the shipped one)"}
    )
    split: str = field(default="train", metadata={"help": "of a hub dataset"})
    seed: int = field(default=42, metadata={"help": "which examples are held out", "min": 0})


def run(settings: PrepareInstructionsSettings) -> None:
    """Prepare as the settings say.

    Raises:
        UserError: the input cannot be read, no row is usable, or the folder holds something else.
    """
    from minillm.text.chat import TEMPLATES
    from minillm.text.roles import OURS
    from minillm.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(settings.tokenizer or None)
    if settings.template != "chatml" or tokenizer.roles == OURS:
        tokenizer = tokenizer.with_template(TEMPLATES[settings.template])
    folder = Path(settings.output_dir)
    fingerprint = _fingerprint(settings, tokenizer)
    known = _known(folder)
    if known.get("fingerprint") == fingerprint:
        log.info(f"[data] {folder} is prepared from just this: nothing to do")
        return
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.building")
    try:
        beside.mkdir(parents=True)
        config = _prepare(settings, tokenizer, beside)
        config["fingerprint"] = fingerprint
        (beside / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        put_in_place(beside, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    train, val = (config[side] for side in SIDES)
    log.info(
        f"[data] {folder}: {train['examples']:,} examples to train on ({train['trained_tokens']:,} of "
        f"{train['tokens']:,} tokens are answers), {val['examples']:,} held out"
    )


def _fingerprint(settings: PrepareInstructionsSettings, tokenizer: Tokenizer) -> str:
    """Of the input's bytes (a hub's name and split), the tokenizer with its template, and the settings."""
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    values = {
        name: value for name, value in asdict(settings).items() if name not in ("output_dir", "input", "tokenizer")
    }
    digest.update(json.dumps(values, sort_keys=True).encode())
    digest.update(input_identity(settings.input).encode())
    return digest.hexdigest()


def _known(folder: Path) -> dict[str, Any]:
    """The config.json of a folder made here. Raises UserError for a folder that holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return {}
    if is_prepared_instructions(folder):
        found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return found
    raise UserError(f"{folder} is there and was not made by {GENERATOR}: give another --output_dir")


def is_prepared_instructions(folder: Path) -> bool:
    """Is this a folder that prepare-instructions made?"""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("generator") == GENERATOR


def part_of(path: str, part: str) -> str:
    """The file of one part ("train" or "val") of a folder that prepare-instructions made, "" where it has none; any
    other path stays what it is."""
    if not path or not is_prepared_instructions(Path(path)):
        return path
    file = Path(path) / f"{part}.jsonl"
    return str(file) if file.is_file() else ""


def _prepare(settings: PrepareInstructionsSettings, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Fill the folder; what config.json is to say."""
    from minillm.data.store import file_sha256

    report = RowReport(settings.input)
    sources = _write_conversations(settings, report, folder)
    tokenizer.save(folder)
    config: dict[str, Any] = {"generator": GENERATOR, "settings": asdict(settings)}
    for side in SIDES:
        config[side] = _write_tensors(folder, side, tokenizer, settings.max_seq_len, sources[side], report)
    report.log()
    config["rows"] = {"used": report.used, "unusable": report.counts()}
    config["files"] = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    return config


def _write_conversations(
    settings: PrepareInstructionsSettings, report: RowReport, folder: Path
) -> dict[str, list[tuple[str, int]]]:
    """train.jsonl and val.jsonl; equal first questions are on one side, so that none is trained and held out.
    Returns the (file, line) that the rows of each came from."""
    import orjson

    sources: dict[str, list[tuple[str, int]]] = {side: [] for side in SIDES}
    streams = {side: open(folder / f"{side}.jsonl", "wb") for side in SIDES}  # noqa: SIM115
    try:
        for row in input_rows(settings.input, settings.split, report):
            try:
                messages = _messages(row.value, settings)
            except Unusable as reason:
                report.add(str(reason), row.file, row.line)
                continue
            report.used += 1
            question = next(message["content"] for message in messages if message["role"] == "user")
            side = "val" if is_held_out(question, settings.val_fraction, settings.seed) else "train"
            sources[side].append((row.file, row.line))
            value = {"conversations": messages, "source": f"{row.file}:{row.line}"}
            streams[side].write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))
    finally:
        for stream in streams.values():
            stream.close()
    if not sources["train"]:
        for line in report.lines():
            log.info(line)
        samples = "".join(f"\n  {sample}" for sample in report.samples)
        raise UserError(f"{settings.input}: no usable row among {report.used + report.unusable:,}.{samples}")
    if settings.val_fraction and not sources["val"]:
        log.warn(
            f"none of {len(sources['train']):,} examples was held out: "
            f"too few for --val_fraction {settings.val_fraction}"
        )
    return sources


def _messages(row: dict[str, Any], settings: PrepareInstructionsSettings) -> list[Message]:
    """The conversation of a row in the wanted form. Raises Unusable."""
    if settings.format != "auto":
        missing = [name for name in FORMATS[settings.format] if name not in row]
        if missing:
            raise Unusable(f"not in the form {settings.format}: no {missing[0]}")
    if settings.template == "classic" and "instruction" in row:
        given = row.get("input", row.get("context"))
        if isinstance(given, str) and given.strip() and isinstance(row["instruction"], str):
            row = {**row, "instruction": f"{row['instruction']}\n\n### Input:\n{given}", "input": None, "context": None}
    return unlabelled(row)


def _write_tensors(
    folder: Path, side: str, tokenizer: Tokenizer, max_seq_len: int, sources: list[tuple[str, int]], report: RowReport
) -> dict[str, Any]:
    """<side>_tokens.pt int64 [N, L] and <side>_masks.pt uint8 [N, L]: one example a row, padded; a long one ends with
    the last answer that fits, and one whose first exchange is too long is left out and counted."""
    import numpy as np
    import torch

    from minillm.data.batches import FIRST_EXCHANGE_TOO_LONG
    from minillm.data.packing import fit_to_row
    from minillm.data.store import build_store

    path = folder / f"{side}.jsonl"
    if not path.stat().st_size:
        path.unlink()
        return {"examples": 0, "tokens": 0, "trained_tokens": 0, "truncated": 0}
    store = build_store(path, tokenizer, kind="conversations")
    assert store.mask is not None
    lengths, truncated = fit_to_row(store.offsets, store.mask, max_seq_len)
    kept = np.flatnonzero(lengths)
    for document in np.flatnonzero(lengths == 0).tolist():
        report.used -= 1
        report.add(FIRST_EXCHANGE_TOO_LONG, *sources[document])
    if side == "train" and not len(kept):
        raise UserError(f"No first exchange fits into --max_seq_len {max_seq_len}: give a larger one")
    tokens = np.full((len(kept), max_seq_len), tokenizer.pad_id, dtype=np.int64)
    masks = np.zeros((len(kept), max_seq_len), dtype=np.uint8)
    for row, document in enumerate(kept.tolist()):
        part = slice(store.offsets[document], store.offsets[document] + lengths[document])
        tokens[row, : lengths[document]], masks[row, : lengths[document]] = store.tokens[part], store.mask[part]
    torch.save(torch.from_numpy(tokens), folder / f"{side}_tokens.pt")
    torch.save(torch.from_numpy(masks), folder / f"{side}_masks.pt")
    return {
        "examples": len(kept),
        "tokens": int(lengths.sum()),
        "trained_tokens": int(masks.sum()),
        "truncated": int((truncated & (lengths > 0)).sum()),
    }
