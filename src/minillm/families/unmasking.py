"""Writing in no order: a canvas of hidden positions, of which each step reveals some. Diffusion and SDD share it.

B rows, P prefix, N positions of the block under way, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.families.base import Progress, Sampling, SpecialIds
from minillm.families.sampling import choose, penalise_repetition
from minillm.models.cache import KeyValueCache
from minillm.models.candidates import Candidates
from minillm.models.decoding import decoder_of
from minillm.models.transformer import LanguageModel

Watch = Callable[[Progress], None]


@dataclass
class Block:
    """The positions under way."""

    tokens: Tensor  # int64 [B, N]; what stands where a position is hidden means nothing
    hidden: Tensor  # bool [B, N]
    beliefs: Candidates | None  # [B, N, K]
    confidence: Tensor  # float32 [B, N]: the probability a revealed token had; infinite for what was given


class Writer:
    """Prompts on their way to text. `show` is the family: (tokens, hidden, beliefs) -> model inputs."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        ids: SpecialIds,
        show: Callable[[Tensor, Tensor, Candidates | None], Tensor | Candidates],
        *,
        candidates: int,
        block_causal: bool,
        watch: Watch | None,
    ) -> None:
        self.model, self.sampling, self.ids, self.show, self.watch = model, sampling, ids, show, watch
        self.candidates, self.block_causal = candidates, block_causal
        self.device = model.head_weight.device
        self.decoder = decoder_of(model) if sampling.block_length else None
        self.prompts = prompts
        self.written: list[list[int]] = [[] for _ in prompts]

    def run(self, rows: list[int]) -> None:
        """Write the new tokens of these prompts."""
        prompts, sampling = [self.prompts[row] for row in rows], self.sampling
        longest = max(map(len, prompts))
        self.alive = rows
        self.padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=self.device)
        self.prefix = torch.tensor(
            [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], dtype=torch.int64, device=self.device
        ).view(len(prompts), longest)
        self.generators = {row: sampling.generator(row) for row in rows}
        length = sampling.block_length or sampling.max_new_tokens
        cache = self._prefill() if self.block_causal else None
        left = sampling.max_new_tokens
        while left and self.alive:
            given = self.prefix.shape[1] - (cache.length if cache else self.prefix.shape[1])
            new = min(length - given, left)
            block = self._write_block(given, new, cache)
            left -= new
            self._finish(block, given, cache)

    def _prefill(self) -> KeyValueCache:
        """The whole blocks of the prompts, each seeing itself and those before it. Prompts are of one length."""
        size = self.sampling.block_length
        cache = self._new_cache(self.prefix.shape[1] + self.sampling.max_new_tokens + size)
        for start in range(0, self.prefix.shape[1] // size * size, size):
            self._look(self.prefix[:, start : start + size], None, None, cache)
        return cache

    def _new_cache(self, capacity: int) -> KeyValueCache:
        model = self.model
        return KeyValueCache(
            model.config, batch=len(self.alive), capacity=capacity, padding=self.padding, dtype=model.head_weight.dtype
        )

    def _look(
        self, tokens: Tensor, hidden: Tensor | None, beliefs: Candidates | None, cache: KeyValueCache | None
    ) -> Tensor:
        """Hidden states [B, L, D] of tokens [B, L]; without a cache the tokens are the whole row."""
        if hidden is None:
            hidden = torch.zeros_like(tokens, dtype=torch.bool)
        inputs = self.show(tokens, hidden, beliefs)
        if cache is not None and self.decoder is not None:
            return self.decoder.read(inputs, cache)
        slots = torch.arange(tokens.shape[1], device=self.device)[None] - self.padding[:, None]
        segments = torch.where(slots < 0, -1, 0) if bool(self.padding.any()) else None
        return self.model(inputs, positions=slots.clamp(min=0), segments=segments).hidden

    def _start(self, given: int, new: int) -> Block:
        """The block's given tokens (the rest of a prompt) and `new` hidden positions."""
        rows = len(self.alive)
        tokens = torch.zeros(rows, given + new, dtype=torch.int64, device=self.device)
        hidden = torch.ones(rows, given + new, dtype=torch.bool, device=self.device)
        confidence = torch.zeros(rows, given + new, device=self.device)
        if given:
            tokens[:, :given], hidden[:, :given] = self.prefix[:, -given:], False
            confidence[:, :given] = torch.inf
        beliefs = None
        if self.candidates:
            vocabulary = self.ids.vocabulary
            drawn = [
                torch.randint(vocabulary, (given + new, self.candidates), generator=self.generators[row])
                for row in self.alive
            ]
            beliefs = uniform_beliefs(torch.stack(drawn).to(self.device), vocabulary)
        return Block(tokens, hidden, beliefs, confidence)

    def _write_block(self, given: int, new: int, cache: KeyValueCache | None) -> Block:
        """Predict and reveal until nothing is hidden. The prefix is read once a block; without blocks, every step."""
        sampling, block = self.sampling, self._start(given, new)
        steps = new
        if sampling.steps:
            steps = max(1, min(new, round(sampling.steps * new / sampling.max_new_tokens)))
        whole = not sampling.block_length
        step = 0 if block.beliefs is None else -1  # nothing is revealed from total uncertainty: beliefs come first
        while bool(block.hidden.any()):
            if step > 0 and sampling.remask and not sampling.threshold:
                self._hide_again(block)
            if cache is None:
                prefix = self.prefix.shape[1]
                own = None if whole else self._new_cache(prefix + given + new)
                states = self._look_at_all(block, own)[:, prefix:]
                if own is not None:
                    cache, committed = own, prefix
            else:
                committed = cache.length
                states = self._look(block.tokens, block.hidden, block.beliefs, cache)
            if cache is not None:
                cache.truncate(committed)
            step += 1
            if step == 0:
                self._sharpen(block, self._logits(block, states))
            else:
                self._reveal(block, states, max(0, round(new * (1 - step / steps))))
        return block

    def _look_at_all(self, block: Block, cache: KeyValueCache | None) -> Tensor:
        tokens = torch.cat((self.prefix, block.tokens), dim=1)
        hidden = torch.cat((torch.zeros_like(self.prefix, dtype=torch.bool), block.hidden), dim=1)
        beliefs = block.beliefs
        if beliefs is not None:
            before = Candidates.known(self.prefix, self.candidates)
            beliefs = Candidates(*(torch.cat(pair, dim=1) for pair in zip(before, beliefs)))
        return self._look(tokens, hidden, beliefs, cache)

    def _logits(self, block: Block, states: Tensor) -> Tensor:
        """Of the hidden positions, float32 [hidden, V]."""
        logits = self.model.logits(states[block.hidden]).float()
        logits[:, list(self.ids.control)] = float("-inf")
        return logits

    def _sharpen(self, block: Block, logits: Tensor) -> None:
        """What is predicted for the hidden positions is what is believed about them now."""
        if block.beliefs is not None:
            best = Candidates.most_probable(logits, self.candidates)
            block.beliefs.tokens[block.hidden] = best.tokens
            block.beliefs.probabilities[block.hidden] = best.probabilities

    def _reveal(self, block: Block, states: Tensor, stay_hidden: int) -> None:
        """Choose a token for every hidden position, keep the best, and sharpen what is believed about the rest."""
        sampling = self.sampling
        logits = self._logits(block, states)
        self._sharpen(block, logits)
        rows, columns = block.hidden.nonzero(as_tuple=True)
        row_list = rows.tolist()
        probabilities = logits.softmax(-1)
        if sampling.repetition_penalty != 1.0:
            seen = [self._seen(row, block) for row in range(len(self.alive))]
            logits = penalise_repetition(logits, [seen[row] for row in row_list], sampling.repetition_penalty)
        chosen = choose(logits, sampling, [self.generators[self.alive[row]] for row in row_list])
        confidence = probabilities.gather(1, chosen[:, None]).squeeze(1)
        wish = torch.full(block.hidden.shape, -1.0, device=self.device)
        if sampling.order == "random":
            drawn = [torch.rand(wish.shape[1], generator=self.generators[row]) for row in self.alive]
            wish = torch.where(block.hidden, torch.stack(drawn).to(self.device), wish)
        else:
            wish[rows, columns] = confidence
        rank = wish.argsort(dim=1, descending=True, stable=True).argsort(1)
        if sampling.threshold:
            sure = torch.zeros_like(block.hidden)
            sure[rows, columns] = confidence >= sampling.threshold
            now = block.hidden & (sure | (rank == 0))
        else:
            now = block.hidden & (rank < (block.hidden.sum(1, keepdim=True) - stay_hidden).clamp(min=1))
        taken = now[rows, columns]
        block.tokens[rows[taken], columns[taken]] = chosen[taken]
        block.confidence[rows[taken], columns[taken]] = confidence[taken]
        block.hidden &= ~now
        if self.watch is not None:
            self.watch(self._progress(block))

    def _progress(self, block: Block) -> Progress:
        given = block.tokens.shape[1] - int((block.confidence[0] != torch.inf).sum())
        shown = block.tokens.masked_fill(block.hidden, self.ids.mask)[:, given:].tolist()
        tokens = [list(row) for row in self.written]
        for row, new in zip(self.alive, shown):
            tokens[row] += new
        beliefs = block.beliefs
        return Progress(tokens, beliefs and Candidates(beliefs.tokens.clone(), beliefs.probabilities.clone()))

    def _hide_again(self, block: Block) -> None:
        """The least sure of what was revealed in this block may be thought over (arXiv 2503.00307)."""
        revealed = ~block.hidden & block.confidence.isfinite()
        count = (revealed.sum(1, keepdim=True) * self.sampling.remask).floor()
        rank = block.confidence.masked_fill(~revealed, torch.inf).argsort(dim=1, stable=True).argsort(1)
        block.hidden |= revealed & (rank < count)

    def _seen(self, row: int, block: Block) -> list[int]:
        known = block.tokens[row][~block.hidden[row]].tolist()
        return self.prefix[row, int(self.padding[row]) :].tolist() + known

    def _finish(self, block: Block, given: int, cache: KeyValueCache | None) -> None:
        """Take over the block's tokens; rows that met a stop token leave the batch."""
        stay = []
        for index, row in enumerate(self.alive):
            new = block.tokens[index, given:].tolist()
            end = next((i for i, token in enumerate(new) if token in self.sampling.stop_ids), None)
            self.written[row] += new[:end]
            if end is None:
                stay.append(index)
        if cache is not None and stay:
            self._look(block.tokens, None, None, cache)  # now that it is written, the next block may look at it
        self.prefix = torch.cat((self.prefix, block.tokens[:, given:]), dim=1)
        if len(stay) < len(self.alive):
            keep = torch.tensor(stay, dtype=torch.int64, device=self.device)
            self.prefix, self.padding = self.prefix[keep], self.padding[keep]
            self.alive = [self.alive[index] for index in stay]
            if cache is not None and stay:
                cache.keep(keep)


def uniform_beliefs(tokens: Tensor, vocabulary: int) -> Candidates:
    """Total uncertainty: K random tokens [.., K] at 1 / V each, the rest belongs to REST."""
    return Candidates(tokens, torch.full(tokens.shape, 1.0 / vocabulary, device=tokens.device))


def write(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ids: SpecialIds,
    show: Callable[[Tensor, Tensor, Candidates | None], Tensor | Candidates],
    *,
    candidates: int = 0,
    block_causal: bool = False,
    watch: Watch | None = None,
) -> list[list[int]]:
    """New tokens for each prompt, up to the first stop token, without ignore tokens.

    `block_causal` models (BD3-LM) never look ahead of a block, so the cache of finished blocks is exact; their
    blocks are counted from the first token, so prompts of one length go together. For the others a block's first
    step reads the whole row and the following ones reuse the prefix (Fast-dLLM, arXiv 2505.22618).

    Raises:
        ValueError: prompt and new tokens exceed the model's positions.
    """
    if not prompts or sampling.max_new_tokens < 1:
        return [[] for _ in prompts]
    longest, limit = max(map(len, prompts)), model.config.max_position_embeddings
    if longest + sampling.max_new_tokens > limit:
        raise ValueError(f"{longest} prompt tokens and {sampling.max_new_tokens} new ones exceed the {limit} positions")
    groups = [list(range(len(prompts)))]
    if block_causal:
        lengths = sorted({len(prompt) for prompt in prompts})
        groups = [[row for row, prompt in enumerate(prompts) if len(prompt) == length] for length in lengths]
    writer = Writer(model, prompts, sampling, ids, show, candidates=candidates, block_causal=block_causal, watch=watch)
    for rows in groups:
        writer.run(rows)
    return [[token for token in row if token != ids.ignore] for row in writer.written]
