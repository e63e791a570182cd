"""What a row means where answers are judged: a preference pair, a labelled answer (KTO), or a prompt with an answer
that can be checked, in the forms that people have.

As in formats.py, every reader yields what it understood and writes every other row into the `RowReport`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.data.files import RowReport, read_rows
from minillm.data.formats import (
    ANSWER_FIELDS,
    Message,
    Unusable,
    alpaca_prompt,
    checked_text,
    conversation_of,
    is_empty,
    messages_of,
    order_problem,
    turns_of,
    understood,
    with_system,
)

SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # of a dialogue that is written as one text
FINAL = "####"  # GSM8K: worked steps, then this mark and the final answer
# Commas that group the digits of a number in threes, and nothing else that is written with commas.
GROUPED_NUMBER = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
WIDE_SCRIPTS = "\u2e80"  # Chinese and Japanese begin here: no spaces between words


@dataclass(frozen=True, slots=True)
class Pair:
    """Two conversations that begin alike; `chosen` ends better than `rejected`."""

    chosen: list[Message]
    rejected: list[Message]
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """A conversation, and whether its last answer is wanted (True) or not."""

    messages: list[Message]
    label: bool
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class CheckablePrompt:
    """Messages that wait for an answer, and the final answer it should come to."""

    messages: list[Message]
    answer: str
    file: str
    line: int


def read_pairs(path: str | Path, report: RowReport) -> Iterator[Pair]:
    """Preference pairs of any accepted form. Raises UserError when there is no usable row."""
    rows = read_rows(path, report)
    return understood(rows, report, "dpo", lambda row: Pair(*pair_of(row.value), row.file, row.line))


def read_labelled(path: str | Path, report: RowReport) -> Iterator[LabelledAnswer]:
    """Labelled answers of any accepted form. Raises UserError when there is no usable row."""
    rows = read_rows(path, report)
    return understood(rows, report, "kto", lambda row: LabelledAnswer(*labelled_of(row.value), row.file, row.line))


def read_prompts(path: str | Path, report: RowReport) -> Iterator[CheckablePrompt]:
    """Prompts with their answers, of any accepted form. Raises UserError when there is no usable row."""
    rows = read_rows(path, report)
    return understood(rows, report, "rl", lambda row: CheckablePrompt(*prompt_of(row.value), row.file, row.line))


def pair_of(row: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    """(chosen, rejected), each a checked conversation with the prompt in front. Raises Unusable."""
    if "chosen" not in row or "rejected" not in row:
        raise Unusable("no chosen and rejected fields")
    prompt, values = _explicit_prompt(row), {name: row[name] for name in ("chosen", "rejected")}
    if not prompt and all(isinstance(value, str) for value in values.values()):
        prompt, values = _implicit_prompt(values)
    sides = []
    for name, value in values.items():
        turns = turns_of(value, "assistant", name)
        if turns and turns[0]["role"] in ("assistant", "tool"):
            if not prompt:
                raise Unusable(f"no prompt for {name}")
            turns = prompt + turns
        messages = with_system(turns, row)
        problem = order_problem(messages)
        if problem:
            raise Unusable(f"{name}: {problem}")
        sides.append(messages)
    chosen, rejected = sides
    if chosen == rejected:
        raise Unusable("chosen and rejected are identical")
    common = shared_prefix(chosen, rejected)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) == common:
            raise Unusable(f"{name} is only the beginning of the other side")
        if side[common]["role"] != "assistant":
            raise Unusable("chosen and rejected answer different prompts")
    return chosen, rejected


def shared_prefix(chosen: list[Message], rejected: list[Message]) -> int:
    """The number of leading messages that both conversations have in common."""
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    return count


def _explicit_prompt(row: dict[str, Any]) -> list[Message]:
    """The prompt that has a field of its own, [] where none has."""
    if row.get("prompt") is not None:
        return turns_of(row["prompt"], "user", "prompt")
    for key in ("conversations", "messages"):
        if row.get(key) is not None:
            return messages_of(row[key], key)
    return alpaca_prompt(row) if row.get("instruction") is not None else []


def _implicit_prompt(sides: dict[str, str]) -> tuple[list[Message], dict[str, Any]]:
    """(prompt, sides) of two texts that contain their prompt: dialogues with Human: and Assistant:, or any two texts
    that begin alike, up to the word in which they part. An empty prompt where they do not begin alike."""
    for name, text in sides.items():
        checked_text(text, name)
    chosen, rejected = sides.values()
    if chosen == rejected:
        raise Unusable("chosen and rejected are identical")
    dialogues = {name: _dialogue(text) for name, text in sides.items()}
    if all(dialogues.values()):
        return [], dialogues
    cut = 0
    while cut < min(len(chosen), len(rejected)) and chosen[cut] == rejected[cut]:
        cut += 1
    while cut and _in_word(chosen[cut - 1]) and any(_in_word(text[cut : cut + 1]) for text in (chosen, rejected)):
        cut -= 1
    prompt = chosen[:cut].strip()
    if is_empty(prompt):
        return [], dict(sides)
    answers = {name: text[cut:].strip() for name, text in sides.items()}
    return turns_of(prompt, "user", "prompt"), answers


def _in_word(character: str) -> bool:
    return character.isalnum() and character < WIDE_SCRIPTS


def _dialogue(text: str) -> list[Message]:
    """The turns of "Human: ... Assistant: ...", [] for a text that does not begin so."""
    before, *parts = SPEAKER.split(text.strip())
    if before or not parts or parts[0] != "Human":
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [
        {"role": roles[who], "content": checked_text(content.strip(), f"{roles[who]} turn")} for who, content in turns
    ]


def labelled_of(row: dict[str, Any]) -> tuple[list[Message], bool]:
    """(messages, is the last answer wanted) of a conversation in any form with "label" or "kto_tag". Raises
    Unusable."""
    label = row.get("label") if row.get("kto_tag") is None else row["kto_tag"]
    if label is None:
        raise Unusable("no label")
    if not isinstance(label, bool):
        raise Unusable("label is neither true nor false")
    return conversation_of(row), label


def prompt_of(row: dict[str, Any]) -> tuple[list[Message], str]:
    """(messages that end before the answer, final answer). Raises Unusable."""
    name = next((name for name in ("prompt", "question") if row.get(name) is not None), "")
    if not name:
        raise Unusable("no prompt or question")
    messages = with_system(turns_of(row[name], "user", name), row)
    if messages and messages[-1]["role"] == "assistant":
        raise Unusable("the prompt already ends with an answer")
    problem = order_problem([*messages, {"role": "assistant", "content": FINAL}])
    if problem:
        raise Unusable(problem)
    answer = next((row[name] for name in ANSWER_FIELDS if row.get(name) is not None), None)
    if answer is None:
        raise Unusable("no answer, ground_truth or solution")
    return messages, final_answer(answer)


def final_answer(answer: Any) -> str:
    """What an answer comes to: the text after the last ####, or all of it; 1,200 is written 1200. Raises Unusable
    for an answer that is empty or has several lines, which could not be compared."""
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        return str(answer)
    text = checked_text(answer, "answer").rpartition(FINAL)[2].strip()
    if is_empty(text):
        raise Unusable(f"no answer after {FINAL}")
    if "\n" in text:
        raise Unusable("the answer has several lines: it cannot be checked")
    return GROUPED_NUMBER.sub(lambda number: number.group().replace(",", ""), text)
