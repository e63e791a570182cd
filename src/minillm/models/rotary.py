"""The rotary embedding's angles (arXiv 2104.09864), and how imported models stretch them over longer texts.

E head_dim. There are E / 2 frequencies, the fastest first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minillm.log import UserError

if TYPE_CHECKING:
    from torch import Tensor

# rope_type -> the keys it must have, and those it may have
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"}, {"beta_fast", "beta_slow", "attention_factor", "truncate"}
    ),
}  # fmt: skip


def check_scaling(scaling: Mapping[str, Any]) -> None:
    """A scaling as in ModelConfig.rope_scaling: `rope_type` and the numbers of that type.

    Raises:
        UserError: the type, or a key of it, is not known here, or one is missing or no number.
    """
    kind = scaling.get("rope_type")
    if kind not in _KEYS:
        raise UserError(f"rope_scaling: rope_type {kind!r} is not known here, only {', '.join(_KEYS)}")
    needed, optional = _KEYS[kind]
    given = {key for key, value in scaling.items() if key != "rope_type" and value is not None}
    if missing := sorted(needed - given):
        raise UserError(f"rope_scaling: {missing[0]} is missing, rope_type {kind!r} needs it")
    if unknown := sorted(given - needed - optional - {"original_max_position_embeddings"}):
        raise UserError(f"rope_scaling: {unknown[0]} is not known here for rope_type {kind!r}")
    for key in sorted(given):
        if not isinstance(scaling[key], int | float):
            raise UserError(f"rope_scaling: {key} is {scaling[key]!r}, not a number")


def rotary_tables(
    length: int, head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each [length, E]. Raises UserError as `check_scaling` does."""
    import torch

    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    size = 1.0
    if scaling:
        check_scaling(scaling)
        frequencies, size = _scaled(frequencies, head_dim, theta, scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if size == 1.0 else (cos * size, sin * size)


def _scaled(frequencies: Tensor, head_dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Frequencies [E / 2] for longer texts, and what cos and sin are multiplied by."""
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":  # positions are closer together
        return frequencies / factor, 1.0
    original = float(scaling["original_max_position_embeddings"])
    if scaling["rope_type"] == "llama3":
        # Frequencies that turn often within the original length stay, slow ones are stretched, between is between.
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        turns = frequencies * (original / (2 * math.pi))
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - kept) * frequencies / factor + kept * frequencies, 1.0
    # YaRN (arXiv 2309.00071): the same by place among the frequencies, and attention is made a little sharper.
    places = [_place(scaling.get(key) or turns, head_dim, theta, original)
              for key, turns in (("beta_fast", 32.0), ("beta_slow", 1.0))]  # fmt: skip
    if scaling.get("truncate", True):
        places = [float(math.floor(places[0])), float(math.ceil(places[1]))]
    first, last = max(places[0], 0.0), min(places[1], head_dim - 1.0)
    index = frequencies.new_tensor(range(len(frequencies)))
    stretched = ((index - first) / (last - first if last != first else 0.001)).clamp(0.0, 1.0)
    size = scaling.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return stretched * frequencies / factor + (1 - stretched) * frequencies, float(size)


def _place(turns: float, head_dim: int, theta: float, length: float) -> float:
    """Which frequency (a fraction) turns so often within a length."""
    return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
