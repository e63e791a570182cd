"""Masked diffusion (MDLM, arXiv 2406.07524; LLaDA, 2502.09992): hidden positions are predicted from all others.

The loss is an upper bound on the negative log-likelihood. With `diffusion_block` (BD3-LM, arXiv 2503.09573) a row
is cut into blocks, autoregressive among each other and diffusion within; a block of one token is AR.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minillm.families.base import Noise, Progress, Sampling, Score, SpecialIds, TokenBatch, View
from minillm.families.masking import Hidden, bound, extra_positions, hide, hide_some, opening_mask
from minillm.families.settings import FamilyConfig
from minillm.families.unmasking import write
from minillm.models.candidates import Candidates
from minillm.models.transformer import LanguageModel


class Diffusion:
    name = "diffusion"
    causal = False
    denoiser = ""
    ordered = False
    likelihood = "upper_bound"

    def __init__(self, config: FamilyConfig, ids: SpecialIds) -> None:
        self.config, self.ids = config, ids
        self.tail = config.tail

    def view(self, model: LanguageModel, batch: TokenBatch, noise: Noise) -> View:
        """Hide positions behind the mask token; a hidden one weighs m'(t) / m(t) (1 / t for the linear schedule)."""
        config = self.config
        hidden = hide(batch, noise, config.noise_schedule, self.ids.ignore, config.diffusion_block)
        return self._view(batch, hidden, opening_mask(batch, noise, config.anneal_steps))

    def _view(self, batch: TokenBatch, hidden: Hidden, mask: Tensor | None = None) -> View:
        noised = batch.tokens.masked_fill(hidden.where, self.ids.mask)
        count = int(batch.loss_mask.sum())
        extra = extra_positions(batch, self.ids.ignore)
        if not self.config.diffusion_block:
            return View(
                noised, batch.tokens, hidden.weights, count, batch.positions, batch.segments, mask, extra
            )  # fmt: skip
        return _beside_clean(batch, noised, hidden.weights, count, extra, self.config.diffusion_block)

    def score(self, model: LanguageModel, batch: TokenBatch, noise: Noise) -> Score:
        """The bound, by Monte Carlo over `score_samples` draws."""
        samples = self.config.score_samples
        if self.config.diffusion_block:  # every block has its own level: drawn as in training
            return bound(model, batch, samples, lambda i: self.view(model, batch, noise.sample(i, samples)))
        return bound(model, batch, samples, lambda i: self._view(batch, hide_some(batch, noise, i, samples)))

    @torch.inference_mode()
    def generate(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        watch: Callable[[Progress], None] | None = None,
    ) -> list[list[int]]:
        """Reveal a canvas of masks, block after block where the sampling or the model says so."""
        block = self.config.diffusion_block
        if block:
            sampling = replace(sampling, block_length=block)

        def see(tokens: Tensor, hidden: Tensor, _: Candidates | None) -> Tensor:
            return tokens.masked_fill(hidden, self.ids.mask)

        return write(model, prompts, sampling, self.ids, see, candidates=0, block_causal=bool(block), watch=watch)


def _beside_clean(batch: TokenBatch, noised: Tensor, weights: Tensor, count: int, extra: Tensor, block: int) -> View:
    """The noised row and behind it the clean one, [B, 2 L]: a noised block sees itself and the clean blocks before
    it, a clean block sees itself and the clean blocks before it (BD3-LM, figure 3)."""
    rows, length = batch.tokens.shape
    device = batch.tokens.device
    positions = batch.positions
    if positions is None:
        positions = torch.arange(length, device=device).expand(rows, length)
    segments = batch.segments
    if segments is None:
        segments = torch.zeros(rows, length, dtype=torch.int32, device=device)
    blocks = positions // block
    same = segments[:, :, None] == segments[:, None, :]
    own = same & (blocks[:, :, None] == blocks[:, None, :])
    before = same & (blocks[:, :, None] > blocks[:, None, :])
    mask = torch.cat((torch.cat((own, before), dim=2), torch.cat((torch.zeros_like(own), own | before), dim=2)), dim=1)
    none = torch.zeros_like(weights)
    return View(
        inputs=torch.cat((noised, batch.tokens), dim=1),
        targets=torch.cat((batch.tokens, batch.tokens), dim=1),
        weights=torch.cat((weights, none), dim=1),
        count=count,
        positions=torch.cat((positions, positions), dim=1),
        segments=torch.cat((segments, segments), dim=1),
        mask=mask[:, None],
        extra=torch.cat((extra, torch.zeros_like(extra)), dim=1),
    )
