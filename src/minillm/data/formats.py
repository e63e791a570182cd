"""What a row means: a text or a conversation, in the forms that people have (pairs, labels, prompts: preferences.py).

Every reader yields what it understood, and writes every other row into the `RowReport` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
# Characters that show nothing, so that a turn of nothing else is empty: soft hyphen, joiners, marks of direction,
# fillers, variants, tags.
INVISIBLE = frozenset(
    chr(code)
    for first, last in (
        (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180E),
        (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x2800, 0x2800), (0x3164, 0x3164), (0xFE00, 0xFE0F),
        (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xE0000, 0xE007F),
    )
    for code in range(first, last + 1)
)  # fmt: skip

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
        '{"prompt": "...", "response": "..."} or {"question": "...", "answer": "..."}',
    ],
    "dpo": [
        '{"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}',
        '{"prompt": "...", "chosen": "...", "rejected": "..."}',
        '{"conversations": [{"from": "human", ...}], "chosen": {"from": "gpt", ...}, "rejected": {...}}',
    ],
    "kto": [
        '{"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "label": true}',
        '{"prompt": "...", "completion": "...", "label": false}',
        '{"conversations": [{"from": "human", ...}, {"from": "gpt", ...}], "kto_tag": true}',
    ],
    "rl": [
        '{"question": "...", "answer": "... #### 42"}',
        '{"prompt": "...", "answer": "42"}, also with "ground_truth" or "solution"',
        '{"prompt": [{"role": "user", "content": "..."}], "answer": "42"}',
    ],
}  # fmt: skip
PURPOSES = {
    "pretrain": "`minillm pretrain`", "sft": "`minillm sft`", "dpo": "`minillm dpo`",
    "kto": "`minillm dpo --loss kto`", "rl": "reinforcement learning (prompts with an answer)",
}  # fmt: skip
CONVERSATION_FIELDS = ("conversations", "messages", "instruction", "response", "completion")
ANSWER_FIELDS = ("answer", "ground_truth", "solution")


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
    return _read(path, report, "sft", lambda row: Conversation(unlabelled(row.value), row.file, row.line))


def _read(path: str | Path, report: RowReport, stage: str, understand: Callable[[Row], T]) -> Iterator[T]:
    return understood(read_rows(path, report), report, stage, understand)


def understood(rows: Iterable[Row], report: RowReport, stage: str, understand: Callable[[Row], T]) -> Iterator[T]:
    """What `understand` makes of each row; rows at which it raises Unusable are written into the report.

    Raises UserError when there is no usable row: with the first rows, the forms that `stage` expects, and the stage
    that the rows look right for.
    """
    other_stage: dict[str, int] = {}
    for row in rows:
        try:
            found = understand(row)
        except Unusable as reason:
            report.add(str(reason), row.file, row.line)
            looks = stage_of(row.value)
            other_stage[looks] = other_stage.get(looks, 0) + 1
            continue
        report.used += 1
        yield found
    if not report.used:
        raise UserError(_no_rows(report, stage, max(other_stage, key=lambda s: other_stage[s], default="")))


def stage_of(row: dict[str, Any]) -> str:
    """The stage that this form of row is for ("pretrain", "sft", "dpo", "kto", "rl"), "" when it is not recognised."""
    if "chosen" in row and "rejected" in row:
        return "dpo"
    if any(key in row for key in CONVERSATION_FIELDS):
        return "kto" if "kto_tag" in row or isinstance(row.get("label"), bool) else "sft"
    if "text" in row:
        return "pretrain"
    asked = "prompt" in row or "question" in row
    return "rl" if asked and any(key in row for key in ANSWER_FIELDS) else ""


def _no_rows(report: RowReport, stage: str, looks: str) -> str:
    lines = [f"{report.source}: no usable row for {PURPOSES[stage]} among {report.unusable:,}."]
    lines += [f"  {count:,} x {reason}: {report.places[reason][0]}" for reason, count in report.counts().items()]
    if report.samples:
        lines.append("The first rows are:")
        lines += [f"  {sample}" for sample in report.samples]
    lines.append("Expected is one of:")
    lines += [f"  {form}" for form in EXPECTED[stage]]
    if looks and looks != stage:
        lines.append(f"These rows look like data for {PURPOSES[looks]}.")
    return "\n".join(lines)


def text_of(row: dict[str, Any], column: str = "text") -> str:
    """The text of a {"text"} row, or of one that has it in another column. Raises Unusable."""
    text = row.get(column)
    if text is None:
        raise Unusable(f"no {column} field")
    return checked_text(text, column)


def unlabelled(row: dict[str, Any]) -> list[Message]:
    """As `conversation_of`, of a row that is to be learned. Raises Unusable also for a labelled answer (KTO): it may be
    an unwanted one."""
    if stage_of(row) == "kto":
        raise Unusable("a labelled answer (wanted or not), not a conversation to learn")
    return conversation_of(row)


def conversation_of(row: dict[str, Any]) -> list[Message]:
    """Messages of a row in any of the conversation forms, checked. Raises Unusable."""
    if "chosen" in row and "rejected" in row:
        raise Unusable("a preference pair, not a conversation")
    if "conversations" in row or "messages" in row:
        key = "conversations" if "conversations" in row else "messages"
        messages = messages_of(row[key], key)
    elif "instruction" in row:
        answer = row.get("output", row.get("response"))
        if answer is None:
            raise Unusable("an instruction without output")
        messages = alpaca_prompt(row) + turns_of(answer, "assistant", "output")
    elif "prompt" in row:
        answer = row.get("response", row.get("completion"))
        if answer is None:
            raise Unusable("a prompt without response or completion")
        messages = turns_of(row["prompt"], "user", "prompt") + turns_of(answer, "assistant", "response")
    elif "question" in row and "answer" in row:
        messages = turns_of(row["question"], "user", "question") + turns_of(row["answer"], "assistant", "answer")
    else:
        raise Unusable("no conversation fields")
    messages = with_system(messages, row)
    problem = order_problem(messages)
    if problem:
        raise Unusable(problem)
    return messages


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


def checked_text(text: Any, name: str) -> str:
    """The text, when it is one and something can be seen of it. Raises Unusable."""
    if not isinstance(text, str):
        raise Unusable(f"{name} is not a string")
    if is_empty(text):
        raise Unusable(f"empty {name}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable(f"{name} holds half a character (a lone surrogate)") from error
    return text


def turns_of(value: Any, role: str, name: str) -> list[Message]:
    """A string is one turn of `role`; a message or a list of messages is itself. Raises Unusable, as do the next."""
    if isinstance(value, str):
        return [{"role": role, "content": checked_text(value, name)}]
    return messages_of([value] if isinstance(value, dict) else value, name)


def messages_of(turns: Any, name: str) -> list[Message]:
    """Turns in the forms of `role` and `from`, as messages; the field's `name` stands in reasons."""
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
    return {"role": known, "content": checked_text(content, f"{known} turn")}


def _joined_parts(parts: list[Any]) -> str:
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) != len(texts):
        raise Unusable("a turn holds parts that are not text")
    return "".join(strings)


def alpaca_prompt(row: dict[str, Any]) -> list[Message]:
    """instruction + input, after earlier rounds in "history"; Dolly's "context" is understood too. Raises Unusable."""
    question = checked_text(row["instruction"], "instruction")
    extra = row.get("input", row.get("context"))
    if isinstance(extra, str) and not is_empty(extra):
        question = f"{question}\n{checked_text(extra, 'input')}"
    elif extra is not None and not isinstance(extra, str):
        raise Unusable("input is not a string")
    messages: list[Message] = []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Unusable("history is not a list of [question, answer]")
        messages += turns_of(turn[0], "user", "history") + turns_of(turn[1], "assistant", "history")
    return messages + turns_of(question, "user", "instruction")


def with_system(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    """The messages behind the system turn that the row carries in "system", unless they begin with one."""
    system = row.get("system")
    if isinstance(system, str) and not is_empty(system) and (not messages or messages[0]["role"] != "system"):
        return [{"role": "system", "content": checked_text(system, "system")}, *messages]
    return messages
