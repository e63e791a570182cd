"""The classic mistakes of fine-tuning data, looked for in the rows that the first steps will read.

A mistake that is in every row looked at would waste the run: it ends it before step 1. In some rows it is a warning
with file and line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from minillm.data.batches import PackedConversations, PreferencePairs
from minillm.data.order import Subset, sample_indices
from minillm.data.store import TokenStore
from minillm.log import UserError, warn
from minillm.text.chat import encode_chat
from minillm.text.tokenizer import Tokenizer

CHECKED_ROWS = 64
PLACES_SHOWN = 3
OTHER_TEMPLATES = re.compile(
    r"<\|im_start ?\|>|<\|(?:start_header_id|user|assistant|system)\|>|\[/?INST\]|<</?SYS>>|<start_of_turn>|"
    r"^### (?:Instruction|Response):|^(?:Human|Assistant): ",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Example:
    """One conversation (or side of a pair) as it is trained."""

    tokens: np.ndarray  # [L]
    mask: np.ndarray  # bool [L]
    cut: bool  # its end did not fit
    place: str  # file:line


@dataclass
class Finding:
    """A mistake, and where it was found."""

    mistake: str
    advice: str
    places: list[str] = field(default_factory=list)
    checked: int = 0

    def __str__(self) -> str:
        more = ", ..." if len(self.places) > PLACES_SHOWN else ""
        where = ", ".join(self.places[:PLACES_SHOWN]) + more
        return f"{self.mistake} in {len(self.places)} of the first {self.checked} examples ({where}). {self.advice}"


def check_first_rows(dataset: object, tokenizer: Tokenizer, *, seed: int) -> list[Finding]:
    """Look at the first rows that training with this seed reads; warn of what only some have.

    Returns:
        what was found.

    Raises:
        UserError: every example has the same mistake, or the tokenizer pads with what ends a text.
    """
    if tokenizer.pad_id in (tokenizer.end_of_turn_id, tokenizer.end_of_text_id):
        raise UserError(
            "The tokenizer's padding is also what ends a turn or a text: a model could not learn to stop. "
            "Give one with a padding token of its own (--tokenizer)."
        )
    source = dataset.dataset if isinstance(dataset, Subset) else dataset
    if not isinstance(source, PackedConversations | PreferencePairs):
        return []
    count = min(CHECKED_ROWS, len(dataset))  # type: ignore[arg-type]
    rows = sample_indices(seed, 0, count, len(dataset))  # type: ignore[arg-type]
    if isinstance(dataset, Subset):
        rows = dataset.chosen[rows]
    examples = list(_examples(source, rows))
    findings = [_look(examples, *check, tokenizer) for check in CHECKS]
    found = [finding for finding in findings if finding.places]
    for finding in found:
        if len(finding.places) == finding.checked and finding.mistake in FATAL:
            raise UserError(f"The data would waste the run: {finding}")
        warn(str(finding))
    return found


def _examples(dataset: PackedConversations | PreferencePairs, rows: np.ndarray) -> Iterator[Example]:
    store: TokenStore = dataset.store
    assert store.mask is not None
    if isinstance(dataset, PackedConversations):
        offsets = dataset.packing.row_offsets
        documents = np.concatenate([dataset.packing.documents[offsets[row] : offsets[row + 1]] for row in rows])
    else:
        documents = np.concatenate([2 * dataset.pairs[rows], 2 * dataset.pairs[rows] + 1])
    for document in documents.tolist():
        start, end = store.offsets[document : document + 2]
        kept = start + dataset.lengths[document]
        trained_later = bool(np.any(store.mask[kept:end]))
        yield Example(store.tokens[start:kept], store.mask[start:kept] != 0, trained_later, store.place(document))


def _look(
    examples: list[Example], mistake: str, advice: str, has: Callable[[Example, Tokenizer], bool], tokenizer: Tokenizer
) -> Finding:
    finding = Finding(mistake, advice, checked=len(examples))
    finding.places = list(dict.fromkeys(each.place for each in examples if has(each, tokenizer)))
    if len(finding.places) and all(has(each, tokenizer) for each in examples):
        finding.checked = len(finding.places)
    return finding


def _nothing_trained(example: Example, tokenizer: Tokenizer) -> bool:
    return not example.mask.any()


def _end_not_trained(example: Example, tokenizer: Tokenizer) -> bool:
    """No answer that is there to its end is trained up to a token that ends it."""
    if example.cut or not example.mask.any():
        return False
    ends = example.tokens[example.mask & ~np.append(example.mask[1:], False)]
    return not np.isin(ends, (tokenizer.end_of_turn_id, tokenizer.end_of_text_id)).any()


def _prompt_trained(example: Example, tokenizer: Tokenizer) -> bool:
    return bool(len(example.mask) and example.mask[0])


def _begins_twice(example: Example, tokenizer: Tokenizer) -> bool:
    first = example.tokens[:2].tolist()
    return len(first) == 2 and first[0] == first[1] and first[0] in tokenizer.special_ids


def _empty_answer(example: Example, tokenizer: Tokenizer) -> bool:
    answer = tokenizer.decode(example.tokens[example.mask].tolist())
    return bool(example.mask.any()) and not example.cut and not answer.strip()


def _other_template(example: Example, tokenizer: Tokenizer) -> bool:
    """Turns of another template, or of ours as text, inside what should be one turn's content."""
    text = tokenizer.decode(example.tokens.tolist())  # without the control tokens that the template itself wrote
    return any(match.group().strip() not in _own_marks(tokenizer) for match in OTHER_TEMPLATES.finditer(text))


@lru_cache(maxsize=4)
def _own_marks(tokenizer: Tokenizer) -> str:
    """What the tokenizer's chat template itself writes as text."""
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}]
    return tokenizer.decode(encode_chat(tokenizer, probe)[0])


def _answer_cut(example: Example, tokenizer: Tokenizer) -> bool:
    return example.cut


NOTHING_TRAINED, END_NOT_TRAINED = "no trained token", "the end of an answer is never trained"
PROMPT_TRAINED, EMPTY = "the prompt is trained, too", "an empty answer"
CHECKS: tuple[tuple[str, str, Callable[[Example, Tokenizer], bool]], ...] = (
    (NOTHING_TRAINED, "Does the chat template mark answers, and are there any?", _nothing_trained),
    (PROMPT_TRAINED, "The first token is already an answer's: look at the roles and the template.", _prompt_trained),
    (END_NOT_TRAINED, "The model would not learn to stop: the chat template must end answers.", _end_not_trained),
    ("a text that begins twice with its first token", "The rows hold it already: take it out of them.", _begins_twice),
    (EMPTY, "`minillm data clean` removes such rows.", _empty_answer),
    ("marks of another chat template", "Give the rows as messages, not as rendered text.", _other_template),
    ("an answer that does not fit into max_seq_len", "A larger --max_seq_len keeps it.", _answer_cut),
)
FATAL = {NOTHING_TRAINED, END_NOT_TRAINED, PROMPT_TRAINED, EMPTY}
