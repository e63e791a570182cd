"""Batches of rows as NumPy arrays.

A dataset is anything with a length and `rows(indices)`; which row comes when is a formula (`order.py`, `mixture.py`).
Shapes: B batch, L length.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minillm.data.files import RowReport
from minillm.data.order import Dataset as Dataset
from minillm.data.order import Subset as Subset
from minillm.data.order import checked_indices
from minillm.data.order import sample_indices as sample_indices
from minillm.data.order import split_rows as split_rows
from minillm.data.order import train_validation_split as train_validation_split
from minillm.data.packing import Packing, fit_to_row, pack_best_fit
from minillm.data.store import TokenStore, build_store, is_prepared, open_prepared
from minillm.log import UserError
from minillm.stages import STAGES, canonical_stage

if TYPE_CHECKING:
    from minillm.text.tokenizer import Tokenizer

PAIR_MULTIPLE = 16
FIRST_EXCHANGE_TOO_LONG = "first exchange longer than max_seq_len"
PAIR_TOO_LONG = "prompt leaves no room for the answers in max_seq_len"
MIN_CUT_ANSWER = 16


@dataclass(frozen=True)
class Batch:
    """Rows of tokens. Positions and segments are None where a row is one text from its first token on.

    tokens: int64 [B, L]; loss_mask: bool [B, L], True where a token is learned; positions: int64 [B, L],
    from 0 in every packed conversation; segments: int32 [B, L], which conversation of the row it belongs to,
    -1 = padding; sample_ids: int64 [B].
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray | None
    segments: np.ndarray | None
    sample_ids: np.ndarray


@dataclass(frozen=True)
class PairBatch:
    """Chosen and rejected of the same pairs, both [B, L] with the same L."""

    chosen: Batch
    rejected: Batch

    @property
    def sample_ids(self) -> np.ndarray:
        return self.chosen.sample_ids


class TextBlocks:
    """Pretraining: the texts, one after another, cut into blocks of max_seq_len tokens without padding.

    The last partial block is left out, unless it is the only one: then it is padded.
    """

    def __init__(self, store: TokenStore, max_seq_len: int, pad_id: int, *, hide_padding: bool = False) -> None:
        self.store, self.max_seq_len, self.pad_id, self.hide_padding = store, max_seq_len, pad_id, hide_padding
        self.bytes_per_token = store.bytes_per_token
        self.blocks = len(store.tokens) // max_seq_len
        self.left_out = len(store.tokens) - self.blocks * max_seq_len if self.blocks else 0

    def __len__(self) -> int:
        return self.blocks or 1

    @property
    def row_size(self) -> float:
        return float(self.max_seq_len if self.blocks else len(self.store.tokens))

    def rows(self, indices: np.ndarray) -> Batch:
        """Blocks of the given indices [B]."""
        indices = checked_indices(indices, len(self))
        if self.blocks:
            length = self.max_seq_len
            tokens = np.zeros((len(indices), length), dtype=np.int64)
            for row, index in enumerate(indices.tolist()):
                tokens[row] = self.store.tokens[index * length : (index + 1) * length]
            return Batch(tokens, np.ones(tokens.shape, dtype=bool), None, None, indices)
        tokens = np.full((len(indices), self.max_seq_len), self.pad_id, dtype=np.int64)
        tokens[:, : len(self.store.tokens)] = self.store.tokens[:]
        real = np.arange(self.max_seq_len) < len(self.store.tokens)
        real = np.repeat(real[None], len(indices), axis=0)
        return Batch(tokens, real, None, _padding_apart(real) if self.hide_padding else None, indices)

    def describe(self) -> str:
        store = self.store
        parts = [f"{store.documents:,} documents", f"{len(store.tokens):,} tokens"]
        parts.append(f"{len(self):,} rows of {self.max_seq_len}")
        if not self.blocks:
            parts.append(f"padded (fewer than {self.max_seq_len} tokens)")
        if self.left_out:
            parts.append(f"{self.left_out:,} tokens at the end left out")
        return ", ".join(parts + unusable_rows(store.report))


