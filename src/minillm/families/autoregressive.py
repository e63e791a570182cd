"""Autoregressive: each token is predicted from those before it. The likelihood is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from minillm.families.base import Noise, Progress, Sampling, Score, TokenBatch, View
from minillm.families.sampling import choose, penalise_repetition
from minillm.models.cache import KeyValueCache
from minillm.models.decoding import decoder_of
from minillm.models.heads import token_log_probs
from minillm.models.transformer import LanguageModel


class Autoregressive:
    name = "ar"
    causal = True
    denoiser = ""
    ordered = True
    tail = 0
    likelihood = "exact"

    def __init__(self, *_: object) -> None:
        """It needs to know neither settings nor special tokens."""

    def view(self, model: LanguageModel, batch: TokenBatch, noise: Noise) -> View:
        """Shift by one: position i predicts token i + 1 of its own segment. No noise."""
        targets = torch.roll(batch.tokens, -1, dims=1)
        trained = torch.roll(batch.loss_mask, -1, dims=1)
        trained[:, -1] = False
        if batch.segments is not None:
            trained &= batch.segments == torch.roll(batch.segments, -1, dims=1)
        return View(
            batch.tokens,
            targets,
            trained.float(),
            int(trained.sum()),
            positions=batch.positions,
            segments=batch.segments,
        )

    def score(self, model: LanguageModel, batch: TokenBatch, noise: Noise) -> Score:
        view = self.view(model, batch, noise)
        hidden = view.through(model).hidden
        mask = view.weights != 0
        per_token = token_log_probs(hidden, model.head_weight, view.targets, mask)
        return Score(per_token.sum(1), mask.sum(1), per_token)

    @torch.inference_mode()
    def generate(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        watch: Callable[[Progress], None] | None = None,
    ) -> list[list[int]]:
        """Left-padded, with a key/value cache; rows that meet a stop token leave the batch."""
        if not prompts or sampling.max_new_tokens < 1:
            return [[] for _ in prompts]
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("a prompt is empty: give at least one token, such as <|endoftext|>")
        longest = max(len(prompt) for prompt in prompts)
        capacity = longest + sampling.max_new_tokens
        limit = model.config.max_position_embeddings
        if capacity > limit:
            raise ValueError(
                f"{longest} prompt tokens and {sampling.max_new_tokens} new ones exceed the {limit} positions"
            )
        device = model.head_weight.device
        padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
        tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        cache = KeyValueCache(
            model.config, batch=len(prompts), capacity=capacity, padding=padding, dtype=model.head_weight.dtype
        )
        written: list[list[int]] = [[] for _ in prompts]
        generators = [sampling.generator(row) for row in range(len(prompts))]
        alive = list(range(len(prompts)))
        hidden, decoder = model(tokens, cache=cache).hidden[:, -1], decoder_of(model)
        chosen = tokens[:, -1]
        for place in range(sampling.max_new_tokens):
            if place:
                hidden = decoder.step(chosen, cache)
            logits = decoder.logits(hidden)
            seen = [[*prompts[row], *written[row]] for row in alive] if sampling.repetition_penalty != 1.0 else []
            logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
            chosen = choose(logits, sampling, [generators[row] for row in alive])
            stay = []
            for index, (row, token) in enumerate(zip(alive, chosen.tolist())):
                if token in sampling.stop_ids:
                    continue
                written[row].append(token)
                stay.append(index)
            if watch is not None:
                watch(Progress(written))
            if not stay:
                break
            if len(stay) < len(alive):
                keep = torch.tensor(stay, device=device)
                chosen, alive = chosen[keep], [alive[index] for index in stay]
                cache.keep(keep)
        return written
