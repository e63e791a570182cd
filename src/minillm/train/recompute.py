"""Gradient checkpointing: what a layer computes on the way forward is forgotten, and computed again when its gradient
is taken (arXiv 1604.06174). Applied to the layers of any model from outside.

A layer of ours keeps 20.5 times its width for each token, 12 of them inside the feed-forward part. `full` keeps what
came into the layer and computes all of it again; `selective` forgets the feed-forward part alone. Losses and gradients
are the same to the last bit where the arithmetic repeats itself. docs/performance.md has what both cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, of which only the arguments are kept for the backward pass."""

    def recomputed(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        # Our layers draw no random numbers, so no generator's state is kept.
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    return recomputed


def checkpoint_layers(model: nn.Module, kind: str) -> None:
    """Give the layers of `model` gradient checkpointing of this kind: `none`, `selective` or `full`.

    A part's `forward` is replaced, not the part: names of parameters, `layer.compile()` and FSDP2's
    `fully_shard(layer)`, which come afterwards, see what they saw before."""
    if kind == "none":
        return
    backbone: Any = model.model
    parts = list(backbone.layers) if kind == "full" else [layer.mlp for layer in backbone.layers]
    if hasattr(backbone, "candidates") and backbone.candidates.bilateral:
        parts += backbone.candidates.layers  # narrow products on wide inputs: cheap to compute, dear to keep
    for part in parts:
        part.forward = _again(part.forward)
