"""`minillm data prepare-reasoning`: reasoning traces from a model behind an OpenAI-compatible endpoint.

Every prompt is asked `--samples` times; a reply is kept when it has a chain of thought and its answer is right
(rejection sampling). Replies are noted in OUTPUT.replies as they come, so that an interrupted run goes on where it was.
OUTPUT, rows that `minillm reason` and `minillm sft` read, is written at the end, whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from minillm import log
from minillm.config import UsageError
from minillm.data.endpoint import Endpoint, Reply, ask_all
from minillm.data.files import PREPARED_SUFFIX, RowReport
from minillm.data.formats import Message, understood
from minillm.data.preferences import CheckablePrompt, prompt_of
from minillm.data.preparing import input_identity, input_rows
from minillm.log import UserError

GENERATOR = "minillm data prepare-reasoning"
REPLIES_SUFFIX = ".replies"
INSTRUCTION = (
    "Think step by step. Write your thoughts between <think> and </think>, and after them only the final answer "
    "between <answer> and </answer>."
)


@dataclass(frozen=True)
class PrepareReasoningSettings:
    """Prepare reasoning traces"""

    input: str = field(
        metadata={"help": "prompts with answers: file, folder or glob (json, jsonl, parquet), or a hub dataset"}
    )
    output: str = field(metadata={"help": "jsonl file for the traces"})
    model: str = field(metadata={"help": "the model's name at the endpoint"})
    endpoint: str = field(
        default="http://127.0.0.1:8000/v1",
        metadata={"help": "where /chat/completions is; a key in OPENAI_API_KEY is sent along"},
    )
    samples: int = field(default=4, metadata={"help": "replies to each prompt", "min": 1})
    temperature: float = field(default=0.8, metadata={"help": "of the replies", "min": 0.0})
    max_tokens: int = field(default=1024, metadata={"help": "of a reply; one that is cut off is dropped", "min": 1})
    concurrency: int = field(default=8, metadata={"help": "requests at the same time", "min": 1})
    timeout: float = field(default=300.0, metadata={"help": "seconds to wait for a reply", "above": 0.0})
    split: str = field(default="train", metadata={"help": "of a hub dataset"})
    seed: int = field(default=42, metadata={"help": "of the replies; each has one of its own", "min": 0})


class Trace(NamedTuple):
    """A reply taken apart."""

    thought: str
    answer: str

    @property
    def text(self) -> str:
        return f"<think>\n{self.thought}\n</think>\n<answer>\n{self.answer}\n</answer>"


class Dropped(Exception):
    """Why a reply is not kept."""


def run(settings: PrepareReasoningSettings) -> None:
    """Ask, check and write as the settings say.

    Raises:
        UsageError: --output is no .jsonl file.
        UserError: the input cannot be read, something else stands where the output is to be, or the endpoint does
            not answer. What it replied until then is kept.
    """
    output = Path(settings.output)
    if output.suffix != ".jsonl":
        raise UsageError(f"--output {output}: give a name that ends in .jsonl")
    _refuse_others(output)
    report = RowReport(settings.input)
    rows = input_rows(settings.input, settings.split, report)
    prompts = list(
        understood(rows, report, "rl", lambda row: CheckablePrompt(*prompt_of(row.value), row.file, row.line))
    )
    report.log()
    replies = _replies(settings, prompts, output.with_name(output.name + REPLIES_SUFFIX))
    _write(settings, prompts, replies, report, output)


def _refuse_others(output: Path) -> None:
    """Raises UserError for an output that is there and is not what an earlier run wrote."""
    from minillm.data.store import file_sha256

    if not output.exists():
        return
    try:
        record = json.loads(output.with_name(output.name + PREPARED_SUFFIX).read_text(encoding="utf-8"))
        ours = record["generator"] == GENERATOR and record["sha256"] == file_sha256(output)
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{output} is there and is not what {GENERATOR} wrote: give another --output")


def _replies(
    settings: PrepareReasoningSettings, prompts: list[CheckablePrompt], journal: Path
) -> dict[tuple[int, int], Reply]:
    """(prompt, sample) -> reply: those noted by an earlier run, and the others asked for now."""
    head = {"generator": GENERATOR, "fingerprint": _fingerprint(settings)}
    known = _noted(journal, head)
    wanted = [(i, sample) for i in range(len(prompts)) for sample in range(settings.samples)]
    missing = [key for key in wanted if key not in known]
    if len(missing) < len(wanted):
        log.info(f"[data] {journal} holds {len(wanted) - len(missing):,} of {len(wanted):,} replies")
    if missing:
        endpoint = Endpoint(settings.endpoint, settings.model, settings.timeout)
        requests = (
            (
                key,
                {
                    "messages": instructed(prompts[key[0]].messages), "temperature": settings.temperature,
                    "max_tokens": settings.max_tokens, "seed": settings.seed + key[0] * 100_003 + key[1],
                },
            )
            for key in missing
        )  # fmt: skip
        journal.parent.mkdir(parents=True, exist_ok=True)
        with open(journal, "a", encoding="utf-8") as notes, log.progress(len(missing), "replies") as bar:
            if notes.tell() == 0:
                notes.write(json.dumps(head) + "\n")
            for key, reply in ask_all(endpoint, requests, settings.concurrency):
                known[key] = reply
                notes.write(json.dumps({"prompt": key[0], "sample": key[1], **reply._asdict()}) + "\n")
                notes.flush()
                bar.advance()
    return {key: known[key] for key in wanted if key in known}


def _fingerprint(settings: PrepareReasoningSettings) -> str:
    """Of what a reply follows from. More --samples ask for more, another --endpoint may serve the same model."""
    used = {name: getattr(settings, name) for name in ("model", "temperature", "max_tokens", "seed", "split")}
    text = json.dumps([used, INSTRUCTION, input_identity(settings.input)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _noted(journal: Path, head: dict[str, str]) -> dict[tuple[int, int], Reply]:
    """The replies of an interrupted run; a last line that is not whole is cut off. Raises UserError for those of
    another run."""
    if not journal.exists():
        return {}
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(journal, "r+b") as notes:
            notes.truncate(len(whole))
    lines = [json.loads(line) for line in whole.splitlines()]
    if lines and lines[0] != head:
        raise UserError(
            f"{journal} holds replies of other prompts, another model or other settings: give another --output, or "
            "delete it"
        )
    return {(line.pop("prompt"), line.pop("sample")): Reply(**line) for line in lines[1:]}


def instructed(messages: list[Message]) -> list[Message]:
    """The prompt with what the endpoint's model is to do. The instruction does not become part of a trace."""
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{INSTRUCTION}"}, *messages[1:]]
    return [{"role": "system", "content": INSTRUCTION}, *messages]


