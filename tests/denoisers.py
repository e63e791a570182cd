"""What the tests of diffusion and SDD share: tiny families, batches and noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import random_model, tiny_config

from minillm.families import noise, sdd
from minillm.families.base import Noise, SpecialIds, TokenBatch
from minillm.families.diffusion import Diffusion
from minillm.families.sdd import SparseDistributionDiffusion
from minillm.families.settings import FamilyConfig
from minillm.models.transformer import LanguageModel

PAD, MASK, IGNORE, START, END = range(5)
IDS = SpecialIds(vocabulary=50, mask=MASK, ignore=IGNORE, control=(PAD, MASK, START))


def diffusion(ids: SpecialIds = IDS, **changes: Any) -> Diffusion:
    return Diffusion(FamilyConfig("diffusion", **changes), ids)


def belief(ids: SpecialIds = IDS, **changes: Any) -> SparseDistributionDiffusion:
    """SDD of four candidates at every step."""
    return SparseDistributionDiffusion(FamilyConfig("sdd", **{"k_schedule": (4,), **changes}), ids)


def both_ways(denoiser: str = "", seed: int = 0, scale: float = 0.3, **changes: Any) -> LanguageModel:
    """A random model that looks both ways."""
    return random_model(tiny_config(causal=False, denoiser=denoiser, **changes), seed, scale)


def model_for(family: Diffusion | SparseDistributionDiffusion, **changes: Any) -> LanguageModel:
    return both_ways(family.denoiser, **changes)


def batch_of(
    tokens: list[list[int]],
    mask: list[list[int]] | None = None,
    segments: list[list[int]] | None = None,
    positions: list[list[int]] | None = None,
    first_id: int = 0,
) -> TokenBatch:
    """All tokens trained, if no mask says otherwise."""
    ids = torch.tensor(tokens)

    def of(values: list[list[int]] | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values)

    trained = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    return TokenBatch(ids, trained, of(positions), of(segments), first_id + torch.arange(len(ids)))


def copies(batch: TokenBatch, count: int, first_id: int = 0) -> TokenBatch:
    """One row `count` times, as samples of their own."""

    def of(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[:1].repeat(count, 1)

    return TokenBatch(*(of(values) for values in batch[:4]), first_id + torch.arange(count))  # type: ignore[arg-type]


def noise_of(batch: TokenBatch, seed: int = 0, step: int = 0, slot: int = 0) -> Noise:
    return Noise.of(seed, batch, step, slot)


def fix_level(monkeypatch: pytest.MonkeyPatch, t: float) -> None:
    """Every row has this noise level."""

    def level(seed: int, slots: torch.Tensor, parts: int, shift: float = 0.0) -> torch.Tensor:
        return torch.full((len(slots), parts), t, dtype=torch.float64)

    monkeypatch.setattr(noise, "levels", level)
    monkeypatch.setattr(sdd, "levels", level)
