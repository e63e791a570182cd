"""What an answer comes to, and whether that is right. The same functions are a reward and a metric of evaluation.

Everything here takes time in proportion to the text, whatever a model has written: there are no numbers too long to
be computed and no patterns that go back and forth.
"""

from __future__ import annotations

import re
from fractions import Fraction

ANSWER_TAGS = ("<answer>", "</answer>")
THOUGHT_TAGS = ("<think>", "</think>")
FINAL_MARK = "####"  # GSM8K: worked steps, then this mark and the final answer
BOXED = "\\boxed{"
LONGEST = 200  # characters of an answer that is read as a number
WIDE = str.maketrans("０１２３４５６７８９．，－＋％／＝：", "0123456789.,-+%/=:")  # full-width signs of Chinese texts
# What LaTeX writes around a number, and what it means.
LATEX = {
    "{,}": ",", "\\$": "$", "\\%": "%", "\\,": "", "\\!": "", "\\;": "", "\\(": " ", "\\)": " ", "\\[": " ", "\\]": " ",
    "\\left": "", "\\right": "", "^\\circ": "", "\\circ": "",
}  # fmt: skip
LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([-+]?[0-9.,]{1,30})\}\{([0-9.,]{1,30})\}")
LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}")
UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:/[1-9][0-9]*)?"
# In a text: a minus is a sign where no number or word stands before it; 10-3 is not minus three.
NUMBER = re.compile(rf"(?:(?<![\w.)\]}}])[-\u2212])?{UNSIGNED}", re.ASCII)
# A whole answer: one number, with words, units and currency signs around it, but nothing that would compute with it.
WORDS = r"[^0-9\\^_*+/<>|={}\[\]\u221a\u2212-]*"
ONE_NUMBER = re.compile(rf"{WORDS}(?<![A-Za-z.])([-+\u2212]?{UNSIGNED})(?![A-Za-z]){WORDS}")
AROUND = " \t\r\n$*.。!！;；,，:\"'“”`"


def after_thinking(text: str) -> str:
    """What follows the last </think>, or all of a text without one."""
    return text.rpartition(THOUGHT_TAGS[1])[2].strip()


def marked_answer(text: str) -> str | None:
    """What is marked as the final answer: between the last <answer> and its </answer>, else behind the last ####
    (to the end of the line), else in the last \\boxed{}; None where nothing is marked."""
    open_tag, close_tag = ANSWER_TAGS
    end = text.rfind(close_tag)
    start = text.rfind(open_tag, 0, end) if end >= 0 else -1
    if start >= 0:
        inside = text[start + len(open_tag) : end]
        return _by_mark(inside) or inside.strip()
    return _by_mark(text)


def _by_mark(text: str) -> str | None:
    _, mark, last = text.rpartition(FINAL_MARK)
    if mark:
        return last.strip().partition("\n")[0].strip()
    return _boxed(text)


def _boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}, whose braces may be nested; None where it is missing or never closed."""
    start = text.rfind(BOXED)
    if start < 0:
        return None
    start += len(BOXED)
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place].strip()
    return None


def has_format(text: str) -> bool:
    """`<think>...</think><answer>...</answer>` and nothing else: each tag once, something between both pairs, white
    space around them at most."""
    tags = (*THOUGHT_TAGS, *ANSWER_TAGS)
    if any(text.count(tag) != 1 for tag in tags):
        return False
    before, rest = text.split(tags[0])
    thought, _, rest = rest.partition(tags[1])
    between, _, rest = rest.partition(tags[2])
    answer, _, behind = rest.partition(tags[3])
    in_order = len("".join((before, thought, between, answer, behind, *tags))) == len(text)
    return in_order and not (before + between + behind).strip() and bool(thought.strip() and answer.strip())


def final_answer(text: str) -> str | None:
    """What a completion comes to: what is marked, else the last number behind the thinking; None where there is
    neither."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    last = None
    for found in NUMBER.finditer(_tidy(after_thinking(text))):
        last = found
    return last.group() if last else None


def as_number(text: str) -> Fraction | None:
    """The one number that a short answer says, exactly: 18, 1,200, -0.50, 3/4, $18, 18 apples, x = 18, \\frac{3}{4}.
    A percent sign is a unit like any other: 50 % is 50.

    None where there is no number, several (`5 or 6`), or a formula (`2^10`, `3x`).
    """
    if len(text) > LONGEST:
        return None
    found = ONE_NUMBER.fullmatch(_tidy(text).rpartition("=")[2].strip(" \t\r\n*"))
    if not found:
        return None
    above, _, below = found[1].replace(",", "").replace("\u2212", "-").partition("/")
    return Fraction(above) / int(below or 1)


def _tidy(text: str) -> str:
    """The same with plain digits, fractions as a/b, and without LaTeX's signs around numbers."""
    text = text.translate(WIDE)
    if "\\" in text or "{" in text:
        text = LATEX_TEXT.sub(r" \1 ", LATEX_FRACTION.sub(r"\1/\2", text))
        for written, meant in LATEX.items():
            text = text.replace(written, meant)
    return text


def _plain(text: str) -> str:
    """Words alone: lower case, one space between them, no punctuation around them."""
    return " ".join(text.translate(WIDE).casefold().split()).strip(AROUND)


def is_right(completion: str, answer: str) -> bool:
    """Does the completion come to the answer?

    A number must be exactly the same number, however it is written. Another answer must be the same text, letter
    case and punctuation around it aside; without a mark it must be all that is said behind the thinking.
    """
    wanted_text = marked_answer(answer)
    wanted_text = answer.strip() if wanted_text is None else wanted_text
    wanted = as_number(wanted_text)
    marked = marked_answer(completion)
    if wanted is not None:
        found = final_answer(completion) if marked is None else marked
        return found is not None and as_number(found) == wanted
    found = after_thinking(completion) if marked is None else marked
    return bool(_plain(wanted_text)) and _plain(found) == _plain(wanted_text)
