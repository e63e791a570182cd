"""How many prompts are answered rightly, by the checker that is the reward `math` in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from minillm.eval.answers import Answer, form_of, share, summarise_form
from minillm.log import UserError, warn
from minillm.text.answers import final_answer, has_format

if TYPE_CHECKING:
    from minillm.checkpoint.model import OpenedCheckpoint
    from minillm.data.preferences import CheckablePrompt


def read_checkable(path: str) -> list[CheckablePrompt]:
    """The prompts at `path` with their answers, in any form that reinforcement learning reads; what cannot be used is
    said."""
    from minillm.data.files import RowReport
    from minillm.data.preferences import read_prompts

    report = RowReport(path)
    prompts = list(read_prompts(path, report))
    report.log()
    return prompts


def evaluate_final_answers(
    opened: OpenedCheckpoint,
    prompts: Sequence[CheckablePrompt],
    write: Callable[[Sequence[Sequence[int]]], list[Answer]],
    *,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary, cases) over prompts whose answer is known; `write` gives the answers to encoded prompts.

    Raises:
        UserError: no prompt fits into the model's positions.
    """
    from minillm.data.order import sample_indices
    from minillm.rollout.rewards import RewardFunctions
    from minillm.text.chat import encode_chat

    limit = opened.model.config.max_position_embeddings
    chosen = sorted(sample_indices(seed, 0, min(len(prompts), num_samples), len(prompts)).tolist())
    asked = [prompts[index] for index in chosen]
    encoded = [encode_chat(opened.tokenizer, each.messages, add_generation_prompt=True)[0] for each in asked]
    fits = [len(tokens) + max_new_tokens <= limit for tokens in encoded]
    asked, encoded = ([each for each, here in zip(all_, fits) if here] for all_ in (asked, encoded))  # type: ignore[misc]
    if not asked:
        raise UserError(
            f"--answers_path: the model has {limit} positions; no prompt and {max_new_tokens} new tokens fit: lower "
            "--max_new_tokens"
        )
    if not all(fits):
        warn(f"{fits.count(False)} of {len(fits)} prompts do not fit into the model's {limit} positions: left out")
    answers = write(encoded)
    rewards = RewardFunctions(["math"], opened.tokenizer)
    try:
        texts = [opened.tokenizer.decode(tokens) for tokens in encoded]
        judged = rewards(texts, [answer.text for answer in answers], [each.answer for each in asked])
    finally:
        rewards.close()
    cases = [
        {
            "file": each.file,
            "line": each.line,
            "prompt": each.messages,
            "expected": each.answer,
            "found": final_answer(answer.text),
            "right": bool(total == 1.0),
            "checked": not failed,
            "format": has_format(answer.text),
            **form_of(answer, opened.tokenizer),
        }
        for each, answer, total, failed in zip(asked, answers, judged.total, judged.failed)
    ]
    accuracy = share([case["right"] for case in cases])
    summary = {
        "samples": len(cases),
        "skipped_too_long": fits.count(False),
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1.0 - accuracy) / len(cases)),
        "unchecked": sum(not case["checked"] for case in cases),
        "format": share([case["format"] for case in cases]),
        "form": summarise_form(cases),
    }
    return summary, cases
