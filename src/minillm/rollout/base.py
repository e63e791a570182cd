"""The two calls between a method that learns from completions and whatever writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from minillm.families.base import Sampling
    from minillm.models.transformer import LanguageModel


class Completion(NamedTuple):
    """What was written after a prompt."""

    tokens: list[int]  # the new tokens, with the stop token where one was written; never empty
    # Of each new token, in nats, under the model's own distribution: temperature 1, nothing filtered, no penalty,
    # whatever the sampling. It is what `family.score` says of the same tokens. None: the family has no order, or the
    # engine does not say.
    log_probs: list[float] | None
    finished: bool  # it ends with a stop token, not at max_new_tokens


class Engine(Protocol):
    """Writes completions with a model's weights, here or elsewhere."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, count: int, sampling: Sampling, before: Sequence[Sequence[int]] = ()
    ) -> list[list[Completion]]:
        """`count` completions of each prompt (token ids), in the order of the prompts.

        The randomness of a completion comes from (sampling.seed, its prompt, which of the `count` it is, and which of
        the same prompts in this call): other prompts of the call and its order do not matter. The caller gives every
        step another seed. `before`: prompts of the same call that another process writes, and that stand before these.

        Raises:
            UserError: an empty prompt, one that does not fit the model's positions, or no answer from elsewhere.
        """

    def update(self, model: LanguageModel) -> None:
        """From now on, write with these weights."""
