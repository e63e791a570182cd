"""What a row means: a text, a conversation or a preference pair, in the forms that people have.

Every reader yields what it understood, and writes every other row into the `RowReport` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minillm.data.files import Row
from minillm.data.files import RowReport as RowReport
from minillm.data.files import read_rows as read_rows
from minillm.log import UserError

Message = dict[str, str]
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
SHAREGPT_ROLES = ROLES | {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool",
}  # fmt: skip
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"  # zero-width characters: a turn of nothing else is empty

EXPECTED = {
    "pretrain": [
        '{"text": "Once upon a time ..."}',
        "or a .txt file: documents separated by <|endoftext|> or blank lines",
    ],
    "sft": [
        '{"conversations": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        '{"instruction": "...", "input": "...", "output": "..."}',
        '{"prompt": "...", "response": "..."}',
    ],
    "dpo": [
        '{"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}',
        '{"prompt": "...", "chosen": "...", "rejected": "..."}',
        '{"conversations": [{"from": "human", ...}], "chosen": {"from": "gpt", ...}, "rejected": {...}}',
    ],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Document:
    """A text to pretrain on."""

    text: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages {"role", "content"} that end with the assistant."""

    messages: list[Message]
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Pair:
    """Two conversations that begin alike; `chosen` ends better than `rejected`."""

    chosen: list[Message]
    rejected: list[Message]
    file: str
    line: int


class Unusable(Exception):
    """Why a row cannot be used."""


T = TypeVar("T")


def read_texts(path: str | Path, report: RowReport) -> Iterator[str]:
    """Pretraining texts. Raises UserError when there is no usable row."""
    return (document.text for document in read_documents(path, report))


def read_documents(path: str | Path, report: RowReport) -> Iterator[Document]:
    """Pretraining texts with their places. Raises UserError when there is no usable row."""
    return _read(path, report, "pretrain", lambda row: Document(text_of(row.value), row.file, row.line))


def read_conversations(path: str | Path, report: RowReport) -> Iterator[Conversation]:
    """Conversations of any accepted form. Raises UserError when there is no usable row."""
    return _read(path, report, "sft", lambda row: Conversation(conversation_of(row.value), row.file, row.line))


def read_pairs(path: str | Path, report: RowReport) -> Iterator[Pair]:
    """Preference pairs of any accepted form. Raises UserError when there is no usable row."""
    return _read(path, report, "dpo", lambda row: Pair(*pair_of(row.value), row.file, row.line))


def _read(path: str | Path, report: RowReport, stage: str, understand: Callable[[Row], T]) -> Iterator[T]:
    other_stage: dict[str, int] = {}
    for row in read_rows(path, report):
        try:
            understood = understand(row)
        except Unusable as reason:
            report.add(str(reason), row.file, row.line)
            looks = stage_of(row.value)
            other_stage[looks] = other_stage.get(looks, 0) + 1
            continue
        report.used += 1
        yield understood
    if not report.used:
        raise UserError(_no_rows(report, stage, max(other_stage, key=lambda s: other_stage[s], default="")))


def stage_of(row: dict[str, Any]) -> str:
    """The stage that this form of row is for: "pretrain", "sft", "dpo", or "" when it is not recognised."""
    if "chosen" in row and "rejected" in row:
        return "dpo"
    if any(key in row for key in ("conversations", "messages", "instruction", "response", "completion")):
        return "sft"
    return "pretrain" if "text" in row else ""


def _no_rows(report: RowReport, stage: str, looks: str) -> str:
    lines = [f"{report.source}: no usable row for `minillm {stage}` among {report.unusable:,}."]
    lines += [f"  {count:,} x {reason}: {report.places[reason][0]}" for reason, count in report.counts().items()]
    if report.samples:
        lines.append("The first rows are:")
        lines += [f"  {sample}" for sample in report.samples]
    lines.append("Expected is one of:")
    lines += [f"  {form}" for form in EXPECTED[stage]]
    if looks and looks != stage:
        lines.append(f"These rows look like data for `minillm {looks}`.")
    return "\n".join(lines)


def text_of(row: dict[str, Any], column: str = "text") -> str:
    """The text of a {"text"} row, or of one that has it in another column. Raises Unusable."""
    text = row.get(column)
    if text is None:
        raise Unusable(f"no {column} field")
    return _checked_text(text, column)


def conversation_of(row: dict[str, Any]) -> list[Message]:
    """Messages of a row in any of the conversation forms, checked. Raises Unusable."""
    if "chosen" in row and "rejected" in row:
        raise Unusable("a preference pair, not a conversation")
    if "conversations" in row or "messages" in row:
        key = "conversations" if "conversations" in row else "messages"
        messages = _messages(row[key], key)
    elif "instruction" in row:
        messages = _alpaca(row)
    elif "prompt" in row:
        answer = row.get("response", row.get("completion"))
        if answer is None:
            raise Unusable("a prompt without response or completion")
        messages = _turns(row["prompt"], "user", "prompt") + _turns(answer, "assistant", "response")
    else:
        raise Unusable("no conversation fields")
    messages = _with_system(messages, row)
    problem = order_problem(messages)
    if problem:
        raise Unusable(problem)
    return messages


