"""Which row comes when: a formula of (seed, slot), and the rows held out for validation.

A resumed run, another batch size or another number of workers sees the same rows in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

HELD_OUT_SHARE, FEWEST_HELD_OUT, MOST_HELD_OUT = 0.02, 32, 512


class Dataset(Protocol):
    """How many rows there are, and the rows of given indices as arrays."""

    @property
    def bytes_per_token(self) -> float: ...
    @property
    def row_size(self) -> float:
        """What a row counts in a mixture: its tokens, on average; 1 where rows are examples, as pairs are."""

    def __len__(self) -> int: ...
    def rows(self, indices: np.ndarray) -> Any: ...
    def describe(self) -> str: ...


class Feed(Protocol):
    """Rows in the order of a run, where the loop takes its batches: stores and their mixtures, and streams."""

    epoch_rows: int  # rows of a pass over the data; 0: not known

    def take(self, slot: int, count: int) -> Any:
        """The batch of the slots slot, slot + 1, ...; a stream gives them in turn only."""

    def epoch(self, slot: int) -> float:
        """Passes over the data that end before this slot; a fraction where that is known."""

    def describe(self) -> str: ...
    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the slot; empty where the slot says it all."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Subset:
    """Some rows of a dataset, under new indices; sample ids stay those of the whole dataset."""

    dataset: Dataset
    chosen: np.ndarray  # int64 [N], rows of `dataset`
    name: str

    @property
    def bytes_per_token(self) -> float:
        return self.dataset.bytes_per_token

    @property
    def row_size(self) -> float:
        return self.dataset.row_size

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, indices: np.ndarray) -> Any:
        return self.dataset.rows(self.chosen[checked_indices(indices, len(self))])

    def describe(self) -> str:
        return f"{len(self):,} {self.name} of {len(self.dataset):,} rows ({self.dataset.describe()})"


def train_validation_split(dataset: Dataset, *, seed: int) -> tuple[Dataset, Dataset | None]:
    """(train view, validation view) of a dataset without held-out data of its own; (dataset, None) for one row."""
    train, validation = split_rows(len(dataset), seed)
    if not len(validation):
        return dataset, None
    return Subset(dataset, train, "training rows"), Subset(dataset, validation, "held-out rows")


def split_rows(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows held out), both int64 and sorted. The last rows of a seeded permutation are held out:
    2 %, of small data a tenth up to 32, so that the validation loss means something; at least 1 of two or more rows,
    at most 512."""
    if size < 2:
        return np.arange(size), np.arange(0)
    held_out = min(max(1, round(size * HELD_OUT_SHARE), min(FEWEST_HELD_OUT, size // 10)), MOST_HELD_OUT)
    order = _permutation(seed, -1, size)
    return np.sort(order[:-held_out]), np.sort(order[-held_out:])


def sample_indices(seed: int, start_slot: int, count: int, size: int) -> np.ndarray:
    """Rows int64 [count] of the slots start_slot, start_slot + 1, ...

    Slot s takes place s % size of the permutation that belongs to (seed, epoch = s // size): a pure function,
    and every epoch shows every row once.
    """
    if size < 1 or start_slot < 0 or count < 0:
        raise ValueError(f"size {size} must be positive, start_slot {start_slot} and count {count} not negative")
    parts = []
    slot, left = start_slot, count
    while left > 0:
        epoch, place = divmod(slot, size)
        take = min(left, size - place)
        parts.append(_permutation(seed, epoch, size)[place : place + take])
        slot, left = slot + take, left - take
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


@lru_cache(maxsize=32)  # every source of a mixture has one at a time
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    # Sorting raw random bits: NumPy promises these bits for all time, not what `permutation` makes of them.
    bits = np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch + 1])).random_raw(size)
    order = np.argsort(bits, kind="stable").astype(np.int64)
    order.flags.writeable = False  # shared by all callers
    return order


def checked_indices(indices: np.ndarray, size: int) -> np.ndarray:
    """The indices as int64 [B]. Raises IndexError when one is not in 0..size - 1."""
    indices = np.asarray(indices, dtype=np.int64)
    if len(indices) and (indices.min() < 0 or indices.max() >= size):
        raise IndexError(f"row indices {indices.min()}..{indices.max()} in a dataset of {size} rows")
    return indices
