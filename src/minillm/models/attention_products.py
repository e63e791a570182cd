"""Attention on AMD processors: batched matrix products of a few queries with the keys that they may see.

In bfloat16 PyTorch's kernel for CPUs takes twice as long there, in float32 a third longer where only part of it may
be seen (docs/performance.md). The price is memory: the weights stay until the backward pass. So rows are short;
beyond LONGEST the kernel catches up, too.

B batch, H heads, L length, E head_dim; N = B x key/value heads, G queries that share a key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minillm.models.processor import AMD

LONGEST = 512  # tokens. This and the next line: also in train/memory.py, which has no torch
QUERIES = {torch.float32: 32, torch.bfloat16: 64}  # at once: what no one of them may see is left out


def suit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether these products are the fast way to train. They are taken without a gradient, too: a policy and its
    reference shall say the same bits."""
    if not AMD or q.device.type != "cpu" or not 1 < q.shape[2] == k.shape[2] <= LONGEST:
        return False
    dtype = _dtype(v)
    return dtype == torch.bfloat16 or dtype == torch.float32 and (causal or mask is not None)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(E)) v: [B, H, L, E], in the dtype of autocast, else of v.

    Args:
        mask: bool [B or 1, 1, L, L], True = may look. A position that may see nothing says something finite.
        causal: without a mask, nobody looks ahead.
    """
    dtype = _dtype(v)
    return _Attention.apply(q.to(dtype), k.to(dtype), v.to(dtype), mask, causal)


def kept_weights(length: int, causal: bool, dtype: torch.dtype) -> int:
    """Weights of a head that stay for the backward pass of a row."""
    if not causal:
        return length * length
    rows = QUERIES[dtype]
    blocks = (length + rows - 1) // rows
    return rows * rows * (blocks * (blocks + 1) // 2)


def _dtype(v: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else v.dtype


def _blocks(length: int, dtype: torch.dtype, mask: Tensor | None, causal: bool) -> Iterator[tuple[int, int, int]]:
    """First query, the one after the last, and how many keys, from the first on, one of them sees."""
    for start in range(0, length, QUERIES[dtype]):
        end = min(start + QUERIES[dtype], length)
        keys = end if causal else length
        if mask is not None:
            seen = mask[:, 0, start:end].flatten(0, 1).any(0).nonzero()
            keys = int(seen[-1]) + 1 if len(seen) else 1
        yield start, end, keys


def _like(x: Tensor) -> Tensor:
    """Empty [B, H, L, E], laid out as [B, L, H, E]: as the layers take it before and after."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """What attention says, and its weights, if they are to be kept: [B x H x queries x keys], block after block."""
    batch, heads, length, width = q.shape
    groups = batch * k.shape[1]
    keys_, values = (k * width**-0.5).reshape(groups, length, width), v.reshape(groups, length, width)
    out = _like(q)
    kept = q.new_empty(batch * heads * kept_weights(length, causal, q.dtype) if keep else 0)
    rows = QUERIES[q.dtype]
    ahead = q.new_full((rows, rows), float("-inf")).triu_(1) if causal else None
    used = 0
    for start, end, keys in _blocks(length, q.dtype, mask, causal):
        queries = q[:, :, start:end].reshape(groups, -1, width)
        scores = torch.bmm(queries, keys_[:, :keys].transpose(1, 2))
        if ahead is not None:
            scores.view(batch * heads, end - start, keys)[..., start:] += ahead[: end - start, : end - start]
        elif mask is not None:
            hidden = ~mask[:, :, start:end, :keys]
            scores.view(batch, heads, end - start, keys).masked_fill_(hidden, torch.finfo(q.dtype).min)
        weights = kept[used : used + scores.numel()].view(scores.shape) if keep else torch.empty_like(scores)
        torch.softmax(scores, -1, out=weights)
        out[:, :, start:end] = torch.bmm(weights, values[:, :keys]).view(batch, heads, end - start, width)
        used += scores.numel()
    return out, kept


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    batch, heads, length, width = q.shape
    groups = batch * k.shape[1]
    keys_, values = (k * width**-0.5).reshape(groups, length, width), v.reshape(groups, length, width)
    q_grad, k_grad, v_grad = _like(q), torch.zeros_like(keys_), torch.zeros_like(values)
    used = 0
    for start, end, keys in _blocks(length, q.dtype, mask, causal):
        queries = q[:, :, start:end].reshape(groups, -1, width)
        out_grad = grad[:, :, start:end].reshape(groups, -1, width)
        shape = (groups, queries.shape[1], keys)
        weights = kept[used : used + shape[0] * shape[1] * keys].view(shape)
        v_grad[:, :keys] += torch.bmm(weights.transpose(1, 2), out_grad)
        weights_grad = torch.bmm(out_grad, values[:, :keys].transpose(1, 2))
        scores_grad = torch._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
        q_grad[:, :, start:end] = torch.bmm(scores_grad, keys_[:, :keys]).view(batch, heads, end - start, width)
        k_grad[:, :keys] += torch.bmm(scores_grad.transpose(1, 2), queries)
        used += weights.numel()
    return q_grad, k_grad.mul_(width**-0.5).view(k.shape), v_grad.view(v.shape)


# The same, closed to the compiler, which would make a kernel for every block.
_forward_compiled = torch.library.custom_op("minillm::attention", _forward, mutates_args=())
_backward_compiled = torch.library.custom_op("minillm::attention_backward", _backward, mutates_args=())


@_forward_compiled.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, keep: bool) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    return _like(q), q.new_empty(batch * heads * kept_weights(length, causal, q.dtype) if keep else 0)


@_backward_compiled.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), k.new_empty(k.shape), v.new_empty(v.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        forward = _forward_compiled if torch.compiler.is_compiling() else _forward
        out, kept = forward(q, k, v, mask, causal, any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, kept, mask)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward = _backward_compiled if torch.compiler.is_compiling() else _backward
        q, k, v, kept, mask = ctx.saved_tensors
        return *backward(grad, q, k, v, kept, mask, ctx.causal), None, None
