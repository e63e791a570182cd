"""The matrix products of the layers and the head, each by the library that is fast on this processor.

torch takes a CPU's float32 products from MKL. On AMD cores oneDNN's kernels took 0.92 of MKL's time, and no longer
on any shape of ours; on Intel's they took 1.06 of it. So oneDNN is asked for on AMD processors, and elsewhere torch
is left to choose. The choice follows from the processor's name, not from timing: a run repeats bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.models.processor import AMD

ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_CHOSEN = ONEDNN if AMD else None  # None: torch.mm


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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        product = _multiply_compiled if torch.compiler.is_compiling() else multiply
        ctx.shape = x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        product = _multiply_compiled if torch.compiler.is_compiling() else multiply
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        x_grad = product(flat, weight.t()).view(ctx.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return x_grad, None
        x = x.reshape(-1, x.shape[-1])
        # oneDNN wants its first operand contiguous. Turning pays where it is narrow, and where the compiler turns it.
        turn = torch.compiler.is_compiling() or 2 * flat.shape[1] < x.shape[1]
        return x_grad, product(flat.t().contiguous(), x.t()) if turn else torch.mm(flat.t(), x)


class Linear(nn.Linear):
    """x @ weight.T: without a bias, which BiasedLinear adds."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if wide and _CHOSEN is not None:
            return _Linear.apply(x, self.weight)
        return F.linear(x, self.weight)


class BiasedLinear(Linear):
    """x @ weight.T + bias: Qwen2's queries, keys and values, and all of GPT-2."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        product = super().forward(x)
        return product + self.bias.to(product.dtype)
