"""Asking a checkpoint: the answers to prompts, their form, and the likelihood of reference answers.

L length of a conversation in tokens.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from minillm.eval.text_metrics import has_loop, length_statistics
from minillm.log import progress
from minillm.text.ngrams import repetition
from minillm.text.tokenizer import CONTROL_TOKENS, Tokenizer

if TYPE_CHECKING:
    from minillm.checkpoint.model import OpenedCheckpoint
    from minillm.families.base import Family, Progress, Sampling

FORM = ("ended", "clean", "non_empty", "loop_free")
# A control token as text, also in the spelling that the chat template gives it inside a message.
TEMPLATE_TEXT = re.compile("|".join(f"{re.escape(name[:-2])} ?{re.escape(name[-2:])}" for name in CONTROL_TOKENS))


class Answer(NamedTuple):
    text: str
    tokens: list[int]  # without the stop token
    ended: bool  # by a stop token, not by max_new_tokens


class Reference(NamedTuple):
    """A conversation whose last answer is to be scored."""

    row: int  # in the data: the noise belongs to it
    tokens: list[int]  # [L]
    scored: list[bool]  # [L]: the last answer, its end of turn included


def write_answers(
    opened: OpenedCheckpoint, family: Family, prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int
) -> list[Answer]:
    """The answer to each prompt. An answer's randomness belongs to its place among the prompts, not to its batch."""
    stop_ids = (opened.tokenizer.end_of_text_id, opened.tokenizer.end_of_turn_id)
    newest: list[list[int]] = []

    def watch(state: Progress) -> None:
        newest[:] = state.tokens

    answers = []
    with progress(len(prompts), "answers written") as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            own = replace(sampling, stop_ids=stop_ids, seed=sampling.seed + start)
            written = family.generate(opened.model, batch, own, watch)
            for tokens, canvas in zip(written, newest, strict=True):
                # A canvas is full to its end, its stop token and what follows included; elsewhere that is cut off.
                ended = len(canvas) < sampling.max_new_tokens or any(token in stop_ids for token in canvas)
                answers.append(Answer(opened.tokenizer.decode(tokens), tokens, ended))
            bar.advance(len(batch))
    return answers


def score_references(
    opened: OpenedCheckpoint, family: Family, references: Sequence[Reference], seed: int, batch_size: int
) -> list[tuple[float, int]]:
    """(log-probability of the reference in nats, its tokens) of each."""
    import torch

    from minillm.families.base import Noise, TokenBatch

    device = opened.model.head_weight.device
    scores: list[tuple[float, int]] = []
    with torch.no_grad(), progress(len(references), "references scored") as bar:
        for start in range(0, len(references), batch_size):
            rows = references[start : start + batch_size]
            shape = (len(rows), max(len(each.tokens) for each in rows))
            tokens = torch.full(shape, opened.tokenizer.pad_id, device=device)
            mask = torch.zeros(shape, dtype=torch.bool, device=device)
            segments = torch.full(shape, -1, device=device)
            for place, each in enumerate(rows):
                length = len(each.tokens)
                tokens[place, :length] = torch.tensor(each.tokens, device=device)
                mask[place, :length] = torch.tensor(each.scored, device=device)
                segments[place, :length] = 0
            order = torch.tensor([each.row for each in rows], device=device)
            batch = TokenBatch(tokens, mask, None, segments, order)
            score = family.score(opened.model, batch, Noise.of(seed, batch, -1, start))
            scores += zip(score.total.tolist(), score.count.tolist())
            bar.advance(len(rows))
    return scores


def form_of(answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    """The form of one answer: the four checks of FORM, its length and its share of repeated 4-grams."""
    leaked = tokenizer.special_ids.intersection(answer.tokens) or TEMPLATE_TEXT.search(answer.text)
    return {
        "answer": answer.text,
        "tokens": len(answer.tokens),
        "ended": answer.ended,
        "clean": not leaked,
        "non_empty": bool(answer.text.strip()),
        "loop_free": not has_loop(answer.tokens),
        "repetition": repetition(answer.tokens),
    }


def summarise_form(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of the answers that pass each check and all of them; mean repetition; lengths in tokens."""
    return {
        "answers": len(cases),
        **{check: share([case[check] for case in cases]) for check in FORM},
        "compliant": share([all(case[check] for check in FORM) for case in cases]),
        "repetition": statistics.fmean(case["repetition"] for case in cases),
        "tokens": asdict(length_statistics([range(case["tokens"]) for case in cases])),
    }


def share(passed: Sequence[bool]) -> float:
    """How many of them, 0 to 1."""
    return sum(passed) / len(passed)


def last_run(mask: Sequence[bool]) -> list[bool]:
    """Only the last run of True: the last answer of several."""
    end = max((index for index, here in enumerate(mask) if here), default=-1)
    start = end
    while start > 0 and mask[start - 1]:
        start -= 1
    return [here and index >= start for index, here in enumerate(mask)]
