"""Numbers about texts: likeness to references, and how varied or repetitive texts are. No model is needed.

chrF and self-BLEU are sacrebleu's; the rest is a few lines each.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from minillm.log import UserError
from minillm.text.ngrams import ngrams

CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Chinese characters, with their extensions
LETTER = rf"[^\W_{CJK}]"
WORD = re.compile(rf"[{CJK}]|{LETTER}+(?:['’]{LETTER}+)*")
SELF_BLEU_REFERENCES = 50  # of one text; more make it slow, and change little
LONGEST_PERIOD, LOOP_TIMES, LOOP_TOKENS = 32, 4, 12

Tokens = Sequence[Hashable]


def words(text: str) -> list[str]:
    """Words in lower case without punctuation; a Chinese character is a word of its own."""
    return WORD.findall(text.lower())


def sacrebleu_metrics() -> Any:
    """sacrebleu's metrics; raises UserError where it is not installed."""
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise UserError("chrF and self-BLEU need sacrebleu: pip install 'minillm-trainer[eval]'") from error
    return metrics


@dataclass(frozen=True)
class Chrf:
    """chrF (Popović 2015), 0 to 100: F2 over character n-grams of 1 to 6, white space left out."""

    corpus: float  # over the n-grams of all answers together
    each: list[float]
    signature: str  # sacrebleu's, so that others can compute the same


def chrf(answers: Sequence[str], references: Sequence[str]) -> Chrf:
    """Likeness of each answer to its reference.

    Raises:
        UserError: sacrebleu is not installed.
    """
    metric = sacrebleu_metrics().CHRF()
    each = [metric.sentence_score(answer, [wanted]).score for answer, wanted in zip(answers, references, strict=True)]
    corpus = metric.corpus_score(list(answers), [list(references)]).score
    return Chrf(corpus, each, str(metric.get_signature()))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004), 0 to 1: the F1 of the longest common subsequence, over words for English and over characters
    for Chinese (see `words`). 0 where either has none."""
    one, two = words(answer), words(reference)
    common = longest_common_subsequence(one, two)
    return 2.0 * common / (len(one) + len(two)) if common else 0.0


def longest_common_subsequence(one: Tokens, two: Tokens) -> int:
    """Its length, a row of the table at once in the bits of an integer (Hyyrö 2004)."""
    places: dict[Hashable, int] = {}
    for index, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << index
    full = (1 << len(one)) - 1
    row = full  # bit i is 0 where the table grows from column i to i + 1
    for token in two:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(one) - row.bit_count()


def self_bleu(texts: Sequence[str]) -> float:
    """Self-BLEU (Zhu et al. 2018), 0 to 100: the mean BLEU of each text with the others as references. High means that
    the texts are alike. A text is held against at most SELF_BLEU_REFERENCES others, those that follow it (after the
    last comes the first). Chinese characters count as words.

    Raises:
        ValueError: fewer than two texts.
        UserError: sacrebleu is not installed.
    """
    if len(texts) < 2:
        raise ValueError(f"self-BLEU compares texts with each other; there is {len(texts)}")
    # "zh" is the usual 13a that also cuts Chinese into characters; a short text is judged by the n-grams it has
    metric = sacrebleu_metrics().BLEU(tokenize="zh", effective_order=True)
    count = min(len(texts) - 1, SELF_BLEU_REFERENCES)
    scores = []
    for index, text in enumerate(texts):
        others = [texts[(index + 1 + offset) % len(texts)] for offset in range(count)]
        scores.append(metric.sentence_score(text, others).score)
    return statistics.fmean(scores)


def distinct_n(token_lists: Sequence[Tokens], n: int) -> float:
    """Different n-grams over all n-grams of the texts together (Li et al. 2016), 0 to 1; 0 where there are none."""
    grams = [gram for tokens in token_lists for gram in ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def has_loop(tokens: Tokens) -> bool:
    """Is there a loop: 1 to 32 tokens that stand at least four times in a row, over at least 12 tokens?"""
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // LOOP_TIMES) + 1):
        run, enough = 0, max(LOOP_TIMES * period, LOOP_TOKENS) - period
        for index in range(period, len(tokens)):
            run = run + 1 if tokens[index] == tokens[index - period] else 0
            if run >= enough:
                return True
    return False


def unigram_entropy(token_lists: Sequence[Tokens]) -> float:
    """Entropy in nats of the tokens of all texts together; low where few tokens make up most of the text."""
    counts = Counter(token for tokens in token_lists for token in tokens)
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values()) if total else 0.0


@dataclass(frozen=True)
class Lengths:
    """Lengths of texts in tokens; zeros where there is no text."""

    mean: float
    median: float
    shortest: int
    longest: int


def length_statistics(token_lists: Sequence[Tokens]) -> Lengths:
    """Mean, median, shortest and longest."""
    lengths = [len(tokens) for tokens in token_lists]
    if not lengths:
        return Lengths(0.0, 0.0, 0, 0)
    return Lengths(statistics.fmean(lengths), float(statistics.median(lengths)), min(lengths), max(lengths))
