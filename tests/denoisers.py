"""What the tests of diffusion and SDD share: tiny families, batches and noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import random_model, tiny_config

from minillm.data.batches import Batch
from minillm.families import noise, sdd
from minillm.families.base import Noise, SpecialIds, TokenBatch
from minillm.families.diffusion import Diffusion
from minillm.families.sdd import SparseDistributionDiffusion
from minillm.families.settings import FamilyConfig
from minillm.methods.likelihood import Likelihood
from minillm.models.transformer import LanguageModel

CPU = torch.device("cpu")
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


# A packed row: two conversations, the first with ignore tokens after its end, then padding.
TOKENS = [START, 9, 30, 31, 32, END, IGNORE, IGNORE, START, 9, 40, END, PAD, PAD]
TRAINED = [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0]
SEGMENTS = [0] * 8 + [1] * 4 + [-1] * 2
POSITIONS = [*range(8), *range(4), 0, 0]
PACKED = batch_of([TOKENS], [TRAINED], [SEGMENTS], [POSITIONS])


LEAST = 0.1  # levels from here on, where draws are compared with enumeration: weights of 1 / t are tame there


def subset_weight(size: int, length: int, schedule: str = "linear", least: float = 0.0) -> float:
    """What a hidden subset weighs over all levels from `least` on: the integral of m' m^(size - 1) (1 - m)^(length -
    size). Over all levels it is 1 / size divided by the number of subsets of that size."""
    lowest = float(noise.hidden_share(schedule, torch.tensor(least, dtype=torch.float64)))
    m = lowest + (1 - lowest) * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    values = m ** (size - 1) * (1 - m) ** (length - size)
    return float(values.mean()) * (1 - lowest) / (1 - least)


def check_mean(values: torch.Tensor, expected: float) -> None:
    error = float(values.std()) / math.sqrt(len(values))
    assert error < 0.03 * expected  # close enough to tell it from other weights
    assert abs(float(values.mean()) - expected) < 4 * error


def likelihood_losses(
    family: Diffusion | SparseDistributionDiffusion, model: LanguageModel, batch: TokenBatch, step: int = 0
) -> torch.Tensor:
    """Losses of micro-batches of 64 of the batch's rows, per row."""
    method, losses = Likelihood(family, seed=2), []
    for first in range(0, len(batch.tokens), 64):
        part = Batch(*(None if each is None else each[first : first + 64].numpy() for each in batch))  # type: ignore[arg-type]
        prepared = method.prepare(model, part, CPU, step, first)
        loss, metrics = method.loss(model, prepared.data)
        assert prepared.count == part.loss_mask.sum() == metrics["loss"][1]
        assert loss.item() == pytest.approx(metrics["loss"][0].item(), rel=1e-5)
        losses.append(loss.detach() / len(part.tokens))
    return torch.stack(losses)


def fix_level(monkeypatch: pytest.MonkeyPatch, t: float) -> None:
    """Every row has this noise level."""

    def level(seed: int, slots: torch.Tensor, parts: int, shift: float = 0.0) -> torch.Tensor:
        return torch.full((len(slots), parts), t, dtype=torch.float64)

    monkeypatch.setattr(noise, "levels", level)
    monkeypatch.setattr(sdd, "levels", level)
