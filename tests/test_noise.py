"""Noise is a formula of (seed, sample id, step); levels cover their range evenly; weights belong to schedules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from denoisers import batch_of, noise_of

from minillm.families.base import Noise
from minillm.families.noise import (
    LEAST_LEVEL,
    hidden_share,
    level_weight,
    levels,
    noise_seeds,
    random_integers,
    uniform,
)

SEEDS = noise_seeds(3, torch.arange(400), 7)


def star_discrepancy(values: torch.Tensor) -> float:
    """The largest gap between the share of values below x and x itself."""
    ordered, count = np.sort(values.numpy()), len(values)
    above, below = np.arange(1, count + 1) / count - ordered, ordered - np.arange(count) / count
    return float(max(above.max(), below.max()))


def test_numbers_of_a_seed_do_not_depend_on_the_batch() -> None:
    together = uniform(SEEDS, 2, 30)
    order = torch.randperm(len(SEEDS))
    assert torch.equal(together[order], uniform(SEEDS[order], 2, 30))
    assert torch.equal(together[:5], torch.cat([uniform(SEEDS[i : i + 1], 2, 30) for i in range(5)]))
    assert torch.equal(together[:, :11], uniform(SEEDS, 2, 11))  # nor on how many are asked for


def test_numbers_look_uniform_and_streams_seeds_and_steps_independent() -> None:
    values = uniform(SEEDS, 0, 50)
    assert values.dtype == torch.float64 and values.min() >= 0 and values.max() < 1
    n = values.numel()
    # Kolmogorov's distance exceeds 1.95 / sqrt(n) once in a thousand draws
    assert star_discrepancy(values.flatten()) < 1.95 / n**0.5
    others = [
        uniform(SEEDS, 1, 50),
        uniform(SEEDS, 16, 50),
        values.roll(1, 0),
        values.roll(1, 1),
        uniform(noise_seeds(3, torch.arange(400), 8), 0, 50),
        uniform(noise_seeds(4, torch.arange(400), 7), 0, 50),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack((values.flatten(), other.flatten())))[0, 1]
        assert abs(float(correlation)) < 4 / n**0.5


def test_integers_are_uniform_over_a_small_vocabulary() -> None:
    drawn = random_integers(SEEDS, 3, 50) % 7
    counts = torch.bincount(drawn.flatten(), minlength=7).double()
    expected = drawn.numel() / 7
    assert float(((counts - expected).square() / expected).sum()) < 22.5  # chi squared of 6 degrees, p = 0.001


@pytest.mark.parametrize("seed", [0, 42])
@pytest.mark.parametrize("parts", [1, 4])
def test_any_slots_that_follow_each_other_cover_all_levels_evenly(seed: int, parts: int) -> None:
    table = levels(seed, torch.arange(100_000, 104_096), parts)
    assert float(table.min()) >= LEAST_LEVEL and float(table.max()) < 1
    random = [star_discrepancy(torch.rand(64, generator=torch.Generator().manual_seed(i))) for i in range(100)]
    for first in range(0, 4000, 97):
        for part in range(parts):
            assert star_discrepancy(table[first : first + 64, part]) < 0.045 < min(random)


def test_levels_do_not_depend_on_the_cut_and_are_spread_over_samples() -> None:
    slots = torch.arange(50)
    whole = levels(5, slots, 3)
    assert torch.equal(whole, torch.cat([levels(5, part, 3) for part in slots.split(7)]))
    assert torch.equal(whole[:, :2], levels(5, slots, 2))
    assert not torch.equal(whole, levels(6, slots, 3))
    four = torch.stack([levels(5, slots[:1], 1, shift=i / 4) for i in range(4)]).flatten().sort().values
    assert four.diff().tolist() == pytest.approx([0.25 * (1 - LEAST_LEVEL)] * 3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_hide_nothing_at_zero_all_at_one_and_weigh_by_their_slope(schedule: str) -> None:
    ends = hidden_share(schedule, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([0.0, 1.0])
    t = torch.linspace(0.01, 0.99, 60, dtype=torch.float64)
    slope = (hidden_share(schedule, t + 1e-6) - hidden_share(schedule, t - 1e-6)) / 2e-6
    assert (slope > 0).all()
    torch.testing.assert_close(level_weight(schedule, t), slope / hidden_share(schedule, t), rtol=1e-5, atol=0)


def test_noise_of_rows_is_that_of_their_samples_steps_and_slots() -> None:
    batch = batch_of([[5, 6], [7, 8], [9, 10]])
    noise = noise_of(batch, seed=4, step=9, slot=30)
    assert noise.slots.tolist() == [30, 31, 32] and torch.equal(noise.seeds, noise_seeds(4, batch.sample_ids, 9))
    later = batch._replace(sample_ids=batch.sample_ids[1:])
    assert torch.equal(Noise.of(4, later, 9, 31).seeds, noise.seeds[1:])
    twice = noise.repeat(2)
    assert torch.equal(twice.seeds, noise.seeds.repeat(2)) and twice.slots.tolist() == [30, 31, 32] * 2
    draws = [noise.sample(i, 4) for i in range(4)]
    assert [draw.shift for draw in draws] == [0, 0.25, 0.5, 0.75]
    assert len(torch.cat([draw.seeds for draw in draws]).unique()) == 12
