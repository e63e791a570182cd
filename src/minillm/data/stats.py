"""`minillm data stats PATH`: what training would read, in numbers, as JSON. `data inspect` shows them to people."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from minillm.data.batches import PackedConversations, PreferencePairs, TextBlocks, open_dataset
from minillm.data.feedback import CheckablePrompts, LabelledAnswers, open_feedback
from minillm.data.files import RowReport, read_rows
from minillm.data.formats import stage_of
from minillm.data.store import TokenStore, is_prepared
from minillm.log import UserError
from minillm.stages import STAGES, canonical_stage

if TYPE_CHECKING:
    from minillm.text.tokenizer import Tokenizer

FEEDBACK_KINDS = {"kto": "labels", "rl": "prompts"}
CHOICES = ("auto", "pretrain", "sft", "dpo", *FEEDBACK_KINDS)
HISTOGRAM_BINS = 8
TOP_DUPLICATES = 5
SHOWN_TOKENS = 24  # of a duplicate
NUMBER = re.compile(r"[-+]?[0-9]*\.?[0-9]+")

Opened = TextBlocks | PackedConversations | PreferencePairs | LabelledAnswers | CheckablePrompts


@dataclass(frozen=True)
class StatsSettings:
    """Settings of `minillm data stats`."""

    path: str = field(metadata={"help": "data file, folder or glob", "positional": True})
    stage: str = field(
        default="auto",
        metadata={"help": "read it as data for this stage; auto: by its form", "choices": CHOICES},
    )
    tokenizer: str = field(default="", metadata={"help": "tokenizer folder or file; default: the shipped one"})
    max_seq_len: int = field(default=512, metadata={"help": "tokens in a row", "min": 2})


def run(settings: StatsSettings) -> None:
    """Print the numbers as JSON. Raises UserError as `open_dataset` does."""
    dataset, tokenizer, stage = opened(settings)
    numbers = {"path": settings.path, "stage": stage, "max_seq_len": settings.max_seq_len}
    print(json.dumps({**numbers, **measure(dataset, tokenizer)}, indent=2, ensure_ascii=False))


def opened(settings: StatsSettings) -> tuple[Opened, Tokenizer, str]:
    """(the rows, the tokenizer they are read with, the stage they are for)."""
    from minillm.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(settings.tokenizer or None)
    stage = detect_stage(settings.path) if settings.stage == "auto" else settings.stage
    if stage in FEEDBACK_KINDS:
        return (
            open_feedback(FEEDBACK_KINDS[stage], settings.path, tokenizer, max_seq_len=settings.max_seq_len),
            tokenizer,
            stage,
        )
    return open_dataset(stage, settings.path, tokenizer, max_seq_len=settings.max_seq_len), tokenizer, stage


def detect_stage(path: str) -> str:
    """The stage whose data this looks like, by its first rows. Raises UserError when none is recognised."""
    if is_prepared(path):
        return _prepared_stage(path)
    report = RowReport(path)
    for number, row in enumerate(read_rows(path, report)):
        stage = stage_of(row.value)
        if stage:
            return stage
        if number >= 100:
            break
    first = "".join(f"\n  {sample}" for sample in report.samples)
    raise UserError(f"{path}: the form of the rows is not recognised. Name one with --stage. First rows:{first}")


def _prepared_stage(path: str) -> str:
    import json
    from pathlib import Path

    meta = Path(path) / "meta.json"
    kind = json.loads(meta.read_text(encoding="utf-8")).get("kind") if meta.is_file() else "texts"
    return next(stage for stage in ("pretrain", "sft", "dpo") if STAGES[canonical_stage(stage)].data == kind)


def measure(dataset: Opened, tokenizer: Tokenizer) -> dict[str, Any]:
    """Counts, lengths, truncation, packing, duplicates, and rows that are not used with the reasons.

    A document is a text, a conversation, one side of a pair or a prompt. Shares are of documents (pairs for
    `truncated`); null where a kind has no such number.
    """
    store = dataset.store
    report = store.report if isinstance(dataset, TextBlocks) else dataset.report
    lengths = np.diff(store.offsets)
    truncated = kept = None
    if isinstance(dataset, PackedConversations):
        truncated, kept = dataset.truncated, len(dataset.documents)
    elif isinstance(dataset, PreferencePairs):
        truncated, kept = dataset.truncated, len(dataset.pairs)
    elif isinstance(dataset, LabelledAnswers):
        truncated, kept = dataset.truncated, len(dataset)
    return {
        "rows": len(dataset),
        "documents": store.documents,
        "tokens": int(lengths.sum()),
        "trained_tokens": len(store.tokens) if store.mask is None else int(np.count_nonzero(store.mask)),
        "bytes_per_trained_token": dataset.bytes_per_token or None,
        "document_tokens": {
            "shortest": int(lengths.min()), "median": float(np.median(lengths)), "mean": float(lengths.mean()),
            "longest": int(lengths.max()), "histogram": histogram(lengths),
        },
        "truncated": truncated,
        "truncated_share": None if truncated is None or not kept else truncated / kept,
        "packing_efficiency": dataset.packing_efficiency if isinstance(dataset, PackedConversations) else None,
        "labels": _labels(dataset.labels) if isinstance(dataset, LabelledAnswers) else None,
        "answers": _answers(dataset.answers) if isinstance(dataset, CheckablePrompts) else None,
        "duplicates": duplicates(store, tokenizer),
        "unusable": report.counts(),
        "unusable_places": report.places,
    }  # fmt: skip


def _labels(labels: np.ndarray) -> dict[str, int]:
    wanted = int(labels.sum())
    return {"true": wanted, "false": len(labels) - wanted}


def _answers(answers: list[str]) -> dict[str, int]:
    return {"distinct": len(set(answers)), "numbers": sum(NUMBER.fullmatch(answer) is not None for answer in answers)}


def histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """How many documents have at most so many tokens, in bins that double up to the longest."""
    exponents = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    low = max(int(exponents.min()), int(exponents.max()) - HISTOGRAM_BINS + 1)
    counts = np.bincount(np.maximum(exponents, low) - low)
    return [{"up_to": 2 ** (low + index), "documents": int(count)} for index, count in enumerate(counts)]


def duplicates(store: TokenStore, tokenizer: Tokenizer) -> dict[str, Any]:
    """Documents with the same tokens as an earlier one, and the most frequent of them with where they stand first."""
    first: dict[bytes, int] = {}
    counts: Counter[bytes] = Counter()
    for document in range(store.documents):
        start, end = store.offsets[document : document + 2]
        key = hashlib.blake2b(np.ascontiguousarray(store.tokens[start:end]).tobytes(), digest_size=12).digest()
        if first.setdefault(key, document) != document:
            counts[key] += 1
    top = []
    for key, count in counts.most_common(TOP_DUPLICATES):
        start, end = store.offsets[first[key] : first[key] + 2]
        text = tokenizer.decode(store.tokens[start : min(end, start + SHOWN_TOKENS)].tolist())
        top.append({"times": count + 1, "first": store.place(first[key]), "text": text})
    return {"documents": counts.total(), "share": counts.total() / max(store.documents, 1), "most_frequent": top}
