"""One number for a hidden state: what a reward model says of a text, and what a critic expects of it.

It is the head of Hugging Face's ...ForSequenceClassification with one label: `score.weight` [1, D], no bias. A model
has it where its configuration says `value_head`. B batch, L length, D hidden_size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minillm.models.candidates import Candidates

if TYPE_CHECKING:
    from minillm.models.transformer import LanguageModel, Output


class ValueHead(nn.Linear):
    """It begins with zeros: every value is 0 before training, and no random number is drawn."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """A value for each position: hidden [.., D] -> float32 [..], in float32 under autocast too."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float()).squeeze(-1)

    def of_sequence(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The value at the last position where mask (bool [B, L]) is True: hidden [B, L, D] -> float32 [B]. A row
        without such a position gets that of its first."""
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * places).amax(1)
        return self(hidden[torch.arange(len(hidden), device=hidden.device), last])


def add_value_head(model: LanguageModel) -> LanguageModel:
    """Give the model a head of zeros where it has none, and say so in its configuration; the same model."""
    if not model.config.value_head:
        model.config = replace(model.config, value_head=True)
        model.score = ValueHead(model.config.hidden_size).to(model.head_weight)
    return model


def read(
    model: LanguageModel, tokens: Tensor, *, positions: Tensor | None = None, segments: Tensor | None = None
) -> Output:
    """What the model says of tokens [B, L] that are all visible, whether its positions hold tokens or candidates."""
    inputs = Candidates.known(tokens, 1) if model.config.denoiser else tokens
    return model(inputs, positions=positions, segments=segments)
