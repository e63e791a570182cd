"""minillm evaluate-instructions: how a checkpoint answers. Quality against references, verifiable constraints, final
answers, form.

The answers come from `generate` and the likelihood from `score`, so every family is evaluated in the same way. The
same settings give the same files, byte for byte. docs/evaluation.md describes what is written.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minillm.atomic import write_text
from minillm.eval.answers import (
    Answer,
    Reference,
    form_of,
    last_run,
    score_references,
    share,
    summarise_form,
    write_answers,
)
from minillm.eval.constraints import LANGUAGES, ConstrainedPrompt, is_met, shipped_prompts
from minillm.eval.final_answers import evaluate_final_answers, read_checkable
from minillm.eval.instruction_report import markdown, tables
from minillm.eval.output import make_room
from minillm.eval.text_metrics import chrf, rouge_l, sacrebleu_metrics
from minillm.log import UserError, warn

if TYPE_CHECKING:
    from minillm.checkpoint.model import OpenedCheckpoint
    from minillm.data.formats import Conversation
    from minillm.families.base import Family

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class InstructionSettings:
    """Evaluate how a checkpoint answers instructions"""

    checkpoint: str = field(metadata={"help": "full checkpoint (.pt) or flat weights (.pth)"})
    data_path: str = field(
        default="",
        metadata={"help": "held-out conversations; last turns are references (default: the shipped prompts alone)"},
    )
    answers_path: str = field(
        default="",
        metadata={"help": "prompts with final answers (GSM8K's form, or prompt and answer): how many are right"},
    )
    num_samples: int = field(default=100, metadata={"help": "conversations, and prompts, that are taken", "min": 1})
    max_new_tokens: int = field(default=128, metadata={"help": "longest answer in tokens", "min": 1})
    batch_size: int = field(default=8, metadata={"help": "answers written at once", "min": 1})
    temperature: float = field(default=0.0, metadata={"help": "default 0: always the most probable token", "min": 0.0})
    steps: int = field(
        default=0, metadata={"help": "diffusion, sdd: steps an answer (default 0: one token a step)", "min": 0}
    )
    block_length: int = field(
        default=0, metadata={"help": "diffusion, sdd: tokens of a block (default 0: all at once)", "min": 0}
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, mps"})
    seed: int = field(default=42, metadata={"help": "which conversations are taken, and all randomness", "min": 0})
    tokenizer: str = field(default="", metadata={"help": "tokenizer.json or its folder (default: the checkpoint's)"})
    output: str = field(default="", metadata={"help": "write this JSON file, and beside it the same as Markdown (.md)"})


class Question(NamedTuple):
    """A held-out conversation, encoded."""

    conversation: Conversation
    prompt: list[int]  # everything before the last turn, and the header of the answer
    reference: Reference


def _answer(
    opened: OpenedCheckpoint, family: Family, prompts: Sequence[Sequence[int]], settings: InstructionSettings
) -> list[Answer]:
    from minillm.families.base import Sampling

    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
        steps=settings.steps,
        block_length=settings.block_length,
    )
    return write_answers(opened, family, prompts, sampling, settings.batch_size)


def read_references(path: str) -> list[Conversation]:
    """The conversations at `path`; what cannot be used is said. A missing sacrebleu is said before the long work."""
    from minillm.data.formats import RowReport, read_conversations
    from minillm.data.instructions import part_of

    sacrebleu_metrics()
    report = RowReport(path)
    conversations = list(read_conversations(part_of(path, "val") or path, report))
    report.log()
    return conversations


def choose_questions(
    opened: OpenedCheckpoint, conversations: Sequence[Conversation], settings: InstructionSettings
) -> tuple[list[Question], int]:
    """(the questions that fit into the model's positions, how many do not), in the order of the data.

    Raises:
        UserError: none fits.
    """
    from minillm.data.order import sample_indices
    from minillm.text.chat import encode_chat

    count, limit = len(conversations), opened.model.config.max_position_embeddings
    chosen = sorted(sample_indices(settings.seed, 0, min(count, settings.num_samples), count).tolist())
    questions: list[Question] = []
    for index in chosen:
        messages = conversations[index].messages
        prompt, _ = encode_chat(opened.tokenizer, messages[:-1], add_generation_prompt=True)
        tokens, answers = encode_chat(opened.tokenizer, messages)
        if max(len(tokens), len(prompt) + settings.max_new_tokens) <= limit:
            reference = Reference(index, tokens, last_run(answers))
            questions.append(Question(conversations[index], prompt, reference))
    skipped = len(chosen) - len(questions)
    if not questions:
        raise UserError(
            f"{settings.data_path}: the model has {limit} positions; no conversation and {settings.max_new_tokens} new "
            "tokens fit: lower --max_new_tokens, or give shorter conversations"
        )
    if skipped:
        warn(f"{skipped} of {len(chosen)} conversations do not fit into the model's {limit} positions: left out")
    return questions, skipped


def evaluate_quality(
    opened: OpenedCheckpoint, family: Family, conversations: Sequence[Conversation], settings: InstructionSettings
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary, cases) over held-out conversations."""
    questions, skipped = choose_questions(opened, conversations, settings)
    answers = _answer(opened, family, [question.prompt for question in questions], settings)
    references = [question.conversation.messages[-1]["content"].strip() for question in questions]
    likeness = chrf([answer.text for answer in answers], references)
    scores: list[tuple[float, int]] = []
    if family.likelihood != "none":
        scored = [question.reference for question in questions]
        scores = score_references(opened, family, scored, settings.seed, settings.batch_size)
    cases = []
    for place, (question, answer, reference) in enumerate(zip(questions, answers, references)):
        total, count = scores[place] if scores else (0.0, 0)
        cases.append(
            {
                "file": question.conversation.file,
                "line": question.conversation.line,
                "prompt": question.conversation.messages[:-1],
                "reference": reference,
                "chrf": likeness.each[place],
                "rouge_l": rouge_l(answer.text, reference),
                "reference_nats_per_token": -total / count if count else None,
                **form_of(answer, opened.tokenizer),
            }
        )
    tokens = sum(count for _, count in scores)
    summary = {
        "samples": len(cases),
        "skipped_too_long": skipped,
        "chrf": likeness.corpus,
        "chrf_signature": likeness.signature,
        "rouge_l": statistics.fmean(case["rouge_l"] for case in cases),
        "likelihood": family.likelihood,
        "reference_nats_per_token": -sum(total for total, _ in scores) / tokens if tokens else None,
        "reference_tokens": tokens,
        "form": summarise_form(cases),
    }
    return summary, cases


def evaluate_constraints(
    opened: OpenedCheckpoint, family: Family, prompts: Sequence[ConstrainedPrompt], settings: InstructionSettings
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary, cases) over prompts whose answers can be verified.

    Raises:
        UserError: prompts and answers do not fit into the model's positions.
    """
    from minillm.text.chat import encode_chat

    turns = [[{"role": "user", "content": prompt.prompt}] for prompt in prompts]
    encoded = [encode_chat(opened.tokenizer, turn, add_generation_prompt=True)[0] for turn in turns]
    longest, limit = max(map(len, encoded)), opened.model.config.max_position_embeddings
    if longest + settings.max_new_tokens > limit:
        raise UserError(
            f"the longest shipped prompt has {longest} tokens and {settings.max_new_tokens} new ones are asked for; "
            f"the model has {limit} positions: lower --max_new_tokens"
        )
    cases = []
    for prompt, turn, answer in zip(prompts, turns, _answer(opened, family, encoded, settings)):
        checked = [{**constraint, "met": is_met(constraint, answer.text)} for constraint in prompt.constraints]
        cases.append(
            {
                "name": prompt.name,
                "language": prompt.language,
                "prompt": turn,
                "constraints": checked,
                "all_met": all(each["met"] for each in checked),
                **form_of(answer, opened.tokenizer),
            }
        )
    kinds = sorted({each["kind"] for case in cases for each in case["constraints"]})
    summary = {
        **_accuracy(cases),
        "by_language": {name: _accuracy([case for case in cases if case["language"] == name]) for name in LANGUAGES},
        "by_kind": {kind: _kind_accuracy(cases, kind) for kind in kinds},
        "form": summarise_form(cases),
    }
    return summary, cases


def _accuracy(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    met = [each["met"] for case in cases for each in case["constraints"]]
    return {
        "prompts": len(cases),
        "prompt_accuracy": share([case["all_met"] for case in cases]),
        "constraints": len(met),
        "constraint_accuracy": share(met),
    }


def _kind_accuracy(cases: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    met = [each["met"] for case in cases for each in case["constraints"] if each["kind"] == kind]
    return {"constraints": len(met), "accuracy": share(met)}


def evaluate(settings: InstructionSettings) -> dict[str, Any]:
    """Everything that is written to the JSON file.

    Raises:
        UserError: checkpoint or data cannot be used, or sacrebleu is missing where there are references.
    """
    from minillm.checkpoint.files import sha256
    from minillm.checkpoint.model import open_checkpoint
    from minillm.families import saved_family
    from minillm.models.allocator import keep_freed_memory

    keep_freed_memory()
    conversations = read_references(settings.data_path) if settings.data_path else []
    checkable = read_checkable(settings.answers_path) if settings.answers_path else []
    opened = open_checkpoint(settings.checkpoint, tokenizer=settings.tokenizer, device=settings.device)
    family = saved_family(opened.family, opened.tokenizer)
    constraints, constraint_cases = evaluate_constraints(opened, family, shipped_prompts(), settings)
    quality: dict[str, Any] | None = None
    quality_cases: list[dict[str, Any]] = []
    if conversations:
        quality, quality_cases = evaluate_quality(opened, family, conversations, settings)
    final: dict[str, Any] | None = None
    final_cases: list[dict[str, Any]] = []
    if checkable:
        final, final_cases = evaluate_final_answers(
            opened,
            checkable,
            lambda prompts: _answer(opened, family, prompts, settings),
            num_samples=settings.num_samples,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "evaluate-instructions",
        "checkpoint": {
            "path": settings.checkpoint,
            "sha256": sha256(opened.path),
            "architecture": opened.architecture,
            "stage": opened.stage,
            "step": opened.step,
        },
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("checkpoint", "output")},
        "quality": quality,
        "instructions": constraints,
        "final_answers": final,
        "cases": {"quality": quality_cases, "instructions": constraint_cases, "final_answers": final_cases},
    }


def run(settings: InstructionSettings) -> None:
    """Print the tables; write JSON and Markdown if asked.

    Raises:
        UserError: as `evaluate`, or the output cannot be written.
    """
    output = Path(settings.output)
    if settings.output:
        make_room(output, ".md")  # before the long work
    result = evaluate(settings)
    print(tables(result), file=sys.stdout)
    if settings.output:
        write_text(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        write_text(output.with_suffix(".md"), markdown(result))
