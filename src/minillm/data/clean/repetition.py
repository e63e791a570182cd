"""Degenerate answers: a character, a word, a phrase, the last sentence or the whole answer over and over."""

from __future__ import annotations

import re

NGRAM = 5
SHORTEST = 60  # characters; below it repetition is a matter of taste
SHARE = 0.55  # of the n-grams that have occurred before, from which on an answer counts as degenerate
LOOP_COPIES = 3  # at the end of an answer
COPIES_INSIDE = 8  # elsewhere, where refrains and lists have their place
LOOP_CHARACTERS = 60  # from which on copies of a piece back to back are a loop
WIDE_LOOP_CHARACTERS = 40  # the same in Chinese, which says more with each
RULER_CHARACTERS = 180  # the same for a piece of digits, dashes or dots: rulers and long numbers are shorter
LONGEST_PIECE = 160  # of a loop that is not at the end
FIRST_WIDE = "\u3000"  # from here on: Chinese punctuation and emoji, which make no rulers
PROBES, PROBE = 10, 8  # places to look at first, and characters to look for again
TAIL = 400  # characters at the end of a long answer that are looked at by themselves
STRIDE = 60  # between places where a loop is looked for
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)  # repeats itself by nature
_NO_LETTERS = re.compile(r"[\W_]+")


def loop_problem(text: str) -> str:
    """What is repeated in `text`, in words; "" when nothing is out of the ordinary."""
    text = text.strip()
    if len(text) < SHORTEST:
        return ""
    copies, piece = loop_at_end(text)
    if copies >= LOOP_COPIES and (copies - 1) * len(piece) >= _most(piece):
        return f"it ends with {copies} copies of {_shown(piece)}"
    half = len(text) // 2
    if text[:half].rstrip() == text[-half:].lstrip() and half >= _most(text):
        return "it says everything twice"
    prose = _CODE.sub(" ", text) if "```" in text else text
    copies, piece = loop_inside(prose)
    if copies:
        return f"{copies} copies of {_shown(piece)} in a row"
    for part, name in ((prose, "its n-grams"), (prose[-TAIL:], f"the n-grams of its last {TAIL} characters")):
        if _may_repeat(part):
            share = repeated_share(part)
            if share >= SHARE and len(part) >= _most(part):
                return f"{share:.0%} of {name} have occurred before"
        if len(prose) < 2 * TAIL:
            break
    return ""


def _most(piece: str) -> int:
    """How many characters of copies make a loop."""
    if max(piece) >= FIRST_WIDE:
        return WIDE_LOOP_CHARACTERS
    return LOOP_CHARACTERS if any(map(str.isalpha, piece)) else RULER_CHARACTERS


def _may_repeat(text: str) -> bool:
    """A quick look at a few places: False is said of no text of whose n-grams many occur again."""
    step = max(len(text) // PROBES, 1)
    again = sum(text.find(text[at : at + PROBE], at + 1) >= 0 for at in range(0, len(text) - PROBE, step))
    return again >= 2


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


def loop_inside(text: str) -> tuple[int, str]:
    """(number of copies back to back, the piece) of the first loop of a short piece; (0, "") without one."""
    at, size = 0, len(text)
    while at < size - PROBE:
        again = text.find(text[at : at + PROBE], at + 1, at + PROBE + LONGEST_PIECE)
        if again < 0:
            at += STRIDE
            continue
        period, start, end = again - at, at, again + PROBE
        while end < size and text[end] == text[end - period]:
            end += 1
        while start and text[start - 1] == text[start - 1 + period]:
            start -= 1
        piece = text[start : start + period]
        if end - start >= max(COPIES_INSIDE * period, _most(piece)) and not piece.isspace():
            return (end - start) // period, piece
        at = max(end - PROBE, at + STRIDE)
    return 0, ""


def _shown(piece: str) -> str:
    piece = " ".join(piece.split())
    return repr(piece if len(piece) <= 40 else piece[:37] + "...")
