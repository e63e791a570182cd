"""Does an exported artefact, in its own runtime, read and write what the checkpoint does here?

Prompts in English and Chinese, as plain text and as conversations, are rendered by the artefact's own chat template
and tokenizer; ids, logits and the tokens that follow greedily are compared with ours. A runtime is an object that can
be asked for the three (`Runtime`). V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from minillm.log import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from minillm.checkpoint.model import OpenedCheckpoint

NEW_TOKENS = 16  # written after each prompt
BLOCK_LENGTH = 8  # of families that write in blocks: two blocks are seen
# What rounding may change in float32, as a share of the largest logit. Two programs that multiply in another order
# differ by about 1e-6 of it.
LOGIT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Prompt:
    """A text, or a conversation whose next turn is the assistant's."""

    name: str
    text: str = ""
    messages: tuple[dict[str, str], ...] = ()


PROMPTS = (
    Prompt("an English text", "Once upon a time there was a miller who lived by the river."),
    Prompt("a Chinese text", "从前,有一位磨坊主住在河边。"),
    Prompt("an English conversation", messages=({"role": "user", "content": "What is 12 + 30?"},)),
    Prompt(
        "a Chinese conversation",
        messages=(
            {"role": "user", "content": "你好!"},
            {"role": "assistant", "content": "你好。"},
            {"role": "user", "content": "水是什么?"},
        ),
    ),
)


@dataclass(frozen=True)
class Expected:
    """What the checkpoint makes of a prompt here."""

    prompt: Prompt
    full_ids: list[int]  # the prompt
    ids: list[int]  # what the model reads: the end of it, where the model has few positions
    new_tokens: int  # how many were asked for
    tokens: list[int]  # what follows greedily, without the token that ends it; [] for models that judge
    logits: Tensor  # float32 [len(ids), V], or the judgement [1, 1]
    judgement: bool