def pair_of(row: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    """(chosen, rejected), each a checked conversation with the prompt in front. Raises Unusable."""
    if "chosen" not in row or "rejected" not in row:
        raise Unusable("no chosen and rejected fields")
    prompt: list[Message] = []
    if row.get("prompt") is not None:
        prompt = _turns(row["prompt"], "user", "prompt")
    elif "conversations" in row or "messages" in row:
        key = "conversations" if "conversations" in row else "messages"
        prompt = _messages(row[key], key)
    sides = []
    for name in ("chosen", "rejected"):
        turns = _turns(row[name], "assistant", name)
        if turns and turns[0]["role"] in ("assistant", "tool"):
            if not prompt:
                raise Unusable(f"no prompt for {name}")
            turns = prompt + turns
        messages = _with_system(turns, row)
        problem = order_problem(messages)
        if problem:
            raise Unusable(f"{name}: {problem}")
        sides.append(messages)
    chosen, rejected = sides
    if chosen == rejected:
        raise Unusable("chosen and rejected are identical")
    if not any(message["role"] == "user" for message in chosen[: shared_prefix(chosen, rejected)]):
        raise Unusable("chosen and rejected answer different prompts")
    return chosen, rejected


def shared_prefix(chosen: list[Message], rejected: list[Message]) -> int:
    """The number of leading messages that both conversations have in common."""
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    return count


def order_problem(messages: list[Message]) -> str:
    """ "" when the turns follow each other as they must, otherwise what is wrong.

    An optional system turn, then user and assistant in turn; tool results stand between two assistant turns;
    the assistant has the last word.
    """
    roles = [message["role"] for message in messages]
    if not roles:
        return "empty conversation"
    for role in ("user", "assistant"):
        if role not in roles:
            return f"no {role} turn"
    if "system" in roles[1:]:
        return "system turn not first"
    turns = roles[1:] if roles[0] == "system" else roles
    if turns[0] != "user":
        return f"first turn is {turns[0]}, not user"
    follows = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
    for before, after in zip(turns, turns[1:], strict=False):
        if after not in follows[before]:
            return f"wrong turn order: {after} after {before}"
    return "" if turns[-1] == "assistant" else "last turn is not the assistant's"


def is_empty(text: str) -> bool:
    """No visible character: white space and zero-width characters only."""
    return all(character.isspace() or character in INVISIBLE for character in text)


def _checked_text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise Unusable(f"{name} is not a string")
    if is_empty(text):
        raise Unusable(f"empty {name}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable(f"{name} holds half a character (a lone surrogate)") from error
    return text


def _turns(value: Any, role: str, name: str) -> list[Message]:
    """A string is one turn of `role`; a message or a list of messages is itself."""
    if isinstance(value, str):
        return [{"role": role, "content": _checked_text(value, name)}]
    return _messages([value] if isinstance(value, dict) else value, name)


def _messages(turns: Any, name: str) -> list[Message]:
    if not isinstance(turns, list):
        raise Unusable(f"{name} is not a list of turns")
    messages = [_message(turn) for turn in turns]
    return [m for m in messages if m["role"] != "system" or m["content"]]


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Unusable("a turn is not an object")
    known_roles = ROLES if "role" in turn else SHAREGPT_ROLES
    role = turn.get("role", turn.get("from"))
    if role is None:
        raise Unusable("a turn has no role")
    known = known_roles.get(role) if isinstance(role, str) else None
    if known is None:
        raise Unusable(f"unknown role {str(role)[:20]!r}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # OpenAI's content parts
        content = _joined_parts(content)
    if content is None:
        raise Unusable(f"{known} turn without content")
    if isinstance(content, str) and is_empty(content) and known in ("system", "tool"):
        return {"role": known, "content": ""}
    return {"role": known, "content": _checked_text(content, f"{known} turn")}


def _joined_parts(parts: list[Any]) -> str:
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) != len(texts):
        raise Unusable("a turn holds parts that are not text")
    return "".join(strings)


def _alpaca(row: dict[str, Any]) -> list[Message]:
    """instruction + input -> output; Dolly's names and earlier rounds in "history" are understood too."""
    answer = row.get("output", row.get("response"))
    if answer is None:
        raise Unusable("an instruction without output")
    question = _checked_text(row["instruction"], "instruction")
    extra = row.get("input", row.get("context"))
    if isinstance(extra, str) and not is_empty(extra):
        question = f"{question}\n{_checked_text(extra, 'input')}"
    elif extra is not None and not isinstance(extra, str):
        raise Unusable("input is not a string")
    messages: list[Message] = []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Unusable("history is not a list of [question, answer]")
        messages += _turns(turn[0], "user", "history") + _turns(turn[1], "assistant", "history")
    return [*messages, *_turns(question, "user", "instruction"), *_turns(answer, "assistant", "output")]


def _with_system(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    system = row.get("system")
    if isinstance(system, str) and not is_empty(system) and (not messages or messages[0]["role"] != "system"):
        return [{"role": "system", "content": _checked_text(system, "system")}, *messages]
    return messages
