"""The engine inside the process: many completions at once, with the weights that are being trained.

Where tokens have an order: continuous batching. A prompt is read once for all its completions; a completion that ends
leaves its row at once, and the next one waiting takes it. Elsewhere: the family's own `generate`.

B rows in use, D hidden_size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from minillm.families.base import Family, Progress, Sampling
from minillm.families.noise import uniform
from minillm.families.sampling import filter_logits, penalise_repetition
from minillm.log import UserError
from minillm.models.cache import KeyValueCache, SlotCache
from minillm.models.decoding import decoder_of
from minillm.models.lora import adapted_layers
from minillm.models.transformer import LanguageModel
from minillm.rollout.base import Completion


@dataclass(slots=True)
class Row:
    """A completion on its way."""

    prompt: int
    copy: int
    draws: list[float]  # the random number of each token
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class ModelEngine:
    """Writes with a model in this process. It holds the model itself, so new weights are there at once.

    Args:
        rows: completions written at once, at most. They share memory for their keys and values.
        dtype: number format of the model's arithmetic (autocast), as in training; None: that of the weights.
    """

    def __init__(
        self, family: Family, model: LanguageModel, *, rows: int = 64, dtype: torch.dtype | None = None
    ) -> None:
        self.family, self.model, self.rows, self.dtype = family, model, rows, dtype

    def update(self, model: LanguageModel) -> None:
        """Write with this model; weights that change in place need no call."""
        self.model = model

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, count: int, sampling: Sampling, before: Sequence[Sequence[int]] = ()
    ) -> list[list[Completion]]:
        """`count` completions of each prompt: see `rollout.base.Engine`. Equal up to rounding, whatever `rows` is."""
        check_prompts(prompts, sampling, self.model.config.max_position_embeddings)
        if count < 1 or not prompts:
            return [[] for _ in prompts]
        seeds = completion_seeds([*before, *prompts], count, sampling.seed)[len(before) :]
        with self._evaluating():
            if self.family.ordered:
                return _Batch(self, prompts, count, sampling, seeds).run()
            return self._whole(prompts, count, sampling, seeds)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The model as in evaluation, in the number format of training, adapters merged into the weights."""
        training = self.model.training
        adapted = [layer for _, layer in adapted_layers(self.model) if layer.unmerged is None]
        self.model.eval()
        try:
            for layer in adapted:
                layer.merge()
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.low_precision):
                yield
        finally:
            for layer in adapted:
                layer.unmerge()
            self.model.train(training)

    @property
    def device(self) -> torch.device:
        return self.model.head_weight.device

    @property
    def low_precision(self) -> bool:
        return self.dtype not in (None, self.model.head_weight.dtype)

    def _whole(
        self, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling, seeds: np.ndarray
    ) -> list[list[Completion]]:
        """Canvases, `rows` at a time."""
        flat = [(list(prompt), int(seed)) for prompt, own in zip(prompts, seeds) for seed in own]
        written: list[Completion] = []
        for start in range(0, len(flat), self.rows):
            part = flat[start : start + self.rows]
            watch = _StopWatch(len(part), sampling.stop_ids)
            own = replace(sampling, seeds=tuple(seed for _, seed in part))
            texts = self.family.generate(self.model, [prompt for prompt, _ in part], own, watch)
            for row, tokens in enumerate(texts):
                stop = watch.stops[row] if watch.finished(row, sampling.max_new_tokens) else None
                if stop is not None:
                    tokens = [*tokens, stop]
                # a canvas of ignore tokens alone is a text that says nothing: a single one stands for it
                written.append(Completion(tokens or watch.canvas[row][:1], None, stop is not None))
        return [written[start : start + count] for start in range(0, len(written), count)]


