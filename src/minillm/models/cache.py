"""Keys and values of what has been read already, so that generation does not read it again."""

from __future__ import annotations

import torch
from torch import Tensor

from minillm.models.config import ModelConfig


class LayerCache:
    """One layer's keys and values: two buffers [B, K, capacity, E] filled from the left."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.length = keys, values, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, K, L, E]; returns all that are held, [B, K, length, E]."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} positions, {end} were asked for")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


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
