"""What is looked at in one row: from its bytes to messages that are fit for training, or the reason why not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minillm.data.clean import contamination, duplicates, language, pii
from minillm.data.clean.encoding import encoding_problem
from minillm.data.clean.markup import markup_problem
from minillm.data.clean.repetition import loop_problem
from minillm.data.files import parse_json
from minillm.data.formats import INVISIBLE, Message, Unusable, conversation_of

REASONS = {
    "broken_json": "the line is no JSON object",
    "non_utf8": "the line holds bytes that are not UTF-8",
    "missing_role": "a role, a text or one of the two speakers is missing, or the row is no conversation",
    "wrong_role_order": "the turns do not follow each other as they must",
    "empty_question": "a user turn without a visible character",
    "empty_answer": "an answer without a visible character",
    "short_answer": "an answer with fewer characters than --min_chars",
    "over_long": "more characters than --max_chars",
    "replacement_character": "U+FFFD, which stands for lost bytes",
    "control_character": "control characters in the text",
    "mojibake": "text that was decoded as the wrong character set",
    "html_boilerplate": "tags, entities, scripts or furniture of a web page in an answer",
    "repeated_ngram": "an answer that runs in a loop",
    "language": "another language than --languages",
    "contaminated": "13 words (Chinese: characters) in common with a file of --decontaminate",
    "exact_duplicate": "the same messages as an earlier row",
    "near_duplicate": "the same letters and digits as an earlier row, or nearly the same text",
}
_NO_SPACE = dict.fromkeys(map(ord, INVISIBLE))


class Removal(NamedTuple):
    """Why a row is removed; `of` is the place of the row that it repeats."""

    reason: str
    detail: str = ""
    of: str = ""


class Unfit(Exception):
    """A row is to be removed, for this reason."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.removal = Removal(reason, detail)


@dataclass(frozen=True)
class Rules:
    """What the rows are held to; `evaluation` are sorted hashes of n-grams that must not occur, uint64 [N]."""

    min_chars: int
    max_chars: int
    languages: tuple[str, ...]
    near_duplicates: str
    mask_pii: bool
    evaluation: np.ndarray


@dataclass
class Chunk:
    """Rows of one file that follow each other: (line, bytes of the line, an object, or why it could not be read)."""

    file: str
    rows: list[tuple[int, bytes | dict[str, Any] | Removal]] = field(default_factory=list)


@dataclass
class Checked:
    """What became of a chunk. Fit rows are JSON lines; the arrays have one entry for each of them, in order."""

    file: str
    lines: list[int]
    rows: list[bytes | Removal]
    exact_keys: list[bytes]
    same_keys: list[bytes]  # empty where near duplicates are not looked for
    values: np.ndarray | None  # MinHash, uint16 [n, 2, 64]
    band_keys: np.ndarray | None  # uint64 [n, 16]
    languages: Counter[str]
    masked: Counter[str]


def check_chunk(chunk: Chunk, rules: Rules) -> Checked:
    """Checks each row by itself, and computes what tells whether it repeats another."""
    import orjson

    result = Checked(chunk.file, [line for line, _ in chunk.rows], [], [], [], None, None, Counter(), Counter())
    sides = []
    for _, row in chunk.rows:
        try:
            messages = fit_messages(row, rules, result)
        except Unfit as unfit:
            result.rows.append(unfit.removal)
            continue
        serialized = orjson.dumps({"conversations": messages}, option=orjson.OPT_APPEND_NEWLINE)
        result.rows.append(serialized)
        result.exact_keys.append(duplicates.exact_key(serialized))
        if rules.near_duplicates != "off":
            normal = [duplicates.normal_form(message["content"]) for message in messages]
            result.same_keys.append(duplicates.same_key(messages, normal))
            if rules.near_duplicates == "similar":
                sides.append(duplicates.two_sides(messages, normal))
    if sides:
        result.values, result.band_keys = duplicates.signatures(sides)
    return result


def fit_messages(row: bytes | dict[str, Any] | Removal, rules: Rules, counts: Checked) -> list[Message]:
    """The messages of a row, personal data masked where that is wanted. Raises Unfit."""
    if isinstance(row, Removal):
        raise Unfit(row.reason, row.detail)
    messages = _messages(row)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    text = "\n".join(message["content"] for message in messages)
    if len(text) > rules.max_chars:
        raise Unfit("over_long", f"{len(text):,} characters")
    problem = encoding_problem(text)
    if problem:
        raise Unfit(*problem)
    for answer in answers:
        if len(answer) < rules.min_chars * 8 and _visible(answer) < rules.min_chars:
            raise Unfit("short_answer", f"an answer shorter than {rules.min_chars} characters")
    question = "\n".join(message["content"] for message in messages if message["role"] == "user")
    for answer in answers:
        remains = markup_problem(question, answer)
        if remains:
            raise Unfit("html_boilerplate", remains)
        loop = loop_problem(answer)
        if loop:
            raise Unfit("repeated_ngram", loop)
    _check_language(question, answers, rules, counts)
    if len(rules.evaluation):
        for message in messages:
            if message["role"] != "system" and contamination.overlaps(message["content"], rules.evaluation):
                raise Unfit("contaminated", f"the {message['role']} turn")
    if rules.mask_pii:
        return [{**message, "content": pii.mask(message["content"], counts.masked)} for message in messages]
    return messages


def _visible(text: str) -> int:
    return len("".join(text.translate(_NO_SPACE).split()))


def _messages(row: bytes | dict[str, Any]) -> list[Message]:
    """The checked messages of a line or an object, in any conversation form. Raises Unfit."""
    if isinstance(row, bytes):
        value, reason = parse_json(row)
        if reason:
            raise Unfit("non_utf8" if reason == "invalid UTF-8" else "broken_json", reason)
        if not isinstance(value, dict):
            raise Unfit("broken_json", "not a JSON object")
        row = value
    try:
        return conversation_of(row)
    except Unusable as problem:
        raise Unfit(schema_reason(str(problem)), str(problem)) from None


def schema_reason(problem: str) -> str:
    """The name of what `minillm.data.formats` found wrong with a row."""
    if problem.startswith(("empty assistant", "empty output", "empty response")):
        return "empty_answer"
    if problem.startswith(("empty user", "empty instruction", "empty prompt")):
        return "empty_question"
    if problem.startswith(("wrong turn order", "system turn not first", "first turn is", "last turn is")):
        return "wrong_role_order"
    return "missing_role"


def _check_language(question: str, answers: list[str], rules: Rules, counts: Checked) -> None:
    """Counts the row's language. Raises Unfit when it is another than wanted, and so is that of the question alone: a
    translation into a third language is a row in the language of its question."""
    if not rules.languages:
        counts.languages[language.quick_language(f"{question[:300]}\n{answers[0][:300]}")] += 1
        return
    found = language.language_of("\n".join([question, *answers]), rules.languages)
    if found not in (language.UNDECIDED, *rules.languages):
        asked = language.language_of(question, rules.languages)
        if asked not in rules.languages:
            raise Unfit("language", found)
    counts.languages[found] += 1
