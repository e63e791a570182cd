"""Choices that are the same on every machine, and a small template language.

In a template, `[a|b|c]` picks one alternative (they nest) and `{slot}` or `{slot.field}` is filled in.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")

_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_SENTENCE_START = re.compile(r'(^"?|[.!?] "?|\." "?|\n"?)([a-z])')


class Dice:
    """A seeded source of choices, built on `random()` alone: the one method Python promises not to change."""

    def __init__(self, *key: object) -> None:
        self._random = random.Random("/".join(map(str, key))).random

    def number(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self._random() * len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different positions of `items`, in random order."""
        pool = list(items)
        for i in range(count):
            j = self.number(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def weighted(self, weights: Mapping[str, float]) -> str:
        """A key, as often as its weight says."""
        left = self._random() * sum(weights.values())
        for key, weight in weights.items():
            left -= weight
            if left < 0:
                return key
        return list(weights)[-1]


def held_out(*key: object) -> bool:
    """True for one combination in eight: those appear in validation data only."""
    return zlib.crc32("/".join(map(str, key)).encode()) % 8 == 0


def fill(dice: Dice, template: str, **slots: Any) -> str:
    """Choose among the alternatives of a template and fill in its slots."""
    while "[" in template:
        template = _INNERMOST.sub(lambda match: dice.pick(_alternatives(match[1])), template)
    return template.format(**slots)


def capitalise(text: str) -> str:
    """Capital letters where English sentences begin."""
    return _SENTENCE_START.sub(lambda match: match[1] + match[2].upper(), text)


@cache
def _alternatives(body: str) -> tuple[str, ...]:
    return tuple(body.split("|"))
