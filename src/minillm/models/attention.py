"""Attention's kernel, and who may look at whom in rows that hold several documents.

B batch, H heads, L length, E head_dim. A dense mask takes memory of B x L x L. On GPUs such rows get a block mask
instead: FlexAttention (arXiv 2412.05496) leaves out blocks in which nobody may look at anybody, and asks `segments` in
the others.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.models import attention_products

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Mask: TypeAlias = "Tensor | BlockMask | None"

BLOCK = 128  # of queries and of keys
LEAST_HEAD_DIM = 16  # that FlexAttention's kernel multiplies


def segment_mask(segments: Tensor, causal: bool) -> Tensor:
    """Who may look at whom: bool [B, 1, L, L], within a segment and, if causal, not ahead."""
    same = segments[:, :, None] == segments[:, None, :]
    return (same.tril() if causal else same)[:, None]


def segment_blocks(segments: Tensor, causal: bool) -> BlockMask:
    """The same as blocks, in memory of B x L x L / 128^2. Blocks are left out whose ranges of segments do not meet."""
    from torch.nn.attention.flex_attention import BlockMask

    rows, length = segments.shape
    padded = F.pad(segments, (0, -length % BLOCK), mode="constant", value=-1).view(rows, -1, BLOCK)
    low, high = padded.amin(-1), padded.amax(-1)
    meet = (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
    if causal:
        meet = meet.tril()
    places = meet.to(torch.int8).argsort(dim=-1, descending=True, stable=True)

    def may_look(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = segments[row, query] == segments[row, key]
        return same & (query >= key) if causal else same

    return BlockMask.from_kv_blocks(
        meet.sum(-1, dtype=torch.int32)[:, None], places.to(torch.int32)[:, None], BLOCK_SIZE=BLOCK,
        mask_mod=may_look, seq_lengths=(length, length),
    )  # fmt: skip


def packed_mask(segments: Tensor, causal: bool, head_dim: int, *, dense: bool = False) -> Tensor | BlockMask:
    """The mask of packed rows, in the form that is fast on this device; `dense` where it will be changed further."""
    if segments.is_cuda and not dense and head_dim >= LEAST_HEAD_DIM:
        return segment_blocks(segments, causal)
    return segment_mask(segments, causal)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(E)) v: [B, H, L, E]; the heads of k and v may be shared by several of q's.

    Args:
        mask: bool [B, 1, L, keys] (True = may look), blocks, or None: all, or all behind if `causal`.
    """
    shared = q.shape[1] != k.shape[1]
    if mask is None or isinstance(mask, Tensor):
        causal = causal and mask is None and q.shape[2] > 1
        if attention_products.suit(q, k, v, mask, causal):
            return attention_products.attend(q, k, v, mask, causal)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)
    # autocast does not know this operation: the rotary embedding has made q and k float32
    return _flex(q.device.type)(q.to(v.dtype), k.to(v.dtype), v, block_mask=mask, enable_gqa=shared)


def _flex(device: str) -> Any:
    """FlexAttention; on a GPU it is a kernel only when compiled, which layers that are compiled do themselves."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device != "cuda" or torch.compiler.is_compiling() else _compiled(flex_attention)


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)
