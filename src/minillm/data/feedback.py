"""Labelled answers (KTO) and prompts with an answer to check (reinforcement learning), as rows that a method reads.

They are tokenized when they are opened and stay in memory: there are thousands of them, not millions.
Shapes: B batch, L length, N rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minillm.data.batches import MIN_CUT_ANSWER, PAIR_MULTIPLE, Batch
from minillm.data.encode import READERS, chunks, encoded
from minillm.data.files import RowReport
from minillm.data.order import checked_indices
from minillm.data.preferences import CheckablePrompt, LabelledAnswer
from minillm.data.store import TokenStore
from minillm.log import UserError

if TYPE_CHECKING:
    from minillm.text.tokenizer import Tokenizer

Tokens = tuple[np.ndarray, np.ndarray]  # ids and mask
OTHER_TRIALS = 8
NO_ROOM = "prompt leaves no room for an answer in max_seq_len"


@dataclass(frozen=True)
class LabelBatch:
    """Conversations [B, L] of which the last answer is trained, and labels bool [B]: is that answer wanted? In
    `mismatched` [B, another L] the same prompts end with the answer to another one: KTO's baseline reads them."""

    answers: Batch
    labels: np.ndarray
    mismatched: Batch

    @property
    def sample_ids(self) -> np.ndarray:
        return self.answers.sample_ids


@dataclass(frozen=True)
class PromptBatch:
    """B prompts as token ids, up to where an answer begins: what a family's `generate` takes; the final answer that
    each should come to; sample_ids: int64 [B]."""

    prompts: list[list[int]]
    answers: list[str]
    sample_ids: np.ndarray


