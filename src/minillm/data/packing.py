"""Which tokens stand in which row: blocks of a stream of texts, and conversations packed whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Documents laid into rows: row r holds documents[row_offsets[r] : row_offsets[r + 1]]."""

    documents: np.ndarray  # int64 [N]
    row_offsets: np.ndarray  # int64 [R + 1]

    def __len__(self) -> int:
        return len(self.row_offsets) - 1


def pack_best_fit(lengths: np.ndarray, row_length: int) -> Packing:
    """Packs documents of the given lengths [N] whole into rows: the longest first, each into the row where it
    leaves the least room. Deterministic; documents in a row and rows keep the order of the data.

    Raises ValueError when a length is 0 or larger than row_length.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > row_length):
        raise ValueError(f"lengths must be in 1..{row_length}, not {lengths.min()}..{lengths.max()}")
    longest_first = np.argsort(-lengths, kind="stable")
    rows = np.empty(len(lengths), dtype=np.int64)
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # room left -> rows with that room
    has_rows = 0  # bit b is set when open_rows[b] is not empty
    row_count = 0
    placed = []
    for length in lengths[longest_first].tolist():
        fitting = has_rows >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                has_rows ^= 1 << room
        else:
            room, row = row_length, row_count
            row_count += 1
        room -= length
        if room:
            open_rows[room].append(row)
            has_rows |= 1 << room
        placed.append(row)
    rows[longest_first] = placed
    return _in_data_order(rows, row_count)


def _in_data_order(rows: np.ndarray, row_count: int) -> Packing:
    """Numbers the rows by their first document."""
    first = np.full(row_count, len(rows), dtype=np.int64)
    np.minimum.at(first, rows, np.arange(len(rows)))
    rank = np.empty(row_count, dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(row_count)
    rows = rank[rows]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=row_count))]).astype(np.int64)
    return Packing(np.argsort(rows, kind="stable"), offsets)


def fit_to_row(offsets: np.ndarray, mask: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens of each conversation fit into a row, and which conversations lose answers by it.

    A conversation of more than row_length tokens is cut after the last answer that fits whole; 0 means that
    not even the first does. What follows the last answer (a line break) may go without being missed.
    offsets: int64 [N+1]; mask: [T], nonzero = trained. Returns kept lengths int64 [N] and truncated bool [N].
    """
    lengths = np.diff(offsets)
    kept, truncated = lengths.copy(), np.zeros(len(lengths), dtype=bool)
    for document in np.flatnonzero(lengths > row_length):
        inside = np.asarray(mask[offsets[document] : offsets[document + 1]]) != 0
        ends = np.flatnonzero(inside[:row_length] & ~np.append(inside, False)[1 : row_length + 1])
        kept[document] = ends[-1] + 1 if len(ends) else 0
        truncated[document] = bool(inside[kept[document] :].any())
    return kept, truncated
