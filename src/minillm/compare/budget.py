"""What a training run may use, in tokens, steps or FLOPs, and how many FLOPs a step takes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from minillm.config import UsageError

if TYPE_CHECKING:
    from minillm.train.settings import Settings

KINDS = ("tokens", "flops", "steps")
SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
COUNTED_STEPS = 8  # of a run, evenly spread: noise levels and the curriculum change a step's work
COUNTED_ROWS = 4


class Budget(NamedTuple):
    kind: str
    amount: float

    def steps(self, tokens_per_step: int, flops_per_step: float) -> int:
        """The whole steps that the budget pays for, one at least."""
        cost = {"tokens": tokens_per_step, "flops": flops_per_step, "steps": 1}[self.kind]
        return max(1, math.floor(self.amount / cost))


def read_budget(text: str) -> Budget:
    """tokens:600k, flops:1e15, steps:200. Raises UsageError for anything else."""
    kind, _, amount = text.lower().partition(":")
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kmb]?)", amount.strip())
    try:
        if kind not in KINDS or not match:
            raise ValueError
        value = float(match[1]) * SUFFIXES[match[2]]
        if value <= 0 or not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise UsageError(f"--budget {text!r}: give tokens:600k, flops:1e15 or steps:200") from None
    return Budget(kind, value)


def flops_per_step(settings: Settings, *, rows: int, total_steps: int) -> float:
    """FLOPs of one optimizer step's forward and backward passes over `rows` rows, counted by running a few.

    Matrix products and attention as the model takes them: SDD's first passes, its candidates, and logits only
    where something is predicted all count as what they are. Element-wise work and the optimizer do not.
    """
    import numpy as np
    import torch

    from minillm.data.batches import Batch
    from minillm.families import get_family
    from minillm.methods.likelihood import Likelihood
    from minillm.train.start import build_model, find_start, open_tokenizer

    start = find_start("pretrain", settings)
    tokenizer = open_tokenizer(settings, start)
    family = get_family(start.family, tokenizer)
    model, _ = build_model(settings, start, family, tokenizer, None)
    method = Likelihood(family, settings.run.seed)
    length = settings.data.max_seq_len
    generator = np.random.default_rng(settings.run.seed)
    total = 0
    for index in range(COUNTED_STEPS):
        tokens = generator.integers(tokenizer.vocab_size, size=(COUNTED_ROWS, length))
        ids = np.arange(COUNTED_ROWS) + index * COUNTED_ROWS
        batch = Batch(tokens, np.ones(tokens.shape, dtype=bool), None, None, ids)
        with _counter() as counter:
            part = method.prepare(
                model, batch, torch.device("cpu"), index * total_steps // COUNTED_STEPS, index * COUNTED_ROWS
            )
            method.loss(model, part.data).loss.backward()
        total += counter.get_total_flops()
    return total * rows / (COUNTED_STEPS * COUNTED_ROWS)


def _counter() -> Any:
    """torch's counter, with the operations of the CPU that it does not know."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def product(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    def added_product(out: Sequence[int], x: Sequence[int], y: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * x[0] * x[1] * y[1]

    def pairs(q: Sequence[int], k: Sequence[int], causal: bool) -> int:
        """FLOPs of one product of attention: [B, H, L, E] with [B, H, S, E]; causal kernels skip what lies ahead."""
        batch, heads, length, width = q
        looked_at = length * (length + 1) // 2 if causal else length * k[2]
        return 2 * batch * heads * looked_at * width

    def attention(q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, *_: Any, **__: Any) -> int:
        return 2 * pairs(q, k, causal)

    def attention_backward(grad: Any, q: Any, k: Any, v: Any, *others: Any, **__: Any) -> int:
        return 5 * pairs(q, k, others[3])  # the scores again, then the gradients of v, scores, q and k

    aten = torch.ops.aten
    known: dict[Any, Any] = {
        aten.addmm_: added_product,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if onednn is not None:
        known[onednn] = product
    return FlopCounterMode(display=False, custom_mapping=known)
