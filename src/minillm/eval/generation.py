"""What a model writes: texts after held-out prompts, how varied they are, and how likely a judge finds them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from minillm.eval.answers import Answer, Reference, score_references, share
from minillm.eval.likelihood import ratio
from minillm.eval.text_metrics import distinct_n, length_statistics, self_bleu, unigram_entropy
from minillm.log import UserError, warn
from minillm.text.ngrams import repetition

if TYPE_CHECKING:
    import numpy as np

    from minillm.checkpoint.model import OpenedCheckpoint
    from minillm.data.batches import PackedConversations, TextBlocks
    from minillm.families.base import Family
    from minillm.text.tokenizer import Tokenizer

PROMPT_TOKENS = 16  # of a held-out text, at most half of it; a conversation's prompt is all before its first answer


class Prompt(NamedTuple):
    tokens: list[int]
    held_out: list[int]  # how the data go on: at most max_new_tokens, up to the first stop token


class Unjudged(NamedTuple):
    """Texts whose likelihood a judge is to write into `section["judge"]`."""

    section: dict[str, Any]
    tokenizer: Tokenizer  # of the texts
    texts: list[tuple[list[int], list[int]]]  # (prompt, what was written)


def choose_prompts(
    opened: OpenedCheckpoint,
    data: TextBlocks | PackedConversations,
    rows: np.ndarray,
    count: int,
    max_new_tokens: int,
) -> tuple[list[Prompt], int]:
    """(at most `count` prompts from these rows that fit into the model's positions, how many did not fit).

    Raises:
        UserError: none fits.
    """
    from minillm.data.batches import TextBlocks

    tokenizer, limit = opened.tokenizer, opened.model.config.max_position_embeddings
    stops = (tokenizer.end_of_text_id, tokenizer.end_of_turn_id)
    batch = data.rows(rows)
    found: list[Prompt] = []
    skipped = 0
    for row, (tokens, mask) in enumerate(zip(batch.tokens, batch.loss_mask)):
        if isinstance(data, TextBlocks):
            real = tokens[mask].tolist()
            given = min(PROMPT_TOKENS, len(real) // 2)
            candidates = [(real[:given], real[given:])]
        else:
            assert batch.segments is not None
            candidates = []
            for segment in range(int(batch.segments[row].max()) + 1):
                here = batch.segments[row] == segment
                first = int(mask[here].argmax())  # of the first answer
                candidates.append((tokens[here][:first].tolist(), tokens[here][first:].tolist()))
        for prompt, rest in candidates:
            if not prompt or len(found) == count:
                continue
            if len(prompt) + max_new_tokens > limit:
                skipped += 1
                continue
            end = next((index for index, token in enumerate(rest) if token in stops), len(rest))
            found.append(Prompt(prompt, rest[: min(end, max_new_tokens)]))
    if not found:
        raise UserError(
            f"the model has {limit} positions; no prompt and {max_new_tokens} new tokens fit: lower --max_new_tokens"
        )
    if skipped:
        warn(f"{skipped} prompts do not fit into the model's {limit} positions: left out")
    return found, skipped


def generation_section(
    opened: OpenedCheckpoint, prompts: Sequence[Prompt], skipped: int, answers: Sequence[Answer]
) -> tuple[dict[str, Any], list[Unjudged]]:
    """(numbers about the texts beside those of the held-out text, what a judge should read)."""
    tokenizer = opened.tokenizer
    held_out = {
        "self_bleu": likeness([tokenizer.decode(prompt.held_out) for prompt in prompts]),
        **text_numbers([prompt.held_out for prompt in prompts]),
        "judge": None,
    }
    section = {
        "samples": len(answers),
        "skipped_too_long": skipped,
        "ended": share([answer.ended for answer in answers]),
        "self_bleu": likeness([answer.text for answer in answers]),
        **text_numbers([answer.tokens for answer in answers]),
        "judge": None,
        "held_out": held_out,
        "texts": [
            {
                "prompt": tokenizer.decode(prompt.tokens, skip_special=False),
                "text": answer.text,
                "tokens": len(answer.tokens),
                "ended": answer.ended,
            }
            for prompt, answer in zip(prompts, answers, strict=True)
        ],
    }
    written = [(prompt.tokens, answer.tokens) for prompt, answer in zip(prompts, answers)]
    original = [(prompt.tokens, prompt.held_out) for prompt in prompts]
    return section, [Unjudged(section, tokenizer, written), Unjudged(held_out, tokenizer, original)]


def likeness(texts: Sequence[str]) -> float | None:
    """Self-BLEU of several texts; a single one is like nothing."""
    return self_bleu(texts) if len(texts) > 1 else None


def text_numbers(texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Variety of texts (lists of tokens) and their lengths in tokens."""
    return {
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
        "repetition": statistics.fmean(map(repetition, texts)),
        "unigram_entropy": unigram_entropy(texts),
        "lengths": asdict(length_statistics(texts)),
    }


def judge_texts(
    judge: OpenedCheckpoint, family: Family, unjudged: Sequence[Unjudged], seed: int, batch_size: int
) -> None:
    """Write {nats_per_token, standard_error, tokens, cut} into each section: -log p(text given prompt) over the judge's
    tokens. Texts of another tokenizer are tokenized again. What reaches beyond the judge's positions is cut off."""
    limit = judge.model.config.max_position_embeddings
    for section, tokenizer, texts in unjudged:
        references, cut = [], 0
        for row, text in enumerate(texts):
            prompt, written = (_retokenized(part, tokenizer, judge.tokenizer) for part in text)
            tokens = (prompt + written)[:limit]
            cut += len(prompt + written) > limit
            if len(tokens) > len(prompt):
                scored = [False] * len(prompt) + [True] * (len(tokens) - len(prompt))
                references.append(Reference(row, tokens, scored))
        scores = score_references(judge, family, references, seed, batch_size)
        value, error = (
            ratio([-total for total, _ in scores], [count for _, count in scores]) if scores else (None, None)
        )
        section["judge"] = {
            "nats_per_token": value,
            "standard_error": error,
            "tokens": sum(count for _, count in scores),
            "cut": cut,
        }


def _retokenized(tokens: list[int], written_in: Tokenizer, wanted: Tokenizer) -> list[int]:
    if written_in.fingerprint == wanted.fingerprint:
        return tokens
    return wanted.encode(written_in.decode(tokens, skip_special=False), parse_special=True)
