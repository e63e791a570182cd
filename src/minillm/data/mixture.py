"""Rows of one dataset, or of several by weight, in the order of a run: a formula of (seed, slot).

The slots of an epoch are dealt out to the sources evenly, so that any rows that follow each other hold nearly their
shares. A source goes through its own rows in a seeded order, all of them once before any comes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from minillm.data.order import Dataset, sample_indices

SOURCE_IDS = 1 << 40  # sample ids of the next source begin so much later


@dataclass(frozen=True)
class Part:
    """A source of a mixture. weight: its share of the tokens (of the pairs, where rows are pairs), up to a common
    factor; None for all parts: what they have."""

    name: str
    dataset: Dataset
    weight: float | None = None


class Mixture:
    """Rows of all parts in one order.

    An epoch takes all rows of the part that lasts longest at its weight, once; of the others as many as their weights
    say, which is each row at least once. Without weights it takes every row once.
    """

    def __init__(self, parts: Sequence[Part], *, seed: int, pad_id: int) -> None:
        self.parts, self.seed, self.pad_id = tuple(parts), seed, pad_id
        self.taken = _rows_of_an_epoch(self.parts)
        self.epoch_rows = sum(self.taken)

    @property
    def shares(self) -> list[float]:
        """Of each part: its share of the tokens (of the pairs)."""
        sizes = [rows * part.dataset.row_size for rows, part in zip(self.taken, self.parts)]
        return [size / sum(sizes) for size in sizes]

    @property
    def bytes_per_token(self) -> float:
        return sum(share * part.dataset.bytes_per_token for share, part in zip(self.shares, self.parts))

    def take(self, slot: int, count: int) -> Any:
        """The batch of `count` slots from `slot` on; its sample ids are unique over all parts."""
        sources = [self.source(each) for each in range(slot, slot + count)]
        batches, places = [], []
        for source in sorted({source for source, _ in sources}):
            mine = [place for place, (other, _) in enumerate(sources) if other == source]
            dataset = self.parts[source].dataset
            # Slots that follow each other take rows that follow each other in the source's own order.
            rows = sample_indices(self.seed + source, sources[mine[0]][1], len(mine), len(dataset))
            batches.append(_renumbered(dataset.rows(rows), source * SOURCE_IDS))
            places += mine
        return batches[0] if len(batches) == 1 else _merged(batches, np.argsort(places), self.pad_id)

    def source(self, slot: int) -> tuple[int, int]:
        """(the part a slot takes its row from, how many rows of that part all earlier slots took)."""
        epoch, place = divmod(slot, self.epoch_rows)
        slots = self.epoch_rows
        for source, rows in enumerate(self.taken):
            # Evenly among the slots that the parts before it leave.
            before, after = place * rows // slots, (place + 1) * rows // slots
            if after > before:
                return source, epoch * rows + before
            place, slots = place - before, slots - rows
        raise AssertionError("the last part takes every slot that is left")

    def epoch(self, slot: int) -> float:
        return slot / self.epoch_rows

    def describe(self) -> str:
        if len(self.parts) == 1:
            return self.parts[0].dataset.describe()
        lines = [f"a mixture of {len(self.parts)} sources, {self.epoch_rows:,} rows an epoch"]
        for part, share, rows in zip(self.parts, self.shares, self.taken):
            times = rows / len(part.dataset)
            lines.append(f"{100 * share:.1f} % {part.name}, {times:.4g}x an epoch ({part.dataset.describe()})")
        return "; ".join(lines)

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def _rows_of_an_epoch(parts: Sequence[Part]) -> list[int]:
    sizes = [len(part.dataset) for part in parts]
    shares = [part.weight / part.dataset.row_size for part in parts if part.weight is not None]
    if len(shares) < len(sizes):
        return sizes
    longest = max(size / share for size, share in zip(sizes, shares))
    return [max(size, round(longest * share)) for size, share in zip(sizes, shares)]


def _renumbered(batch: Any, first: int) -> Any:
    """The batch (of dataclasses) with sample ids that begin at `first`."""
    if not first:
        return batch
    values = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if is_dataclass(value):
            value = _renumbered(value, first)
        values[field.name] = value + first if field.name == "sample_ids" else value
    return type(batch)(**values)


def _merged(batches: Sequence[Any], order: np.ndarray, pad_id: int) -> Any:
    """One batch of the rows of several, in `order` [B]; rows of pairs are padded to the longest."""
    padding = {"tokens": pad_id, "segments": -1}
    values: dict[str, Any] = {}
    for name in (field.name for field in fields(batches[0])):
        found = [getattr(batch, name) for batch in batches]
        if is_dataclass(found[0]):
            values[name] = _merged(found, order, pad_id)
        elif isinstance(found[0], list):
            joined = [value for each in found for value in each]
            values[name] = [joined[place] for place in order]
        elif all(each is None for each in found):
            values[name] = None
        else:
            # No segments: the whole row is one text, segment 0.
            arrays = [
                np.zeros(batch.tokens.shape, np.int32) if each is None else each for batch, each in zip(batches, found)
            ]
            values[name] = _stacked(arrays, padding.get(name, 0))[order]
    return type(batches[0])(**values)


def _stacked(arrays: Sequence[np.ndarray], padding: int) -> np.ndarray:
    """Arrays [B] or [B, L] below each other, the latter padded to the longest L."""
    if arrays[0].ndim == 1:
        return np.concatenate(arrays)
    width = max(array.shape[1] for array in arrays)
    widths = [((0, 0), (0, width - array.shape[1])) for array in arrays]
    return np.concatenate([np.pad(array, each, constant_values=padding) for array, each in zip(arrays, widths)])