def trace_of(reply: Reply, expected: str) -> Trace:
    """Thought and answer of a reply whose answer should be `expected`. The thought stands in tags or, as some servers
    give it, in a field of its own; an answer that is not marked is the last number, where a number is expected, else
    all that follows the thought. Raises Dropped."""
    from minillm.text.answers import as_number, final_answer, has_format, marked_answer

    if reply.finish == "length":
        raise Dropped("cut off at max_tokens")
    thought, rest = reply.reasoning, reply.content
    if not thought.strip():
        before, closed, rest = reply.content.partition("</think>")
        if not closed:
            raise Dropped("no chain of thought")
        thought = before.replace("<think>", "", 1)
    answer = marked_answer(rest)
    if answer is None:
        number = final_answer(rest) if as_number(expected) is not None else None
        answer = number or rest.strip()
    trace = Trace(thought.strip(), answer)
    if not trace.thought:
        raise Dropped("no chain of thought")
    if not trace.answer:
        raise Dropped("no answer")
    if not has_format(trace.text):
        raise Dropped("tags inside the thought or the answer")
    return trace


def _kept(
    prompts: list[CheckablePrompt], replies: dict[tuple[int, int], Reply], samples: int, dropped: dict[str, int]
) -> Iterator[tuple[int, Trace]]:
    """(prompt, trace) of every reply that is right and is not an earlier one of the same prompt again."""
    from minillm.text.answers import is_right

    for index, prompt in enumerate(prompts):
        seen: set[str] = set()
        for sample in range(samples):
            reply = replies.get((index, sample))
            try:
                if reply is None:
                    raise Dropped("no reply")
                trace = trace_of(reply, prompt.answer)
                if not is_right(trace.text, prompt.answer):
                    raise Dropped("wrong answer")
                if trace.text in seen:
                    raise Dropped("the same again")
            except Dropped as reason:
                dropped[str(reason)] = dropped.get(str(reason), 0) + 1
                continue
            seen.add(trace.text)
            yield index, trace


def _write(
    settings: PrepareReasoningSettings, prompts: list[CheckablePrompt], replies: dict[tuple[int, int], Reply],
    report: RowReport, output: Path,
) -> None:  # fmt: skip
    """The traces, and a side file that says what was kept and dropped."""
    import orjson

    from minillm.data.clean.output import written_whole

    dropped: dict[str, int] = {}
    digest, kept, solved = hashlib.sha256(), 0, set()
    with written_whole([output, output.with_name(output.name + PREPARED_SUFFIX)]) as (stream, side):
        for index, trace in _kept(prompts, replies, settings.samples, dropped):
            messages = [*prompts[index].messages, {"role": "assistant", "content": trace.text}]
            line = orjson.dumps({"conversations": messages}, option=orjson.OPT_APPEND_NEWLINE)
            stream.write(line)
            digest.update(line)
            kept += 1
            solved.add(index)
        counts = {"replies": len(replies), "kept": kept, "dropped": dict(sorted(dropped.items()))}
        counts |= {"prompts": len(prompts), "prompts_with_a_trace": len(solved)}
        record = {
            "generator": GENERATOR, "settings": asdict(settings), **counts, "sha256": digest.hexdigest(),
            "rows": {"used": report.used, "unusable": report.counts()},
        }  # fmt: skip
        side.write(json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n")
        reasons = "".join(f", {count:,} x {reason}" for reason, count in sorted(dropped.items()))
        summary = f"{kept:,} of {len(replies):,} replies kept ({len(solved):,} of {len(prompts):,} prompts){reasons}"
        if not kept:
            raise UserError(f"no reply could be kept: {summary}. The replies are in {output}{REPLIES_SUFFIX}")
    log.info(f"[data] {output}: {summary}")
