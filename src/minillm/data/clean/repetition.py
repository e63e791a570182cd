"""Degenerate answers: a character, a word, a phrase or the last sentence in a loop."""

from __future__ import annotations

import re

NGRAM = 5
SHORTEST = 60  # characters; below it repetition is a matter of taste
SHARE = 0.6  # of the n-grams that have occurred before, from which on an answer counts as degenerate
SUSPICIOUS_SHARE = 0.3  # from which on a loop in the middle is looked for
LOOP_COPIES = 3
LOOP_CHARACTERS = 60  # from which on copies of a piece back to back are a loop
RULER_CHARACTERS = 200  # the same where the piece has no letter: a ruler of dashes is shorter
PROBES, PROBE = 16, 8  # places to look at first, and characters to look for again
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)  # repeats itself by nature
_NO_LETTERS = re.compile(r"[\W_]+")
_LOOP = re.compile(r"(.{1,80}?)\1{7,}", re.DOTALL)


def loop_problem(text: str) -> str:
    """What is repeated in `text`, in words; "" when nothing is out of the ordinary."""
    text = text.strip()
    if len(text) < SHORTEST:
        return ""
    copies, piece = loop_at_end(text)
    if copies >= LOOP_COPIES and (copies - 1) * len(piece) >= _most(piece):
        return f"it ends with {copies} copies of {_shown(piece)}"
    prose = _CODE.sub(" ", text) if "```" in text else text
    if not _may_repeat(prose):
        return ""
    share = repeated_share(prose)
    if share >= SHARE:
        return f"{share:.0%} of its n-grams have occurred before"
    if share >= SUSPICIOUS_SHARE:
        for loop in _LOOP.finditer(prose):
            if len(loop[0]) >= _most(loop[1]):
                return f"{len(loop[0]) // len(loop[1])} copies of {_shown(loop[1])} in a row"
    return ""


def _most(piece: str) -> int:
    return LOOP_CHARACTERS if any(map(str.isalnum, piece)) else RULER_CHARACTERS


def _may_repeat(text: str) -> bool:
    """A quick look at a few places: False is said of no text of whose n-grams many occur again."""
    step = max(len(text) // PROBES, 1)
    again = sum(text.find(text[at : at + PROBE], at + 1) >= 0 for at in range(0, len(text) - PROBE, step))
    return again >= 3


def repeated_share(text: str) -> float:
    """Share in 0..1 of the n-grams that have occurred before: 5 words, or where words are not spaced 5 characters of
    Chinese, 20 of the Latin alphabet (addresses, code)."""
    units: list[str] | str = text.split()
    size = NGRAM
    if len(units) * 10 < len(text):
        units = _NO_LETTERS.sub("", text)
        size = NGRAM if len(units.encode()) >= 2 * len(units) else 4 * NGRAM
    total = len(units) - size + 1
    if total < NGRAM:
        return 0.0
    return 1 - len(set(zip(*(units[start:] for start in range(size)), strict=False))) / total


def loop_at_end(text: str) -> tuple[int, str]:
    """(number of copies back to back, the piece) of which the end of `text` is made; (1, text) without a loop."""
    earlier = text.rfind(text[-12:], 0, len(text) - 1)
    if earlier < 0:
        return 1, text
    period = len(text) - 12 - earlier
    same, step = 0, period
    while step and same + step + period <= len(text):
        start = len(text) - same - step
        if text[start : start + step] == text[start - period : start - period + step]:
            same += step
        else:
            break
    return same // period + 1, text[-period:]


def _shown(piece: str) -> str:
    piece = " ".join(piece.split())
    return repr(piece if len(piece) <= 40 else piece[:37] + "...")