class Runtime(Protocol):
    """The artefact, loaded by the program it was made for."""

    name: str

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids, by the artefact's own tokenizer and chat template."""

    def logits(self, ids: Sequence[int]) -> Tensor:
        """float32 [n, V] of the last n positions, n at least 1; of a model that judges [1, 1]."""

    def write(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """What follows greedily, without the token that ends it."""


def expectations(opened: OpenedCheckpoint) -> list[Expected]:
    """What the checkpoint makes of every prompt.

    Raises:
        UserError: the model has too few positions to write anything.
    """
    from minillm.families import saved_family
    from minillm.families.base import Sampling

    model, tokenizer = opened.model, opened.tokenizer
    limit = model.config.max_position_embeddings
    new = min(NEW_TOKENS, limit // 2)
    if new < 1:
        raise UserError(f"{opened.path}: a model of {limit} positions cannot be checked")
    family = saved_family(opened.family, tokenizer)
    sampling = Sampling(
        max_new_tokens=new,
        temperature=0.0,
        stop_ids=(tokenizer.end_of_text_id, tokenizer.end_of_turn_id),
        block_length=BLOCK_LENGTH,
    )
    found = []
    for prompt in PROMPTS:
        full = our_ids(opened, prompt)
        ids = full[-(limit - new) :]
        judges = model.config.value_head
        tokens = [] if judges else family.generate(model, [ids], sampling)[0]
        found.append(Expected(prompt, full, ids, new, tokens, _our_logits(opened, ids), judges))
    return found


def our_ids(opened: OpenedCheckpoint, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, as every command here reads it."""
    from minillm.text.chat import encode_chat

    if prompt.messages:
        return encode_chat(opened.tokenizer, prompt.messages, add_generation_prompt=True)[0]
    return [*opened.tokenizer.begin_ids, *opened.tokenizer.encode(prompt.text)]


def _our_logits(opened: OpenedCheckpoint, ids: Sequence[int]) -> Tensor:
    import torch

    from minillm.families.settings import FamilyConfig
    from minillm.models.candidates import Candidates

    model, tokens = opened.model, torch.tensor([list(ids)])
    inputs: Tensor | Candidates = tokens
    if model.config.denoiser:
        inputs = Candidates.known(tokens, FamilyConfig.from_dict(opened.family).k_schedule[-1])
    with torch.inference_mode():
        hidden = model(inputs).hidden
        if model.config.value_head:
            return model.score.of_sequence(hidden, torch.ones_like(tokens, dtype=torch.bool))[:, None].clone()
        return model.logits(hidden)[0].float().clone()


def compare(expected: Sequence[Expected], runtime: Runtime, tolerance: float = LOGIT_TOLERANCE) -> str:
    """Ask the runtime the same, and say in a sentence what was compared.

    Args:
        tolerance: how far logits may be apart, as a share of the largest of ours.

    Raises:
        UserError: something differs; it says the prompt, the place, both values, and the largest difference of logits.
    """
    largest, written = 0.0, 0
    for each in expected:
        check_ids(each, runtime.encode(each.prompt), runtime.name)
        difference, allowed, place = _apart(each, runtime.logits(each.ids), runtime.name, tolerance)
        if each.judgement:
            if not difference <= allowed:
                raise refused(runtime.name, f"judges {each.prompt.name} by {difference:.2g} differently")
        else:
            tokens = runtime.write(each.ids, each.new_tokens)
            check_tokens(each, tokens, runtime.name, difference)
            if not difference <= allowed:  # a NaN is no equality either
                raise refused(
                    runtime.name,
                    f"gives other logits for {each.prompt.name}: at token {place + 1} of {len(each.ids)} they differ "
                    f"by {difference:.2g}, where rounding explains {allowed:.2g}; the tokens it writes are the same",
                )
            written += len(tokens)
        largest = max(largest, difference)
    what = "judgements" if expected[0].judgement else f"{written} greedily written tokens"
    return (
        f"{runtime.name} reads {len(expected)} prompts into the same ids and gives the same {what}; "
        f"logits differ by at most {largest:.1g}"
    )


def refused(runtime: str, difference: str) -> UserError:
    """The error that a mismatch is."""
    return UserError(f"the export is refused, nothing was written: {runtime} {difference}")


def check_ids(expected: Expected, ids: Sequence[int], runtime: str) -> None:
    """Raises UserError unless the artefact's tokenizer (and chat template) give our ids."""
    place = first_difference(expected.full_ids, ids)
    if place is not None:
        which = "chat template or tokenizer" if expected.prompt.messages else "tokenizer"
        raise refused(
            runtime,
            f"reads {expected.prompt.name} otherwise: token {place + 1} is {_at(ids, place)}, expected "
            f"{_at(expected.full_ids, place)}; the {which} of the export is not the checkpoint's",
        )


def check_tokens(expected: Expected, tokens: Sequence[int], runtime: str, difference: float | None = None) -> None:
    """Raises UserError unless the tokens are those expected. `difference`: the largest of logits, if it is known."""
    place = first_difference(expected.tokens, tokens)
    if place is not None:
        largest = "" if difference is None else f"; the largest difference of logits on the prompt is {difference:.2g}"
        raise refused(
            runtime,
            f"writes something else after {expected.prompt.name}: token {place + 1} is {_at(tokens, place)}, expected "
            f"{_at(expected.tokens, place)}{largest}",
        )


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """The first index at which the two differ, or at which only one goes on; None where they are equal."""
    for index in range(max(len(expected), len(got))):
        if list(expected[index : index + 1]) != list(got[index : index + 1]):
            return index
    return None


def _at(tokens: Sequence[int], place: int) -> str:
    return str(tokens[place]) if place < len(tokens) else "missing (the end)"


def _apart(each: Expected, theirs: Tensor, runtime: str, tolerance: float) -> tuple[float, float, int]:
    """The largest difference of logits, the largest that is allowed, and the index of the id where it is."""
    ours = each.logits[-len(theirs) :]
    if theirs.shape != ours.shape:
        raise refused(
            runtime, f"gives logits of shape {tuple(theirs.shape)} for {each.prompt.name}, not {tuple(ours.shape)}"
        )
    by_position = (theirs - ours).abs().amax(-1).nan_to_num(float("inf"))
    place = int(by_position.argmax()) + len(each.ids) - len(ours)
    return float(by_position.max()), tolerance * max(1.0, float(ours.abs().max())), place
