"""Keys and values of what has been read already, so that generation does not read it again.

`KeyValueCache`: rows that begin together. `SlotCache`: rows that come and go. The model asks both the same three
things (`Cache`). B rows, K key/value heads, L length, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from minillm.models.config import ModelConfig


class Layer(Protocol):
    """One layer's keys and values."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, K, L, E]; returns all that are held."""


class Cache(Protocol):
    """What the model asks of a cache."""

    @property
    def layers(self) -> Sequence[Layer]: ...

    def positions(self, length: int) -> Tensor:
        """Positions [B, L] of the next `length` tokens."""

    def mask(self, length: int, causal: bool) -> Tensor | None:
        """What the next `length` tokens may look at: bool [B, 1, L, held], None where all."""

    def places_of(self, length: int) -> Tensor:
        """Where the next `length` tokens stand in the cache: [B or 1, L]."""


class LayerCache:
    """One layer's keys and values: two buffers [B, K, capacity, E] filled from the left."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.length = keys, values, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, K, L, E]; returns all that are held, [B, K, length, E]."""
        length = keys.shape[2]
        end = self.length + length
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} positions, {end} were asked for")
        self.keys.narrow(2, self.length, length).copy_(keys)
        self.values.narrow(2, self.length, length).copy_(values)
        self.length = end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)


class KeyValueCache:
    """The caches of all layers, and how many slots at the left of each row are padding (`padding` [B])."""

    def __init__(self, config: ModelConfig, *, batch: int, capacity: int, padding: Tensor, dtype: torch.dtype) -> None:
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.padding = padding
        self.any_padding = bool(padding.any())
        self.layers = [
            LayerCache(
                torch.empty(shape, dtype=dtype, device=padding.device),
                torch.empty(shape, dtype=dtype, device=padding.device),
            )
            for _ in range(config.num_hidden_layers)
        ]

    @property
    def length(self) -> int:
        return self.layers[0].length

    def keep(self, rows: Tensor) -> None:
        """Drop every row but those named (indices [rows]): finished sequences leave the batch."""
        self.padding = self.padding[rows]
        self.any_padding = bool(self.padding.any())
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def truncate(self, length: int) -> None:
        """Forget what was added after the first `length` slots."""
        for layer in self.layers:
            layer.length = length

    def positions(self, length: int) -> Tensor:
        """Positions [B, L] of the next `length` slots; padding slots stand at 0."""
        slots = torch.arange(self.length, self.length + length, device=self.padding.device)
        return (slots[None, :] - self.padding[:, None]).clamp_(min=0)

    def places_of(self, length: int) -> Tensor:
        """Places [1, L] of the next `length` tokens, padding included."""
        return torch.arange(self.length, self.length + length, device=self.padding.device)[None]

    def mask(self, length: int, causal: bool) -> Tensor | None:
        """Which held slots the next `length` slots may look at: bool [B, 1, L, length held], None where all."""
        total = self.length + length
        if not self.any_padding and (length == 1 or not causal):
            return None
        if not self.any_padding and self.length == 0:
            return None  # a plain causal prefill: the kernel's own mask is faster
        keys = torch.arange(total, device=self.padding.device)
        queries = keys[self.length :]
        real = keys[None, None, :] >= self.padding[:, None, None]
        allowed = real & (keys[None, None, :] <= queries[None, :, None]) if causal else real
        # a padding slot looks at itself, so that its softmax is not empty
        return (allowed | (keys[None, None, :] == queries[None, :, None]))[:, None]


class SlotLayer:
    """One layer's keys and values [slots, K, capacity, E], for rows that stand at different lengths."""

    def __init__(self, cache: SlotCache, keys: Tensor, values: Tensor) -> None:
        self.cache, self.keys, self.values = cache, keys, values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add one key and value [B, K, 1, E] behind each row; returns those up to the longest row's,
        [B, K, longest + 1, E]. What stands behind a shorter row's end is hidden by the mask."""
        cache = self.cache
        self.keys[cache.places[0], :, cache.places[1]] = keys[:, :, 0].to(self.keys.dtype)
        self.values[cache.places[0], :, cache.places[1]] = values[:, :, 0].to(self.values.dtype)
        rows, end = len(cache.lengths), cache.longest + 1
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]


class SlotCache:
    """Rows that come and go, each with a length of its own: continuous batching. The rows in use are the first ones;
    a row that leaves is replaced by the last, so that nothing else is copied.

    `advance` is called after the model has read one token of each row.
    """

    def __init__(
        self, config: ModelConfig, *, slots: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (slots, config.num_key_value_heads, capacity, config.head_dim)
        self.slots, self.device = slots, device
        # zeros: a hidden slot's weight is 0, but 0 times what uninitialised memory may hold (NaN) is not
        self.layers = [
            SlotLayer(self, *(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
            for _ in range(config.num_hidden_layers)
        ]
        self.lengths: list[int] = []
        self._settle()

    def _settle(self) -> None:
        """What follows from the lengths."""
        self.longest = max(self.lengths, default=0)
        self.even = self.longest == min(self.lengths, default=0)
        rows = torch.arange(len(self.lengths), device=self.device)
        self.places = (rows, torch.tensor(self.lengths, dtype=torch.int64, device=self.device))

    def add(self, prompts: KeyValueCache, row: int, length: int, copies: int) -> None:
        """`copies` new rows that begin with the first `length` keys and values of a row of `prompts`, which were read
        without padding before them."""
        start, end = len(self.lengths), len(self.lengths) + copies
        for own, read in zip(self.layers, prompts.layers):
            own.keys[start:end, :, :length] = read.keys[row, :, :length]
            own.values[start:end, :, :length] = read.values[row, :, :length]
        self.lengths += [length] * copies
        self._settle()

    def advance(self) -> None:
        """One token of each row has been read."""
        self.lengths = [length + 1 for length in self.lengths]
        self._settle()

    def remove(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Drop these rows; returns (from, to) of the rows that took their places."""
        gone = set(rows)
        left = len(self.lengths) - len(gone)
        moved = list(
            zip(
                (row for row in range(left, len(self.lengths)) if row not in gone),
                (row for row in range(left) if row in gone),
            )
        )
        for source, target in moved:
            length = self.lengths[target] = self.lengths[source]
            for layer in self.layers:
                layer.keys[target, :, :length] = layer.keys[source, :, :length]
                layer.values[target, :, :length] = layer.values[source, :, :length]
        del self.lengths[left:]
        self._settle()
        return moved

    def positions(self, length: int) -> Tensor:
        """Positions [B, 1]: behind each row."""
        return self.places[1][:, None]

    def places_of(self, length: int) -> Tensor:
        """Places [B, 1]: behind each row."""
        return self.places[1][:, None]

    def mask(self, length: int, causal: bool) -> Tensor | None:
        """Each row's own slots, with the next one: bool [B, 1, 1, longest + 1]; None where all are equally long."""
        if self.even:
            return None
        keys = torch.arange(self.longest + 1, device=self.device)
        return (keys[None, :] <= self.places[1][:, None])[:, None, None]
