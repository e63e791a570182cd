"""A reward model from its checkpoint, as a function of prompts and answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.checkpoint.model import OpenedCheckpoint, open_checkpoint
from minillm.log import UserError
from minillm.models.value import read
from minillm.text.chat import encode_chat
from minillm.text.tokenizer import Tokenizer

BATCH_TOKENS = 8192  # that are read at once


class RewardModel:
    """What a reward model says of answers. B texts of at most L tokens."""

    def __init__(self, opened: OpenedCheckpoint, device: str | torch.device = "cpu") -> None:
        self.tokenizer = opened.tokenizer  # whose token ids it reads
        self.end = _end_of_answers(opened.tokenizer)
        self.model = opened.model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Tensor:
        """The reward of each answer: float32 [B] on the CPU.

        Args:
            prompts: token ids up to where the answer begins, as the family's `generate` takes them.
            completions: token ids of the answer; the token that ends answers is put behind one that lacks it, since
                that is where the value is read.
        """
        texts = [
            [*prompt, *completion, *([] if completion and completion[-1] == self.end else [self.end])]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        rewards = torch.empty(len(texts))
        while order:
            longest = len(texts[order[-1]])
            count = max(1, BATCH_TOKENS // longest)
            rows, order = order[-count:], order[:-count]
            rewards[rows] = self._read([texts[row] for row in rows], longest)
        return rewards

    def _read(self, texts: list[list[int]], longest: int) -> Tensor:
        """Texts padded at the end to one length -> float32 [B]."""
        pad = self.tokenizer.pad_id
        tokens = torch.tensor([[*text, *[pad] * (longest - len(text))] for text in texts], device=self.device)
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        real = torch.arange(longest, device=self.device) < lengths[:, None]
        segments = None if self.model.config.causal else real.int() - 1  # padding is seen by nobody
        return self.model.score.of_sequence(read(self.model, tokens, segments=segments).hidden, real).cpu()


def _end_of_answers(tokenizer: Tokenizer) -> int:
    """The token with which the chat template ends an answer."""
    ids, mask = encode_chat(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}])
    return next(token for token, trained in zip(reversed(ids), reversed(mask)) if trained)


def open_reward_model(checkpoint: str, *, device: str | torch.device = "cpu") -> RewardModel:
    """A model that `minillm reward` trained (.pt or .pth), as a function from (prompts, completions) to float32 [B].

    Raises:
        UserError: the file is missing, damaged or unsafe, or its model has no value head.
    """
    opened = open_checkpoint(checkpoint)
    if not opened.model.config.value_head:
        raise UserError(f"{checkpoint} is no reward model: it has no value head. Train one with `minillm reward`")
    return RewardModel(opened, device)
