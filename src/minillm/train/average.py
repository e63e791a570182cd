"""A running average of the weights (EMA): smoother than the last step, and what is evaluated and kept when on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minillm.train import parallel


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, after every step. The decay grows from 0.1 at the first
    step to its value, as (1 + step) / (10 + step): an average must not remember the random start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 1)."""
        decay = min(self.decay, step / (9 + step))
        weights = [parallel.local(value.detach()) for name, value in model.named_parameters() if name in self.average]
        torch._foreach_lerp_([parallel.local(value) for value in self.average.values()], weights, 1.0 - decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name in self.average:
                weight, average = parallel.local(parameter), parallel.local(self.average[name])
                kept = weight.clone()
                weight.copy_(average)
                average.copy_(kept)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights under the model's own keys, averaged where they are trained."""
        return {**model.state_dict(), **self.average}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(parallel.like(state[name], value))
