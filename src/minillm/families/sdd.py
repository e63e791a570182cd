"""Sparse-distribution diffusion: a hidden position holds a belief, k candidates with their probabilities.

Training hides positions behind beliefs that do not know the answer: total uncertainty, or the model's own first
prediction from it, at times from less than is shown beside it. A belief is a function of what is visible, so the
weighted loss is an upper bound on the negative log-likelihood, comparable with the diffusion family's. `swap` is the
published recipe, whose beliefs are made from the answer; its loss is no likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minillm.families.base import Noise, Progress, Sampling, Score, SpecialIds, TokenBatch, View
from minillm.families.masking import (
    FILL,
    LATER,
    LATER_SHARE,
    LEVELS,
    ROWS,
    Hidden,
    bound,
    extra_positions,
    hide,
    hide_some,
    opening_mask,
)
from minillm.families.noise import levels, random_integers, uniform
from minillm.families.settings import FamilyConfig
from minillm.families.unmasking import uniform_beliefs, write
from minillm.models.candidates import Candidates
from minillm.models.transformer import LanguageModel


class SparseDistributionDiffusion:
    name = "sdd"
    causal = False
    ordered = False
    kept_belief = 0.9  # from one step of writing to the next; the rest goes to REST

    def __init__(self, config: FamilyConfig, ids: SpecialIds) -> None:
        self.config, self.ids = config, ids
        self.tail, self.denoiser = config.tail, config.denoiser
        self.likelihood = "upper_bound" if config.noise == "belief" else "none"

    def candidates_at(self, step: int) -> int:
        """k of the curriculum: its entries share `k_warmup_steps` evenly, the last one stays."""
        schedule, warmup = self.config.k_schedule, self.config.k_warmup_steps
        if step < 0 or step >= warmup:
            return schedule[-1]
        return schedule[step * len(schedule) // warmup]

    def view(self, model: LanguageModel, batch: TokenBatch, noise: Noise) -> View:
        """Hide positions behind beliefs. In training a share of the rows gets the model's own, in evaluation all."""
        count = self.candidates_at(noise.step)
        if self.config.noise == "swap":
            return self._swapped(batch, noise, count)
        hidden = hide(batch, noise, self.config.noise_schedule, self.ids.ignore)
        rows = torch.ones(len(batch.tokens), dtype=torch.bool, device=batch.tokens.device)
        unseen = hidden.where
        if noise.step >= 0:
            rows = uniform(noise.seeds, ROWS, 1).squeeze(1) < self.config.belief_share
            unseen = unseen | self._revealed_later(batch, noise)
        return self._view(
            model, batch, noise, hidden, count, rows, unseen, opening_mask(batch, noise, self.config.anneal_steps)
        )

    def _revealed_later(self, batch: TokenBatch, noise: Noise) -> Tensor:
        """Trained positions that training hides when beliefs are formed and shows when they are read: in three
        quarters of the rows none, in the others a share drawn evenly from 0 to 1. bool [B, L].

        Writing always reads beliefs that are a step older than the tokens beside them. A model that has only seen
        beliefs of the same moment learns to trust them, and does not hear what was revealed since."""
        share = (4.0 * uniform(noise.seeds, LATER_SHARE, 1) - 3.0).clamp(min=0.0)
        drawn = uniform(noise.seeds, LATER, batch.tokens.shape[1])
        return (drawn < share) & (batch.loss_mask | extra_positions(batch, self.ids.ignore))

    def _view(
        self,
        model: LanguageModel,
        batch: TokenBatch,
        noise: Noise,
        hidden: Hidden,
        count: int,
        second_pass: Tensor,
        unseen: Tensor,
        mask: Tensor | None = None,
    ) -> View:
        """`second_pass` bool [B]: the rows whose beliefs are the model's prediction from total uncertainty; `unseen`
        bool [B, L]: what that prediction could not see, the hidden positions at least."""
        known = Candidates.known(batch.tokens, count)
        unsure = self._total_uncertainty(noise.seeds, batch.tokens.shape[1], count)
        state = unsure.where(hidden.where, known)
        if bool(second_pass.any()):
            own = self._own_beliefs(model, batch, unsure.where(unseen, known), hidden.where, second_pass, mask)
            state = own.where(hidden.where & second_pass.unsqueeze(1), state)
        return View(
            inputs=state,
            targets=batch.tokens,
            weights=hidden.weights,
            count=int(batch.loss_mask.sum()),
            positions=batch.positions,
            segments=batch.segments,
            mask=mask,
            extra=extra_positions(batch, self.ids.ignore),
            log={"k": float(count)},
        )

    def _total_uncertainty(self, seeds: Tensor, length: int, count: int) -> Candidates:
        drawn = random_integers(seeds, FILL, length * count) % self.ids.vocabulary
        return uniform_beliefs(drawn.view(len(seeds), length, count), self.ids.vocabulary)

    @torch.no_grad()
    def _own_beliefs(
        self,
        model: LanguageModel,
        batch: TokenBatch,
        state: Candidates,
        hidden: Tensor,
        rows: Tensor,
        mask: Tensor | None,
    ) -> Candidates:
        """The top k of the model's prediction, at the hidden positions of these rows (bool [B])."""
        index = rows.nonzero().squeeze(1)
        part = state.rows(index)
        device = index.device.type

        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        # Weights that are cast here have no gradient: autocast must not keep them for the pass that trains.
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            output = model(part, positions=of(batch.positions), segments=of(batch.segments), mask=of(mask))
        row, column = hidden[index].nonzero(as_tuple=True)
        tokens, probabilities = state.tokens.clone(), state.probabilities.clone()
        for piece in torch.arange(len(row), device=row.device).split(BELIEF_ROWS):
            best = Candidates.most_probable(
                model.logits(output.hidden[row[piece], column[piece]]), state.tokens.shape[-1]
            )
            tokens[index[row[piece]], column[piece]] = best.tokens
            probabilities[index[row[piece]], column[piece]] = best.probabilities
        return Candidates(tokens, probabilities)

    def _swapped(self, batch: TokenBatch, noise: Noise, count: int) -> View:
        """The published recipe: from {(1, token)} each candidate is swapped for a random token with probability
        n (1 - (p / p_max) (1 - n)), n = 1 - cos(t pi / 2), and the mass that survives is flattened towards 1 / V.
        All trained positions count, whether their answer is still among the candidates or not."""
        rows, length = batch.tokens.shape
        t = levels(noise.seed, noise.slots, 1, noise.shift)
        amount = (1.0 - torch.cos(0.5 * math.pi * t)).view(rows, 1, 1).float()
        known = Candidates.known(batch.tokens, count)
        chance = amount * (1.0 - known.probabilities * (1.0 - amount))
        swap = uniform(noise.seeds, LEVELS, length * count).view(rows, length, count) < chance
        noised = (batch.loss_mask | extra_positions(batch, self.ids.ignore)).unsqueeze(-1)
        random = self._total_uncertainty(noise.seeds, length, count)
        flat = known.probabilities * (1.0 - amount) + amount / self.ids.vocabulary
        state = Candidates(
            torch.where(swap & noised, random.tokens, known.tokens), torch.where(noised, flat, known.probabilities)
        )
        extra = extra_positions(batch, self.ids.ignore)
        weights = torch.where(extra, (1.0 - t).square().float(), 1.0) * noised.squeeze(-1)
        return View(
            state, batch.tokens, weights, int(batch.loss_mask.sum()), batch.positions, batch.segments, None, extra,
            {"k": float(count)},
        )  # fmt: skip

    def score(self, model: LanguageModel, batch: TokenBatch, noise: Noise) -> Score:
        """The bound with the model's own beliefs (two passes), by Monte Carlo over `score_samples` draws."""
        samples, count = self.config.score_samples, self.candidates_at(-1)
        if self.config.noise == "swap":
            return bound(model, batch, samples, lambda i: self._swapped(batch, noise.sample(i, samples), count))
        rows = torch.ones(len(batch.tokens), dtype=torch.bool, device=batch.tokens.device)

        def view(i: int) -> View:
            hidden = hide_some(batch, noise, i, samples)
            return self._view(model, batch, noise.sample(i, samples), hidden, count, rows, hidden.where)

        return bound(model, batch, samples, view)

    @torch.inference_mode()
    def generate(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        watch: Callable[[Progress], None] | None = None,
    ) -> list[list[int]]:
        """All new positions start at total uncertainty; each step sharpens the beliefs and reveals some tokens.

        Beliefs fade a little from step to step: training forms them once, and what is formed from itself again and
        again grows surer than the model has reason to be (experiments/sdd.md)."""
        count, kept = self.candidates_at(-1), self.kept_belief

        def show(tokens: Tensor, hidden: Tensor, beliefs: Candidates | None) -> Candidates:
            known = Candidates.known(tokens, count)
            if beliefs is None:
                return known
            return Candidates(beliefs.tokens, beliefs.probabilities * kept).where(hidden, known)

        return write(model, prompts, sampling, self.ids, show, candidates=count, watch=watch)


BELIEF_ROWS = 1024  # logits held at once while beliefs are made