class PackedConversations:
    """Fine-tuning: whole conversations packed best-fit into rows of max_seq_len tokens, padded at the end.

    A conversation that is too long is cut after the last answer that fits; one whose first exchange does not
    fit is dropped; both are counted. Raises UserError when none fits. With `tail`, 0 to so many ignore tokens
    follow the end of the last answer.
    """

    def __init__(self, store: TokenStore, max_seq_len: int, pad_id: int, *, tail: int = 0, ignore_id: int = 0) -> None:
        assert store.mask is not None
        self.store, self.max_seq_len, self.pad_id, self.ignore_id = store, max_seq_len, pad_id, ignore_id
        self.bytes_per_token = store.bytes_per_token
        self.lengths, truncated = fit_to_row(store.offsets, store.mask, max_seq_len)
        self.truncated = int((truncated & (self.lengths > 0)).sum())
        self.documents = np.flatnonzero(self.lengths)
        self.report = _dropped(store, np.flatnonzero(self.lengths == 0), FIRST_EXCHANGE_TOO_LONG, 1)
        if not len(self.documents):
            raise UserError(_none_fits(store, "conversation", "first exchange", max_seq_len))
        if tail:
            self.lengths = _until_last_trained(self.lengths, store.offsets, store.mask)
        self.tails = np.minimum(_scattered(len(self.lengths), tail), max_seq_len - self.lengths)
        packed = pack_best_fit((self.lengths + self.tails)[self.documents], max_seq_len)
        self.packing = Packing(self.documents[packed.documents], packed.row_offsets)

    def __len__(self) -> int:
        return len(self.packing)

    @property
    def row_size(self) -> float:
        return float(self.lengths.sum()) / len(self)

    @property
    def packing_efficiency(self) -> float:
        """The share of tokens in the rows that is not padding."""
        return float(self.lengths.sum()) / (len(self) * self.max_seq_len)

    def rows(self, indices: np.ndarray) -> Batch:
        """Rows of the given indices [B]."""
        assert self.store.mask is not None
        indices = checked_indices(indices, len(self))
        offsets = self.packing.row_offsets
        per_row = offsets[indices + 1] - offsets[indices]
        within_row = _ranges(per_row)
        documents = self.packing.documents[np.repeat(offsets[indices], per_row) + within_row]
        lengths = self.lengths[documents] + self.tails[documents]
        positions = _ranges(lengths)
        real = positions < np.repeat(self.lengths[documents], lengths)
        source = np.where(real, np.repeat(self.store.offsets[documents], lengths) + positions, 0)
        tokens_per_row = np.add.reduceat(lengths, np.cumsum(per_row) - per_row) if len(indices) else per_row
        target = np.repeat(np.arange(len(indices)) * self.max_seq_len, tokens_per_row) + _ranges(tokens_per_row)

        def filled(values: np.ndarray, padding: int, dtype: type) -> np.ndarray:
            flat: np.ndarray = np.full(len(indices) * self.max_seq_len, padding, dtype=dtype)
            flat[target] = values
            return flat.reshape(len(indices), self.max_seq_len)

        return Batch(
            tokens=filled(np.where(real, self.store.tokens[source], self.ignore_id), self.pad_id, np.int64),
            loss_mask=filled(self.store.mask[source] & real, 0, bool),
            positions=filled(positions, 0, np.int64),
            segments=filled(np.repeat(within_row, lengths), -1, np.int32),
            sample_ids=indices,
        )

    def describe(self) -> str:
        parts = [f"{len(self.documents):,} conversations", f"{int(self.lengths.sum()):,} tokens"]
        parts.append(f"{len(self):,} rows of {self.max_seq_len}, {100 * self.packing_efficiency:.1f} % filled")
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated at a turn boundary")
        return ", ".join(parts + unusable_rows(self.report))


