"""Constraints on an answer that a program can verify, in the style of IFEval (arXiv 2311.07911).

A constraint is {"kind": ..., and what the kind asks for}. White space around an answer never counts. A constraint
is met or not; nothing is forgiven (IFEval's strict accuracy).
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.eval.text_metrics import CJK, words

PROMPTS = Path(__file__).parent / "data"
LANGUAGES = ("en", "zh")
MANY = 10**9  # where there is no upper limit

# A sentence ends at 。！？, and at . ! ? before white space (3.5 is one number), closing quotes and brackets included.
SENTENCE_END = re.compile(r"[。！？]+[”’」』）]*|[.!?]+[\"'”’)]*(?=\s|$)|\n+")
LIST_ITEM = re.compile(r"^[ \t]*(?:[-*•][ \t]+|\d+[.)][ \t]+|\d+、[ \t]*)\S", re.MULTILINE)
FENCED_JSON = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
# An English word has five letters or so, a Chinese one two characters: a Chinese text with a few English names has
# many Latin letters, an English text has hardly a Chinese character.
LEAST_SHARE = {"en": 0.9, "zh": 0.5}


def word_count(answer: str, min: int = 0, max: int = MANY) -> bool:
    """Between min and max words; a Chinese character is one."""
    return min <= len(words(answer)) <= max


def sentence_count(answer: str, min: int = 0, max: int = MANY) -> bool:
    """Between min and max sentences; a line break ends one as well."""
    return min <= sum(bool(words(part)) for part in SENTENCE_END.split(answer)) <= max


def character_count(answer: str, min: int = 0, max: int = MANY) -> bool:
    """Between min and max characters, punctuation included, white space not."""
    return min <= len("".join(answer.split())) <= max


def paragraph_count(answer: str, min: int = 0, max: int = MANY) -> bool:
    """Between min and max paragraphs, which blank lines separate."""
    return min <= len([part for part in re.split(r"\n[ \t]*\n", answer) if part.strip()]) <= max


def list_items(answer: str, count: int) -> bool:
    """Exactly count lines that begin like a list's: -, *, • or a number."""
    return len(LIST_ITEM.findall(answer)) == count


def occurrences(text: str, keyword: str) -> int:
    """How often a keyword stands in the text, in any case; a Latin one as a whole word."""
    border = r"\b" if re.fullmatch(r"[A-Za-z0-9]+", keyword) else ""
    return len(re.findall(border + re.escape(keyword) + border, text, re.IGNORECASE | re.ASCII))


def keywords(answer: str, words: Sequence[str], min: int = 1, max: int = MANY) -> bool:
    """Each of the words, between min and max times."""
    return all(min <= occurrences(answer, word) <= max for word in words)


def forbidden(answer: str, words: Sequence[str]) -> bool:
    """None of the words (or signs, such as a comma)."""
    return not any(occurrences(answer, word) for word in words)


def language(answer: str, name: str) -> bool:
    """English: at least 0.9 of the letters are Latin. Chinese: at least half are Chinese characters."""
    chinese, latin = len(re.findall(f"[{CJK}]", answer)), len(re.findall("[A-Za-z]", answer))
    letters = sum(character.isalpha() for character in answer)
    return letters > 0 and (latin if name == "en" else chinese) >= LEAST_SHARE[name] * letters


def json_object(answer: str, keys: Sequence[str]) -> bool:
    """The whole answer is a JSON object with these keys; a Markdown fence around it is allowed."""
    fenced = FENCED_JSON.fullmatch(answer)
    try:
        value = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(keys) <= value.keys()


def starts_with(answer: str, text: str) -> bool:
    """The first characters, exactly."""
    return answer.startswith(text)


def ends_with(answer: str, text: str) -> bool:
    """The last characters, exactly."""
    return answer.endswith(text)


def lowercase(answer: str) -> bool:
    """Letters, and none of them a capital."""
    return answer.islower()


def uppercase(answer: str) -> bool:
    """Letters, and all of them capitals (Chinese characters have no case)."""
    return answer.isupper()


def one_of(answer: str, answers: Sequence[str]) -> bool:
    """One of the answers and nothing else, in any case; a full stop may follow."""
    return answer.rstrip(".。").lower() in [allowed.lower() for allowed in answers]


CHECKS: dict[str, Callable[..., bool]] = {
    "words": word_count,
    "sentences": sentence_count,
    "characters": character_count,
    "paragraphs": paragraph_count,
    "list": list_items,
    "keywords": keywords,
    "forbidden": forbidden,
    "language": language,
    "json": json_object,
    "starts_with": starts_with,
    "ends_with": ends_with,
    "lowercase": lowercase,
    "uppercase": uppercase,
    "one_of": one_of,
}


def check_known(constraint: Mapping[str, Any]) -> None:
    """ValueError unless the kind exists and takes exactly such arguments."""
    kind = constraint.get("kind")
    if kind not in CHECKS:
        raise ValueError(f"constraint kind {kind!r} does not exist; there is: {', '.join(CHECKS)}")
    try:
        inspect.signature(CHECKS[kind]).bind("", **_arguments(constraint))
    except TypeError as error:
        raise ValueError(f"constraint {dict(constraint)}: {error}") from None


def is_met(constraint: Mapping[str, Any], answer: str) -> bool:
    """Does the answer keep to the constraint? An empty answer meets none, not even that a word is absent."""
    text = answer.strip()
    return bool(text) and CHECKS[constraint["kind"]](text, **_arguments(constraint))


def _arguments(constraint: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in constraint.items() if name != "kind"}


@dataclass(frozen=True)
class ConstrainedPrompt:
    """An instruction with what can be verified about its answer."""

    name: str
    language: str  # "en" | "zh": the instruction's; an answer in the other one may be what is asked for
    prompt: str
    constraints: tuple[dict[str, Any], ...]
    example: str  # an answer that meets all of them


def shipped_prompts() -> list[ConstrainedPrompt]:
    """Ours: English, then Chinese."""
    prompts = []
    for language_name in LANGUAGES:
        lines = (PROMPTS / f"instructions_{language_name}.jsonl").read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            for constraint in row["constraints"]:
                check_known(constraint)
            name = f"{language_name}-{number:02d}"
            prompts.append(
                ConstrainedPrompt(name, language_name, row["prompt"], tuple(row["constraints"]), row["example"])
            )
    return prompts
