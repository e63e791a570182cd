"""Noise that depends on (seed, sample id, step) only: seeds, uniform numbers, levels and schedules.

B batch, L length. t runs from 0 (nothing hidden) to 1 (everything hidden).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minillm.models.device import has_float64

GOLDEN = 0.6180339887498949  # the most evenly spread additive sequence (Kronecker)
LEAST_LEVEL = 1e-3  # below it a row would hide nothing, with a weight of a thousand


def _mix(keys: Tensor) -> Tensor:
    """Two rounds of a 64-bit mix (the constants of splitmix64), wrapping as int64 does."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        keys = (keys ^ (keys >> shift)) * factor
    return keys ^ (keys >> 31)


def noise_seeds(seed: int, sample_ids: Tensor, step: int) -> Tensor:
    """A seed for each sample that depends on (seed, sample id, step) only: int64 [B], not negative."""
    key = (seed * 1_000_003 + step) * 2_654_435_769
    return _mix(sample_ids + ((key + 2**63) % 2**64 - 2**63)) & ((1 << 62) - 1)


def random_integers(seeds: Tensor, stream: int, count: int) -> Tensor:
    """`count` integers in [0, 2^53) for each seed and stream: int64 [B, count], the same on every device."""
    slots = torch.arange(count, device=seeds.device, dtype=torch.int64)
    keys = _mix(seeds * 1_000_003 + stream * 7_046_029)
    return _mix(keys[:, None] + (slots + 1) * -7046029254386353131) & ((1 << 53) - 1)


def _with_float64(tensor: Tensor) -> Tensor:
    return tensor if has_float64(tensor.device) else tensor.cpu()


def _back(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers below 1 where they are wanted: rounded to float32, still below 1, where there is no float64."""
    return numbers if numbers.device == device else numbers.float().clamp(max=1.0 - 2.0**-24).to(device)


def uniform(seeds: Tensor, stream: int, count: int) -> Tensor:
    """Numbers in [0, 1) for each seed and stream: float64 [B, count], float32 on a device that has no more."""
    return _back(random_integers(_with_float64(seeds), stream, count).double() / 2.0**53, seeds.device)


def levels(seed: int, slots: Tensor, parts: int, shift: float = 0.0) -> Tensor:
    """Noise levels t in [LEAST_LEVEL, 1) for rows that stand at `slots` [B] of the run's order, `parts` each:
    float64 [B, parts], float32 on a device that has no more.

    The slots walk around the circle in golden steps from a point the seed gives, so any rows that follow each
    other cover all levels evenly (low discrepancy), however they are cut into batches.
    """
    places = _with_float64(slots)
    start = uniform(torch.tensor([seed], device=places.device), 0, 1)
    index = places.double()[:, None] * GOLDEN + torch.arange(parts, device=places.device) * math.sqrt(2.0)
    return _back(LEAST_LEVEL + (1.0 - LEAST_LEVEL) * ((start + index + shift) % 1.0), slots.device)


def hidden_share(schedule: str, t: Tensor) -> Tensor:
    """The probability m(t) that a position is hidden at level t: m(0) = 0, m(1) = 1. `linear` m = t;
    `cosine` m = 1 - cos(pi t / 2), which hides less of a row on average."""
    return t if schedule == "linear" else 2.0 * torch.sin(0.25 * math.pi * t).square()


def level_weight(schedule: str, t: Tensor) -> Tensor:
    """m'(t) / m(t), which makes the weighted loss a bound on -log p (arXiv 2406.07524, equation 11)."""
    return 1.0 / t if schedule == "linear" else 0.5 * math.pi / torch.tan(0.25 * math.pi * t)
