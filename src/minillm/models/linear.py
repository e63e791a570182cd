"""The matrix products of the layers and the head, each by the library that is fast on this processor.

torch takes a CPU's float32 products from MKL. On AMD cores oneDNN's kernels took 0.92 of MKL's time, and no longer
on any shape of ours; on Intel's they took 1.06 of it. So oneDNN is asked for on AMD processors, and elsewhere torch
is left to choose. The choice follows from the processor's name, not from timing: a run repeats bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.models.processor import AMD

ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_CHOSEN = ONEDNN if AMD else None  # None: torch.mm
TURNED_ROWS = 512  # at once
MANY_ROWS = 256  # from which a turned weight is worth its turning. Also in train/memory.py, which has no torch


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, in] @ weight [out, in].T: [N, out]."""
    if _CHOSEN is None or x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel():
        return torch.mm(x, weight.t())
    return _CHOSEN(x, weight, None, "none", [], "")


@torch.library.custom_op("minillm::multiply", mutates_args=())
def _multiply_compiled(x: Tensor, weight: Tensor) -> Tensor:
    """The same, closed to the compiler, which would take MKL's kernel."""
    return multiply(x, weight)


@_multiply_compiled.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _by_onednn(x: Tensor) -> bool:
    wide = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return wide and _CHOSEN is not None


def by_shape(x: Tensor) -> bool:
    """Whether products of x are compiled for every number of rows anew: by oneDNN, which also has all below float32."""
    narrow = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return _by_onednn(x) or (x.device.type == "cpu" and ONEDNN is not None and narrow)


def turned(x: Tensor) -> Tensor:
    """x [rows, columns] laid out anew as [columns, rows]. torch does it on one thread, and jumps far at every write: in
    pieces of a few rows it takes half the time."""
    out = x.new_empty(x.shape[1], len(x))
    for start in range(0, len(x), TURNED_ROWS):
        part = slice(start, start + TURNED_ROWS)
        out[:, part] = x[part].t()
    return out


def _weight_gradients(x: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
    """grad.T [out, N] @ x [N, in] of every grad. oneDNN wants its first factor turned: that pays where this one is
    narrow, and where the compiler turns it."""
    if torch.compiler.is_compiling():
        return [_multiply_compiled(grad.t().contiguous(), x.t()) for grad in grads]
    width = x.shape[1]
    if 2 * width <= sum(grad.shape[1] for grad in grads):
        x = turned(x)
        return [turned(multiply(x, grad.t())) for grad in grads]
    return [multiply(turned(grad), x.t()) if 2 * grad.shape[1] <= width else torch.mm(grad.t(), x) for grad in grads]


class ChunkedWeight:
    """A weight [out, in], wider than its input, that multiplies its rows in chunks, and its gradients.

    oneDNN takes it faster turned for the input's gradient, and gives its own gradient turned. Both are turned once for
    all chunks, which pays where these are large.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.weight = weight
        self._turn = _by_onednn(weight) and rows >= MANY_ROWS
        self._grad: Tensor | None = None

    @cached_property
    def _turned(self) -> Tensor:
        return turned(self.weight) if self._turn else self.weight.t()

    def multiply(self, x: Tensor) -> Tensor:
        """x [N, in] -> [N, out]."""
        return multiply(x, self.weight)

    def input_grad(self, grad: Tensor) -> Tensor:
        """grad [N, out] -> [N, in]."""
        return multiply(grad, self._turned)

    def add_grad(self, grad: Tensor, x: Tensor) -> None:
        """Add grad.T @ x of a chunk, grad [N, out], x [N, in]."""
        if self._grad is None:
            self._grad = torch.zeros_like(self._turned if self._turn else self.weight)
        if self._turn:
            self._grad += multiply(turned(x), grad.t())
        else:
            self._grad.addmm_(grad.t(), x)

    def grad(self) -> Tensor:
        """The sum of all chunks: [out, in]."""
        if self._grad is None:
            return torch.zeros_like(self.weight)
        return turned(self._grad) if self._turn else self._grad


class _Linear(torch.autograd.Function):
    """Products of one x with several weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        product = _multiply_compiled if torch.compiler.is_compiling() else multiply
        ctx.shape = x.shape
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, *weights)
        flat = x.reshape(-1, x.shape[-1])
        return tuple(product(flat, weight).view(*x.shape[:-1], len(weight)) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        product = _multiply_compiled if torch.compiler.is_compiling() else multiply
        x, *weights = ctx.saved_tensors
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = product(flat[0], weights[0].t())
            for grad, weight in zip(flat[1:], weights[1:]):
                x_grad += product(grad, weight.t())
            x_grad = x_grad.view(ctx.shape)
        needed = ctx.needs_input_grad[1:]
        if not any(needed):
            return x_grad, *(None for _ in weights)
        found = iter(_weight_gradients(x.reshape(-1, x.shape[-1]), [grad for grad, need in zip(flat, needed) if need]))
        return x_grad, *(next(found) if need else None for need in needed)


class Linear(nn.Linear):
    """x @ weight.T: without a bias, which BiasedLinear adds."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight)[0] if _by_onednn(x) else F.linear(x, self.weight)


class BiasedLinear(Linear):
    """x @ weight.T + bias: Qwen2's queries, keys and values, and all of GPT-2."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        product = super().forward(x)
        return product + self.bias.to(product.dtype)


def linear_all(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """What every layer makes of the same x. Eager plain ones share what their gradients need: x is turned once, and its
    own gradient is summed in place."""
    if _by_onednn(x) and not torch.compiler.is_compiling() and all(type(layer) is Linear for layer in layers):
        return _Linear.apply(x, *(layer.weight for layer in layers))
    return [layer(x) for layer in layers]
