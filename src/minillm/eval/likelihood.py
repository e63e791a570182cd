"""What a model makes of held-out rows: loss, perplexity, bits per byte and accuracy, each with its standard error.

The loss is that of training: `family.view`, then weighted cross-entropy. Every noise draw is read once and gives
both the bound and the hits. B batch, L length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minillm.log import UserError, progress

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from minillm.checkpoint.model import OpenedCheckpoint
    from minillm.data.batches import PackedConversations, TextBlocks
    from minillm.families.base import Family, Noise, TokenBatch

LEVELS = 5  # equal ranges of the share that is hidden, for accuracy by noise level


@dataclass
class Measured:
    """Sums of every row that was read; of its noise draws nats are the mean, hits and predictions the sum."""

    nats: list[float] = field(default_factory=list)  # -log p of a row's trained tokens, or its bound
    tokens: list[int] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)  # UTF-8 bytes of those tokens; control tokens have none
    hits: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    level_hits: list[int] = field(default_factory=lambda: [0] * LEVELS)
    level_predicted: list[int] = field(default_factory=lambda: [0] * LEVELS)


def ratio(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """r = sum of sums / sum of counts, and its standard error with rows as the sample:
    sqrt(R / (R - 1) * sum_i (s_i - r c_i)^2) / sum_i c_i over the R rows that have either; None for one row."""
    pairs = [(s, c) for s, c in zip(sums, counts, strict=True) if s or c]
    total = math.fsum(c for _, c in pairs)
    r = math.fsum(s for s, _ in pairs) / total
    if len(pairs) < 2:
        return r, None
    squares = math.fsum((s - r * c) ** 2 for s, c in pairs)
    return r, math.sqrt(len(pairs) / (len(pairs) - 1) * squares) / total


def draws_of(family: Family, asked: int) -> int:
    """Noise draws a row; an exact likelihood has no noise."""
    return 1 if family.likelihood == "exact" else asked


def measure(
    opened: OpenedCheckpoint,
    family: Family,
    data: TextBlocks | PackedConversations,
    rows: np.ndarray,
    *,
    seed: int,
    batch_size: int,
    draws: int,
) -> Measured:
    """Read these rows (indices [R]), each with so many noise draws.

    Raises:
        UserError: no row has a trained token.
    """
    import torch

    from minillm.families.base import Noise, TokenBatch
    from minillm.models.heads import weighted_cross_entropy

    model, found = opened.model, Measured()
    device = model.head_weight.device
    byte_lengths = torch.tensor(opened.tokenizer.byte_lengths)
    with torch.no_grad(), progress(len(rows), "rows read") as bar:
        for start in range(0, len(rows), batch_size):
            batch = TokenBatch.from_numpy(data.rows(rows[start : start + batch_size]), device)
            noise = Noise.of(seed, batch, -1, start)
            nats = torch.zeros(len(batch.tokens), dtype=torch.float64)
            hits, predicted = torch.zeros_like(nats, dtype=torch.int64), torch.zeros_like(nats, dtype=torch.int64)
            for index in range(draws):
                drawn = noise.sample(index, draws)
                view = family.view(model, batch, drawn)
                summed = weighted_cross_entropy(
                    view.through(model).hidden, model.head_weight, view.targets, view.weights
                )
                counted = view.weights != 0
                if view.extra is not None:  # ignore tokens after an end are no part of the text
                    counted &= ~view.extra
                # from here on the CPU: not every device has float64
                losses, hit, counted = (each.cpu() for each in (summed.losses, summed.hits, counted))
                nats += losses.masked_fill(~counted, 0.0).double().sum(1) / draws
                hit &= counted
                hits += hit.sum(1)
                predicted += counted.sum(1)
                if not family.ordered:
                    level = _level(opened, batch, drawn).cpu()
                    width = level.shape[1]  # block diffusion reads the clean row behind it
                    for name, which in (("level_hits", hit), ("level_predicted", counted)):
                        added = torch.bincount(level[which[:, :width]], minlength=LEVELS).tolist()
                        setattr(found, name, [a + b for a, b in zip(getattr(found, name), added)])
            # Of an exact likelihood every token that is predicted counts; of a bound all trained ones, hidden or not.
            targets, counts = (view.targets, counted) if family.ordered else (batch.tokens, batch.loss_mask)
            found.nats += nats.tolist()
            targets, counts = targets.cpu(), counts.cpu()
            found.tokens += counts.sum(1).tolist()
            found.text_bytes += (byte_lengths[targets] * counts).sum(1).tolist()
            found.hits += hits.tolist()
            found.predicted += predicted.tolist()
            bar.advance(len(batch.tokens))
    if not sum(found.tokens):
        raise UserError("the data have no trained token in the rows that were read: raise --eval_samples")
    return found


def _level(opened: OpenedCheckpoint, batch: TokenBatch, noise: Noise) -> Tensor:
    """Which of the LEVELS each position's noise level belongs to, int64 [B, L]: the draw of `family.view` again."""
    from minillm.families.base import SpecialIds
    from minillm.families.masking import hide
    from minillm.families.noise import hidden_share, levels
    from minillm.families.settings import FamilyConfig

    config = FamilyConfig.from_dict(opened.family)
    if config.noise == "swap" and config.architecture == "sdd":  # a row has one level, and it is about swapping
        share = levels(noise.seed, noise.slots, 1, noise.shift).expand(batch.tokens.shape)
    else:
        ignore = SpecialIds.of(opened.tokenizer).ignore
        block = config.diffusion_block if config.architecture == "diffusion" else 0
        share = hidden_share(config.noise_schedule, hide(batch, noise, config.noise_schedule, ignore, block).level)
    return (share * LEVELS).long().clamp(max=LEVELS - 1)