class PreferencePairs:
    """Preference tuning: chosen and rejected beside each other, padded to the longest of the batch.

    Trained are the turns that follow what both have in common. Answers that reach beyond max_seq_len are cut
    there and counted (a pair has no later turn to drop instead); a pair is dropped and counted when less than
    16 tokens of a cut answer would remain or when no difference would. Raises UserError when none fits.
    """

    def __init__(self, store: TokenStore, max_seq_len: int, pad_id: int, *, hide_padding: bool = False) -> None:
        assert store.mask is not None
        self.store, self.max_seq_len, self.pad_id, self.hide_padding = store, max_seq_len, pad_id, hide_padding
        self.bytes_per_token = store.bytes_per_token
        full = np.diff(store.offsets)
        self.lengths = np.minimum(full, max_seq_len)
        cut: np.ndarray = np.any((full > max_seq_len).reshape(-1, 2), axis=1)
        fits: np.ndarray = np.ones(len(cut), dtype=np.bool_)
        for pair in np.flatnonzero(cut).tolist():
            fits[pair] = self._still_a_pair(pair, full)
        self.pairs = np.flatnonzero(fits)
        self.truncated = int((cut & fits).sum())
        if not len(self.pairs):
            raise UserError(_none_fits(store, "preference pair", "prompt", max_seq_len))
        self.report = _dropped(store, np.flatnonzero(~fits), PAIR_TOO_LONG, 2)

    def _still_a_pair(self, pair: int, full: np.ndarray) -> bool:
        """Is enough left of both answers, and do they still differ?"""
        assert self.store.mask is not None
        sides = []
        for document in (2 * pair, 2 * pair + 1):
            start = self.store.offsets[document]
            end = start + self.lengths[document]
            if full[document] > self.max_seq_len and self.store.mask[start:end].sum() < MIN_CUT_ANSWER:
                return False
            sides.append(self.store.tokens[start:end])
        return not np.array_equal(sides[0], sides[1])

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def row_size(self) -> float:
        return 1.0

    def rows(self, indices: np.ndarray) -> PairBatch:
        """Pairs of the given indices [B]; L is a multiple of 16, but not more than max_seq_len."""
        assert self.store.mask is not None
        indices = checked_indices(indices, len(self))
        chosen = 2 * self.pairs[indices]
        documents = np.concatenate([chosen, chosen + 1])
        lengths = self.lengths[documents]
        width = min(-(-int(lengths.max(initial=1)) // PAIR_MULTIPLE) * PAIR_MULTIPLE, self.max_seq_len)
        columns = _ranges(lengths)
        source = np.repeat(self.store.offsets[documents], lengths) + columns
        target = np.repeat(np.arange(len(documents)) * width, lengths) + columns
        tokens: np.ndarray = np.full(len(documents) * width, self.pad_id, dtype=np.int64)
        mask: np.ndarray = np.zeros(len(documents) * width, dtype=bool)
        tokens[target] = self.store.tokens[source]
        mask[target] = self.store.mask[source]
        tokens, mask = tokens.reshape(2, -1, width), mask.reshape(2, -1, width)
        segments = [None, None]
        if self.hide_padding:
            segments = list(_padding_apart(np.arange(width) < lengths[:, None]).reshape(2, -1, width))
        return PairBatch(*(Batch(tokens[s], mask[s], None, segments[s], indices) for s in (0, 1)))

    def describe(self) -> str:
        lengths = self.lengths.reshape(-1, 2)[self.pairs]
        parts = [f"{len(self):,} pairs", f"{int(lengths.sum()):,} tokens", f"longest {int(lengths.max()):,}"]
        if self.truncated:
            parts.append(f"{self.truncated:,} with an answer cut at max_seq_len {self.max_seq_len}")
        return ", ".join(parts + unusable_rows(self.report))


def open_dataset(
    stage: str,
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    num_workers: int = 0,
    cache_dir: str | Path | None = None,
    tail: int = 0,
    hide_padding: bool = False,
    part: str = "train",
) -> TextBlocks | PackedConversations | PreferencePairs:
    """The rows of `path` for a stage ("pretrain", "full_sft", "rlhf"), tokenized now or taken from the cache.

    `tail`: after every conversation stand 0 to so many ignore tokens, for models that must learn where a text ends
    in a canvas. `hide_padding`: padding is a segment of its own, for models that look ahead.
    `part`: "train" or "val" of a folder that `minillm data prepare-text` made.
    What was not usable is printed. Raises UserError for data that is missing, damaged or of another form.
    """
    if max_seq_len < 2:
        raise UserError(f"max_seq_len is {max_seq_len}; it must be at least 2.")
    kind = STAGES[canonical_stage(stage)].data
    if is_prepared(path):
        store = open_prepared(path, tokenizer, kind=kind, part=part)
    else:
        store = build_store(path, tokenizer, kind=kind, cache_dir=cache_dir, num_workers=num_workers)
    if kind == "texts":
        return TextBlocks(store, max_seq_len, tokenizer.pad_id, hide_padding=hide_padding)
    if kind == "conversations":
        return PackedConversations(store, max_seq_len, tokenizer.pad_id, tail=tail, ignore_id=tokenizer.ignore_id)
    return PreferencePairs(store, max_seq_len, tokenizer.pad_id, hide_padding=hide_padding)


def _padding_apart(real: np.ndarray) -> np.ndarray:
    """Segments [B, L] of rows that are one text and padding: 0 where real, -1 where not."""
    return np.where(real, 0, -1).astype(np.int32)


def _until_last_trained(lengths: np.ndarray, offsets: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The lengths without what follows the last trained token: a line break that is always visible would tell a
    model that looks ahead where the answer ends."""
    last = np.maximum.accumulate(np.where(mask, np.arange(len(mask)), -1))
    return np.where(lengths > 0, last[offsets[:-1] + np.maximum(lengths, 1) - 1] + 1 - offsets[:-1], 0)


def _scattered(count: int, most: int) -> np.ndarray:
    """`count` numbers in 0..most that look random and are always the same."""
    return (np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)).astype(np.int64) % (
        most + 1
    )


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """[0 .. lengths[0] - 1, 0 .. lengths[1] - 1, ...]"""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _dropped(store: TokenStore, rows: np.ndarray, reason: str, documents_per_row: int) -> RowReport:
    """The store's report with the rows that do not fit added; says so when there are any."""
    report = RowReport.from_dict(store.report.to_dict())
    news = RowReport(report.source, report.used - len(rows))
    for row in rows.tolist():
        file, _, line = store.place(documents_per_row * row).rpartition(":")
        for each in (report, news):
            each.add(reason, file, int(line))
    report.used -= len(rows)
    news.log()
    return report


def _none_fits(store: TokenStore, what: str, part: str, max_seq_len: int) -> str:
    lengths = np.diff(store.offsets)
    return (
        f"{store.report.source}: no {what} fits into max_seq_len {max_seq_len}: each {part} is longer. "
        f"The shortest {what} has {lengths.min():,} tokens, the median {int(np.median(lengths)):,}. "
        "Give a larger --max_seq_len."
    )


def unusable_rows(report: RowReport) -> list[str]:
    """What was not usable, in words, [] where all was."""
    reasons = [f"{count:,} {reason}" for reason, count in report.counts().items()]
    return [f"{report.unusable:,} rows not used ({'; '.join(reasons)})"] if reasons else []