class _StopWatch:
    """Watches canvases for the stop tokens that `generate` leaves out."""

    def __init__(self, rows: int, stop_ids: tuple[int, ...]) -> None:
        self.stop_ids = frozenset(stop_ids)
        self.canvas: list[list[int]] = [[] for _ in range(rows)]
        self.stops: list[int | None] = [None] * rows

    def __call__(self, progress: Progress) -> None:
        self.canvas = progress.tokens
        for row, tokens in enumerate(progress.tokens):
            if not self.stop_ids.isdisjoint(tokens):
                self.stops[row] = next(token for token in tokens if token in self.stop_ids)

    def finished(self, row: int, full: int) -> bool:
        """A row that ended in an earlier block is cut there; one that ended in the last shows its stop token."""
        return len(self.canvas[row]) < full or not self.stop_ids.isdisjoint(self.canvas[row])


class _Batch:
    """One call of the ordered kind: rows that are written, and completions that wait for a row."""

    def __init__(
        self, engine: ModelEngine, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling, seeds: np.ndarray
    ) -> None:
        self.model, self.device, self.sampling, self.prompts = engine.model, engine.device, sampling, prompts
        self.stop_ids = frozenset(sampling.stop_ids)
        self.dtype = engine.dtype if engine.low_precision and engine.dtype else self.model.head_weight.dtype
        self.decoder = decoder_of(self.model, self.dtype)
        draws = uniform(torch.from_numpy(seeds.reshape(-1)), 0, sampling.max_new_tokens).tolist()
        jobs = [(prompt, copy) for prompt in range(len(prompts)) for copy in range(count)]
        self.waiting = [Row(prompt, copy, own) for (prompt, copy), own in zip(jobs, draws)][::-1]  # the next one last
        self.done: list[list[Completion | None]] = [[None] * count for _ in prompts]
        self.cache = SlotCache(
            self.model.config,
            slots=min(engine.rows, len(jobs)),
            capacity=max(map(len, prompts)) + sampling.max_new_tokens,
            dtype=self.dtype,
            device=self.device,
        )
        self.rows: list[Row] = []
        self.read: tuple[KeyValueCache, Tensor, dict[int, int]] | None = None  # prompts whose copies still wait

    def run(self) -> list[list[Completion]]:
        states: list[Tensor] = []  # the last hidden states of all rows, [B, D] in pieces
        while self.waiting or self.rows:
            if self.waiting and len(self.rows) < self.cache.slots:
                states += self._enter()
            tokens = self._record(*self._choose(torch.cat(states)))
            states = []
            if self.rows:
                states.append(self.decoder.step(tokens, self.cache))
                self.cache.advance()
        return [[each for each in own if each is not None] for own in self.done]

    def _enter(self) -> list[Tensor]:
        """Fill the free rows with what waits; the last hidden state of their prompts, [new rows, D] in pieces."""
        free = self.cache.slots - len(self.rows)
        new = [self.waiting.pop() for _ in range(min(free, len(self.waiting)))]
        copies: dict[int, int] = {}
        for row in new:
            copies[row.prompt] = copies.get(row.prompt, 0) + 1
        states = []
        for part in self._known_and_unknown(list(copies)):
            if self.read is None or part[0] not in self.read[2]:
                self.read = self._prefill(part)
            cache, last, places = self.read
            for prompt in part:
                self.cache.add(cache, places[prompt], len(self.prompts[prompt]), copies[prompt])
                states.append(last[places[prompt]].expand(copies[prompt], -1))
        self.rows += new
        if not self.waiting:
            self.read = None
        return states

    def _known_and_unknown(self, prompts: list[int]) -> list[list[int]]:
        """First those that were read when another of their completions entered."""
        known = [prompt for prompt in prompts if self.read is not None and prompt in self.read[2]]
        return [part for part in (known, prompts[len(known) :]) if part]

    def _prefill(self, prompts: list[int]) -> tuple[KeyValueCache, Tensor, dict[int, int]]:
        """Read these prompts. What fills a shorter one up stands behind it, where causal attention never looks."""
        lengths = [len(self.prompts[prompt]) for prompt in prompts]
        tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for place, prompt in enumerate(prompts):
            tokens[place, : lengths[place]] = torch.tensor(self.prompts[prompt])
        rows = torch.arange(len(prompts), device=self.device)
        cache = KeyValueCache(
            self.model.config, batch=len(prompts), capacity=max(lengths), padding=rows * 0, dtype=self.dtype
        )
        hidden = self.model(tokens.to(self.device), cache=cache).hidden
        last = hidden[rows, torch.tensor(lengths, device=self.device) - 1]
        return cache, last, {prompt: place for place, prompt in enumerate(prompts)}

    def _choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each row, int64 [B], and its log-probability at temperature 1, float32 [B]."""
        sampling = self.sampling
        logits = self.decoder.logits(hidden).float()
        wishes = logits
        if sampling.repetition_penalty != 1.0:
            seen = [[*self.prompts[row.prompt], *row.tokens] for row in self.rows]
            wishes = penalise_repetition(logits, seen, sampling.repetition_penalty)
        if sampling.temperature == 0.0:
            chosen = wishes.argmax(-1)
            return chosen, logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
        own = sampling.temperature == 1.0 and not sampling.top_k and sampling.top_p == 1.0 and wishes is logits
        if not own:
            wishes = filter_logits(wishes, sampling)
        top = wishes.amax(-1, keepdim=True)
        masses = (wishes - top).exp_()
        draws = torch.tensor([row.draws[len(row.tokens)] for row in self.rows], device=self.device)
        chosen = draw(masses, draws)
        if own:
            return chosen, wishes.gather(1, chosen[:, None])[:, 0] - top[:, 0] - masses.sum(-1).log()
        return chosen, logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)

    def _record(self, chosen: Tensor, log_probs: Tensor) -> Tensor:
        """Write the tokens down; what is finished leaves. Returns the tokens of the rows that stay."""
        gone = []
        for index, (row, token, log_prob) in enumerate(zip(self.rows, chosen.tolist(), log_probs.tolist())):
            row.tokens.append(token)
            row.log_probs.append(log_prob)
            stopped = token in self.stop_ids
            if stopped or len(row.tokens) == self.sampling.max_new_tokens:
                self.done[row.prompt][row.copy] = Completion(row.tokens, row.log_probs, stopped)
                gone.append(index)
        if gone:
            # a row that has just entered is in the cache with its prompt alone, as the others with all but this token
            for source, target in self.cache.remove(gone):
                self.rows[target] = self.rows[source]
                chosen[target] = chosen[source]
            del self.rows[len(self.rows) - len(gone) :]
        return chosen[: len(self.rows)]


def draw(masses: Tensor, draws: Tensor) -> Tensor:
    """The token in which the running sum of `masses` [B, V] (not negative, of any total) exceeds draws [B] in [0, 1)
    times the total: int64 [B]."""
    sums = masses.cumsum(-1)
    total = sums[:, -1:]
    # rounding may lift the product to the total itself, behind the last token that may be chosen
    wanted = torch.minimum(draws[:, None].to(sums.dtype) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(sums, wanted, right=True)[:, 0]


def check_prompts(prompts: Sequence[Sequence[int]], sampling: Sampling, positions: int) -> None:
    """UserError for a prompt that is empty or leaves no room for the new tokens in the model's positions."""
    if sampling.max_new_tokens < 1:
        raise UserError("max_new_tokens is 0: a completion has at least one token")
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("a prompt is empty: give at least one token, such as <|endoftext|>")
    longest = max(map(len, prompts), default=0)
    if longest + sampling.max_new_tokens > positions:
        raise UserError(
            f"the longest prompt has {longest} tokens and {sampling.max_new_tokens} new ones are asked for; the model "
            f"has {positions} positions: lower --max_completion_length, or drop long prompts with --max_seq_len"
        )


def completion_seeds(prompts: Sequence[Sequence[int]], count: int, seed: int) -> np.ndarray:
    """A seed for each completion, int64 [prompts, count], not negative: of the seed, the prompt's tokens, how often the
    same prompt stood before it in the call, and the number of the completion."""
    before: dict[bytes, int] = {}
    seeds = np.empty((len(prompts), count), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        key = np.asarray(prompt, dtype=np.int64).tobytes()
        occurrence = before[key] = before.get(key, -1) + 1
        for copy in range(count):
            about = np.array([seed, occurrence, copy], dtype=np.int64).tobytes()
            digest = hashlib.blake2b(about + key, digest_size=8).digest()
            seeds[row, copy] = int.from_bytes(digest, "little") >> 2
    return seeds
