"""What a family is: three verbs about a backbone. Everything else in the product is written once over them.

B batch, L length, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from minillm.families.noise import noise_seeds
from minillm.models.candidates import Candidates
from minillm.models.transformer import LanguageModel, Output


class SpecialIds(NamedTuple):
    """The tokens of a vocabulary that families treat apart."""

    vocabulary: int
    mask: int  # stands where a token is hidden
    ignore: int  # stands after the end, where a text is shorter than its canvas
    control: tuple[int, ...]  # never written: padding, mask, start of a turn

    @classmethod
    def of(cls, tokenizer: Any) -> SpecialIds:
        """From a text.tokenizer.Tokenizer."""
        control = (tokenizer.pad_id, tokenizer.mask_id, tokenizer.start_of_turn_id)
        return cls(tokenizer.vocab_size, tokenizer.mask_id, tokenizer.ignore_id, control)


class TokenBatch(NamedTuple):
    """Clean tokens on the device, as the data gave them."""

    tokens: Tensor  # int64 [B, L]
    loss_mask: Tensor  # bool [B, L]: tokens that are trained (or scored)
    positions: Tensor | None  # int64 [B, L]; None: 0, 1, 2, ...
    segments: Tensor | None  # int64 [B, L], -1 padding; None: one segment without padding
    sample_ids: Tensor  # int64 [B]

    @classmethod
    def from_numpy(cls, batch: Any, device: torch.device) -> TokenBatch:
        """From data.batches.Batch."""

        def move(array: Any) -> Tensor | None:
            if array is None:
                return None
            tensor = torch.from_numpy(array)
            # only from pinned memory does a copy to the GPU run beside what comes next
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

        return cls(*(move(getattr(batch, name)) for name in cls._fields))  # type: ignore[arg-type]


class Noise(NamedTuple):
    """All the randomness a verb may use, whatever the batch size, worker or rank."""

    seeds: Tensor  # int64 [B], of (seed, sample id, step)
    slots: Tensor  # int64 [B], where in the run's order each row stands
    seed: int
    step: int  # -1: evaluation
    shift: float = 0.0  # of the noise levels, between the samples of one row

    @classmethod
    def of(cls, seed: int, batch: TokenBatch, step: int, first_slot: int) -> Noise:
        """For rows that stand at first_slot, first_slot + 1, ... of the order."""
        ids = batch.sample_ids
        slots = first_slot + torch.arange(len(ids), device=ids.device)
        return cls(noise_seeds(seed, ids, step), slots, seed, step)

    def sample(self, index: int, samples: int) -> Noise:
        """The index-th of `samples` draws for the same rows; their levels are spread evenly."""
        return self._replace(seeds=self.seeds + 7_368_787 * (index + 1), shift=index / samples)

    def repeat(self, times: int) -> Noise:
        """The same noise for `times` batches that stand below each other (a pair shares its noise)."""
        return self._replace(seeds=self.seeds.repeat(times), slots=self.slots.repeat(times))


@dataclass(frozen=True)
class View:
    """What the model sees, what it must predict, and how much each prediction weighs."""

    inputs: Tensor | Candidates  # token ids [B, L] or candidates [B, L, K]
    targets: Tensor  # int64 [B, L]
    weights: Tensor  # float32 [B, L]; a position of weight 0 costs nothing
    count: int  # tokens the loss is a mean over, known before the model runs
    positions: Tensor | None = None  # int64 [B, L]
    segments: Tensor | None = None  # int64 [B, L]
    mask: Tensor | None = None  # bool [B, 1, L, L], who may look at whom, instead of segments
    extra: Tensor | None = None  # bool [B, L]: trained, but no part of the reported loss (what follows the end)
    log: dict[str, float] = field(default_factory=dict)  # what the trackers should know, as k

    def through(self, model: LanguageModel) -> Output:
        """The model's answer to what is seen."""
        return model(self.inputs, positions=self.positions, segments=self.segments, mask=self.mask)


@dataclass(frozen=True)
class Score:
    """Log-probabilities in nats of each row's masked tokens."""

    total: Tensor  # float32 [B], differentiable
    count: Tensor  # int64 [B], tokens scored
    per_token: Tensor | None  # float32 [B, L], 0 where not scored; None where the family has no order


@dataclass(frozen=True)
class Sampling:
    """How to write: temperature 0 takes the most probable token. The second half is for families that write
    in no order: they take a canvas of hidden positions and reveal some at each step."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    seeds: tuple[int, ...] = ()  # one for each prompt; empty: seed, seed + 1, ...
    steps: int = 0  # over the whole canvas; 0: one token a step
    block_length: int = 0  # blocks are written one after another; 0: the whole canvas at once
    order: str = "confidence"  # or "random": which positions are revealed first
    threshold: float = 0.0  # above 0: every position at least so confident is revealed at once
    remask: float = 0.0  # the share of a block's revealed positions that each step hides again

    def generator(self, row: int) -> torch.Generator:
        """The randomness of one prompt's text, whichever prompts stand beside it."""
        return torch.Generator().manual_seed(self.seeds[row] if self.seeds else self.seed + row)


class Progress(NamedTuple):
    """Where writing stands, for those who watch."""

    tokens: list[list[int]]  # the new tokens of each row so far; hidden positions are the mask id
    candidates: Candidates | None = None  # SDD: the last belief about each position of the block under way,
    # [rows still being written, block, K]; where a token is revealed, the one it was chosen from


class Family(Protocol):
    """The three verbs, and what may be said about the numbers they give."""

    name: str
    causal: bool
    denoiser: str  # "" where positions are tokens
    ordered: bool  # tokens have an order, so ratios can be taken token by token
    tail: int  # ignore tokens, at most, that the data put after the end of a conversation
    likelihood: str  # "exact" | "upper_bound" | "none": what a mean loss of `view` is

    def view(self, model: LanguageModel, batch: TokenBatch, noise: Noise) -> View:
        """Noise the clean tokens. The model is only asked what it believes, never for a gradient."""

    def score(self, model: LanguageModel, batch: TokenBatch, noise: Noise) -> Score:
        """Log-probability of the masked tokens given the others."""

    def generate(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        watch: Callable[[Progress], None] | None = None,
    ) -> list[list[int]]:
        """New tokens for each prompt, without the stop token; `watch` is told after every step."""