class LabelledAnswers:
    """Answers with their labels, one conversation a row, padded to the longest of the batch.

    An answer that reaches beyond max_seq_len is cut there and counted; a row of which less than 16 tokens of the
    answer would remain is dropped and counted. Raises UserError when none fits.
    """

    row_size = 1.0

    def __init__(
        self, store: TokenStore, labels: list[bool], max_seq_len: int, pad_id: int, *, hide_padding: bool = False
    ) -> None:
        assert store.mask is not None
        self.store, self.max_seq_len, self.pad_id, self.hide_padding = store, max_seq_len, pad_id, hide_padding
        self.bytes_per_token = store.bytes_per_token
        full = np.diff(store.offsets)
        self.lengths = np.minimum(full, max_seq_len)
        cut = full > max_seq_len
        fits: np.ndarray = np.ones(len(full), dtype=np.bool_)
        for row in np.flatnonzero(cut).tolist():
            start = store.offsets[row]
            fits[row] = store.mask[start : start + max_seq_len].sum() >= MIN_CUT_ANSWER
        self.kept = np.flatnonzero(fits)
        self.truncated = int((cut & fits).sum())
        self.labels = np.array(labels, dtype=np.bool_)[self.kept]
        self.report = _fitting(store, fits, max_seq_len)

    def __len__(self) -> int:
        return len(self.kept)

    def rows(self, indices: np.ndarray) -> LabelBatch:
        """Rows of the given indices [B]; L is a multiple of 16, but not more than max_seq_len."""
        indices = checked_indices(indices, len(self))
        own = [self._prompt_and_answer(row) for row in indices.tolist()]
        others = [self._prompt_and_answer(self._other(row))[1] for row in indices.tolist()]
        answers = self._batch([(*prompt, *answer) for prompt, answer in own], indices)
        mismatched = self._batch([(*prompt, *answer) for (prompt, _), answer in zip(own, others)], indices)
        return LabelBatch(answers, self.labels[indices], mismatched)

    def _prompt_and_answer(self, row: int) -> tuple[Tokens, Tokens]:
        """Tokens and mask [L] of a row up to its first trained token, and from there on."""
        assert self.store.mask is not None
        start = int(self.store.offsets[self.kept[row]])
        end = start + int(self.lengths[self.kept[row]])
        middle = start + int(np.argmax(self.store.mask[start:end]))
        tokens, mask = self.store.tokens, self.store.mask
        return (tokens[start:middle], mask[start:middle]), (tokens[middle:end], mask[middle:end])

    def _other(self, row: int) -> int:
        """A row with another prompt that seems random and is always the same; any other row where few trials find
        none, and the row itself where it is the only one."""
        other, (prompt, _) = row, self._prompt_and_answer(row)
        for trial in range(1, OTHER_TRIALS + 1):
            if len(self) > 1:
                scattered = ((row + 1) * trial * 0x9E3779B97F4A7C15) % 2**64 >> 32
                other = (row + 1 + scattered % (len(self) - 1)) % len(self)
            if not np.array_equal(prompt[0], self._prompt_and_answer(other)[0][0]):
                break
        return other

    def _batch(self, rows: list[tuple[np.ndarray, ...]], indices: np.ndarray) -> Batch:
        """Rows of (prompt tokens, prompt mask, answer tokens, answer mask), cut at max_seq_len and padded."""
        texts = [np.concatenate(row[::2])[: self.max_seq_len] for row in rows]
        lengths = np.array([len(text) for text in texts])
        width = min(-(-int(lengths.max(initial=1)) // PAIR_MULTIPLE) * PAIR_MULTIPLE, self.max_seq_len)
        tokens = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.bool_)
        for place, (text, row) in enumerate(zip(texts, rows, strict=True)):
            tokens[place, : len(text)] = text
            mask[place, : len(text)] = np.concatenate(row[1::2])[: len(text)]
        segments = None
        if self.hide_padding:
            segments = np.where(np.arange(width) < lengths[:, None], 0, -1).astype(np.int32)
        return Batch(tokens, mask, None, segments, indices)

    def describe(self) -> str:
        wanted = int(self.labels.sum())
        lengths = self.lengths[self.kept]
        parts = [f"{len(self):,} labelled answers ({wanted:,} true, {len(self) - wanted:,} false)"]
        parts += [f"{int(lengths.sum()):,} tokens", f"longest {int(lengths.max()):,}"]
        if self.truncated:
            parts.append(f"{self.truncated:,} with an answer cut at max_seq_len {self.max_seq_len}")
        return ", ".join(parts + _left_out(self.report))


class CheckablePrompts:
    """Prompts with the final answer that each should come to. One that leaves less than `room` tokens of max_seq_len
    for an answer is dropped and counted. Raises UserError when none fits."""

    row_size = 1.0
    bytes_per_token = 0.0  # nothing is trained before there are answers

    def __init__(self, store: TokenStore, answers: list[str], max_seq_len: int, room: int = 1) -> None:
        self.store, self.max_seq_len = store, max_seq_len
        fits = np.diff(store.offsets) + room <= max_seq_len
        self.kept = np.flatnonzero(fits)
        self.answers = [answers[row] for row in self.kept.tolist()]
        self.report = _fitting(store, fits, max_seq_len)

    def __len__(self) -> int:
        return len(self.kept)

    def rows(self, indices: np.ndarray) -> PromptBatch:
        """Prompts of the given indices [B]."""
        indices = checked_indices(indices, len(self))
        offsets = self.store.offsets
        prompts = [self.store.tokens[offsets[row] : offsets[row + 1]].tolist() for row in self.kept[indices].tolist()]
        return PromptBatch(prompts, [self.answers[index] for index in indices.tolist()], indices)

    def describe(self) -> str:
        lengths = np.diff(self.store.offsets)[self.kept]
        parts = [f"{len(self):,} prompts with {len(set(self.answers)):,} different answers"]
        parts += [f"{int(lengths.sum()):,} tokens", f"longest {int(lengths.max()):,}"]
        return ", ".join(parts + _left_out(self.report))


def open_feedback(
    kind: str, path: str | Path, tokenizer: Tokenizer, *, max_seq_len: int, hide_padding: bool = False, room: int = 1
) -> LabelledAnswers | CheckablePrompts:
    """The rows of `path`, "labels" or "prompts", tokenized now. `hide_padding`: padding is a segment of its own, for
    models that look ahead. `room`: tokens that a prompt must leave for its answer.

    What was not usable is printed. Raises UserError for data that is missing, damaged or of another form.
    """
    values: list[Any] = []
    store = _tokenized(path, tokenizer, kind, values)
    if kind == "labels":
        return LabelledAnswers(store, values, max_seq_len, tokenizer.pad_id, hide_padding=hide_padding)
    return CheckablePrompts(store, values, max_seq_len, room)


def _tokenized(path: str | Path, tokenizer: Tokenizer, kind: str, values: list[Any]) -> TokenStore:
    """A store in memory; `values` collects the label or answer of each row."""
    report = RowReport(str(path))
    files: dict[str, int] = {}

    def noted(rows: Iterable[LabelledAnswer | CheckablePrompt]) -> Iterator[LabelledAnswer | CheckablePrompt]:
        for row in rows:
            values.append(row.label if isinstance(row, LabelledAnswer) else row.answer)
            yield row

    dtype = "uint16" if tokenizer.vocab_size <= 65_536 else "uint32"
    parts = list(encoded(chunks(noted(READERS[kind](path, report)), kind, files), kind, tokenizer, dtype, 0))
    trained = sum(part.counts.trained_tokens for part in parts)
    if kind == "labels" and not trained:
        raise UserError(
            f"{path}: no token of any answer would be trained. The tokenizer's chat template does not mark answers."
        )
    return TokenStore(
        folder=Path(path),
        kind=kind,
        tokens=np.concatenate([part.tokens for part in parts]),
        mask=np.concatenate([part.mask for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]).astype(np.int64),
        places=np.concatenate([part.places for part in parts]),
        files=tuple(files),
        bytes_per_token=sum(part.counts.text_bytes for part in parts) / max(trained, 1),
        report=report,
    )


def _fitting(store: TokenStore, fits: np.ndarray, max_seq_len: int) -> RowReport:
    """The store's report with the rows that do not fit (bool [N]) added, printed. Raises UserError when none fits."""
    report = RowReport.from_dict(store.report.to_dict())
    for row in np.flatnonzero(~fits).tolist():
        file, _, line = store.place(row).rpartition(":")
        report.used -= 1
        report.add(NO_ROOM, file, int(line))
    report.log()
    if not report.used:
        raise UserError(
            f"{report.source}: no row fits into max_seq_len {max_seq_len}; the shortest has "
            f"{np.diff(store.offsets).min():,} tokens. Give a larger --max_seq_len."
        )
    return report


def _left_out(report: RowReport) -> list[str]:
    return [f"{report.unusable:,} rows not used"] if report.unusable else []
