"""What diffusion and SDD share: which positions are hidden, how much each weighs, and the bound they give.

B batch, L length. A position is hidden or it is known; what stands where it is hidden is the family's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.families import noise as levels_of
from minillm.families.base import Noise, Score, TokenBatch, View
from minillm.models.attention import segment_mask
from minillm.models.heads import token_log_probs
from minillm.models.transformer import LanguageModel

LEVELS, POSITIONS, ROWS, FILL, OPEN, LATER_SHARE, LATER = range(7)  # streams of a row's random numbers


class Hidden(NamedTuple):
    """The draw of a batch."""

    where: Tensor  # bool [B, L]
    weights: Tensor  # float32 [B, L]: of hidden positions, so that the sum of all is the bound
    level: Tensor  # float32 [B, L]: t


def hide(batch: TokenBatch, noise: Noise, schedule: str, ignore_id: int, block: int = 0) -> Hidden:
    """Hide each trained position with the probability of its level. Conversations of a packed row, and the blocks
    of a block-wise model, draw their own level. Ignore tokens after an end are hidden as well; they weigh
    (1 - t)^2 as much, since far from the text nothing can tell how long it will be."""
    rows, length = batch.tokens.shape
    extra = extra_positions(batch, ignore_id)
    index = torch.zeros(rows, length, dtype=torch.int64, device=batch.tokens.device)
    if batch.segments is not None:
        index = batch.segments.long().clamp(min=0)
    if block:
        positions = batch.positions if batch.positions is not None else torch.arange(length, device=index.device)
        index = index * (length // block + 1) + positions // block
    t = levels_of.levels(noise.seed, noise.slots, int(index.max()) + 1, noise.shift).gather(1, index)
    drawn = levels_of.uniform(noise.seeds, POSITIONS, length)
    where = (drawn < levels_of.hidden_share(schedule, t)) & (batch.loss_mask | extra)
    weights = levels_of.level_weight(schedule, t)
    weights = torch.where(extra, weights * (1.0 - t).square(), weights) * where
    return Hidden(where, weights.float(), t.float())


def extra_positions(batch: TokenBatch, ignore_id: int) -> Tensor:
    """Ignore tokens that follow an end: bool [B, L]."""
    extra = (batch.tokens == ignore_id) & ~batch.loss_mask
    return extra if batch.segments is None else extra & (batch.segments >= 0)


def hide_some(batch: TokenBatch, noise: Noise, sample: int, samples: int) -> Hidden:
    """For scoring: hide exactly n of a row's N trained positions, n drawn from 1..N, weight N / n. In expectation
    this is the same bound as over levels (arXiv 2502.09992, equation 6), with less variance. The `samples` draws of
    a row are stratified."""
    seeds = noise.seeds
    start = levels_of.uniform(seeds, LEVELS, 1)
    count = batch.loss_mask.sum(1, keepdim=True).to(start.dtype)
    n = (((start + sample / samples) % 1.0) * count).floor() + 1.0
    drawn = levels_of.uniform(seeds, POSITIONS + 16 * (sample + 1), batch.tokens.shape[1])
    rank = drawn.masked_fill(~batch.loss_mask, 2.0).argsort(1).argsort(1)
    where = (rank < n) & batch.loss_mask
    level = (n / count.clamp(min=1.0)).expand_as(drawn)
    return Hidden(where, (where / level.clamp(min=1e-9)).float(), level.float())


def bound(model: LanguageModel, batch: TokenBatch, samples: int, view: Callable[[int], View]) -> Score:
    """The mean over `samples` views of a row's weighted log-probabilities: at most log p in expectation."""
    total = torch.zeros(len(batch.tokens), device=batch.tokens.device)
    for sample in range(samples):
        seen = view(sample)
        weights = seen.weights if seen.extra is None else seen.weights.masked_fill(seen.extra, 0.0)
        hidden = seen.through(model).hidden
        total = total + (token_log_probs(hidden, model.head_weight, seen.targets, weights != 0) * weights).sum(1)
    return Score(total / samples, batch.loss_mask.sum(1), None)


def opening_mask(batch: TokenBatch, noise: Noise, anneal_steps: int) -> Tensor | None:
    """While a converted model learns to look ahead: causal, and every pair ahead is open with the share of the
    annealing that is over (arXiv 2410.17891). bool [B, 1, L, L]; None when it is over, and in evaluation."""
    if not anneal_steps or not 0 <= noise.step < anneal_steps:
        return None
    rows, length = batch.tokens.shape
    segments = batch.segments
    if segments is None:
        segments = torch.zeros(rows, length, dtype=torch.int32, device=batch.tokens.device)
    ahead = levels_of.uniform(noise.seeds, OPEN, length * length).view(rows, 1, length, length)
    behind = torch.ones(length, length, dtype=torch.bool, device=batch.tokens.device).tril()
    return segment_mask(segments, causal=False) & (behind | (ahead < noise.step / anneal_steps))