def perplexity_section(found: Measured, likelihood: str, draws: int) -> dict[str, Any]:
    """Loss in nats per token, perplexity and bits per byte. Without a likelihood only the training loss remains."""
    from minillm.train.metrics import perplexity

    loss, error = ratio(found.nats, found.tokens)
    value = None if likelihood == "none" or math.isinf(perplexity(loss)) else perplexity(loss)  # JSON has no infinity
    bits = bits_error = None
    if likelihood != "none" and any(found.text_bytes):
        bits, bits_error = ratio([nats / math.log(2) for nats in found.nats], found.text_bytes)
    return {
        "likelihood": likelihood,
        "loss": loss,
        "loss_standard_error": error,
        "perplexity": value,
        "perplexity_standard_error": None if value is None or error is None else value * error,
        "bits_per_byte": bits,
        "bits_per_byte_standard_error": bits_error,
        "noise_samples": 0 if likelihood == "exact" else draws,
        "rows": len(found.nats),
        "tokens": sum(found.tokens),
        "bytes": sum(found.text_bytes),
    }


def accuracy_section(found: Measured, ordered: bool) -> dict[str, Any]:
    """Share of predictions whose most probable token is the right one; by noise level where tokens are hidden."""
    if not sum(found.predicted):
        raise UserError("no token was hidden in the rows that were read: raise --eval_samples or --noise_samples")
    value, error = ratio(found.hits, found.predicted)
    by_level = [
        {
            "hidden_from": index / LEVELS,
            "hidden_to": (index + 1) / LEVELS,
            "accuracy": found.level_hits[index] / predicted if predicted else None,
            "predicted": predicted,
        }
        for index, predicted in enumerate(found.level_predicted)
    ]
    known = [level["accuracy"] for level in by_level if level["accuracy"] is not None]
    return {
        "predicts": "next" if ordered else "hidden",
        "accuracy": value,
        "standard_error": error,
        "predicted": sum(found.predicted),
        "mean_over_levels": None if ordered else math.fsum(known) / len(known),
        "by_level": [] if ordered else by_level,
    }
