"""N-grams of a text's tokens, and how many of them repeat."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

REPETITION_ORDER = 4


def ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """All runs of n tokens, in order."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def repetition(tokens: Sequence[Hashable]) -> float:
    """The share of a text's 4-grams that already occurred in it, 0 to 1; 0 where it has none."""
    grams = ngrams(tokens, REPETITION_ORDER)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
