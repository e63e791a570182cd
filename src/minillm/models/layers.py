"""Normalisation, rotary embedding, gated feed-forward and attention, as in Qwen3.

B batch, L length, D hidden_size, H heads, K key/value heads, E head_dim.

On a CPU without a compiler every element-wise operation is one pass over memory and one fresh tensor, so
the three functions below save little, work in place and have hand-written gradients. Compiled code and
GPUs get the plain formulas, which their compilers fuse better.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.models.attention import Mask, attend
from minillm.models.cache import Layer
from minillm.models.config import ModelConfig
from minillm.models.linear import BiasedLinear, Linear, linear_all
from minillm.models.processor import AMD


def _by_hand(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse.mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, grad, width = x.to(inverse.dtype), grad.to(inverse.dtype), x.shape[-1]
        product = wide * grad  # in this order it lies in memory as x does, whatever attention has made of its gradient
        flat = product.reshape(-1, width)
        weight_grad = (flat.t() @ inverse.flatten()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        shared = (flat @ weight.to(inverse.dtype)).view_as(inverse).mul_(inverse.square()).mul_(-1.0 / width)
        x_grad = torch.mul(grad, weight, out=product).addcmul_(wide, shared).mul_(inverse)
        return x_grad.to(x.dtype), weight_grad, None, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467), in the dtype the next products are taken in."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if _by_hand(x):
            return _RMSNorm.apply(x, self.weight, self.eps, dtype)
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, L, H, E] by tables [L or B x L, 1, E], the halves of E forming the pairs."""
    if _by_hand(x):
        return _Rotary.apply(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


CHUNK_ELEMENTS = 1 << (20 if AMD else 17)  # of an operand: what stays in the cache between two passes


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, all [.., width], as pieces of the same few rows."""
    rows = max(1, CHUNK_ELEMENTS // tensors[0].shape[-1])
    return zip(*(tensor.view(-1, tensor.shape[-1]).split(rows) for tensor in tensors))


class _SwiGLU(torch.autograd.Function):
    """The widest tensors of the model: a step over all of them at once would fetch each from memory again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        for gate_, up_, out_ in _chunks(gate, up, out):
            torch.ops.aten.silu.out(gate_, out=out_).mul_(up_)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(up)
        for gate_, up_, grad_, gate_grad_, up_grad_ in _chunks(gate, up, grad.contiguous(), gate_grad, up_grad):
            torch.mul(grad_, up_, out=gate_grad_)
            torch.ops.aten.silu_backward.grad_input(gate_grad_, gate_, grad_input=gate_grad_)
            torch.ops.aten.silu.out(gate_, out=up_grad_).mul_(grad_)
        return gate_grad, up_grad


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    return _SwiGLU.apply(gate, up) if _by_hand(gate) else F.silu(gate) * up


class MLP(nn.Module):
    """The gated feed-forward part: [.., D] -> [.., D] through `width`."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*linear_all(x, self.gate_proj, self.up_proj)))


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys (as configured: Llama has plain ones)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.causal = config.head_dim, config.causal
        width = config.hidden_size
        linear = BiasedLinear if config.qkv_bias else Linear
        self.q_proj = linear(width, self.heads * self.head_dim)
        self.k_proj = linear(width, self.key_value_heads * self.head_dim)
        self.v_proj = linear(width, self.key_value_heads * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, width)
        norms = [RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in "qk"]
        self.q_norm, self.k_norm = cast(list[RMSNorm], norms)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: Layer | None) -> Tensor:
        """x [B, L, D]; the mask as `attend` takes it, None: causal as configured."""
        batch, length, _ = x.shape
        q, k, v = linear_all(x, self.q_proj, self.k_proj, self.v_proj)
        q = self.q_norm(q.view(batch, length, self.heads, self.head_dim))
        k = self.k_norm(k.view(batch, length, self.key_value_heads, self.head_dim))
        v = v.view(batch, length, self.key_value_heads, self.head_dim).transpose(1, 2)
        q = apply_rotary(q, cos, sin).transpose(1, 2)
        k = apply_rotary(k, cos, sin).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        out = attend(q, k, v, mask, self.causal)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
