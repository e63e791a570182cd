"""nanoGPT's and MiniMind's models, written again from what is known about them: weights under their key names, and the
logits of their arithmetic. Nothing of ours computes here.

L length, V vocabulary, D width, H heads, E width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def _draw(shapes: dict[str, tuple[int, ...]], scale: float = 0.2) -> Weights:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator) * scale + (len(shape) == 1 and name.endswith("weight"))
        for name, shape in shapes.items()
    }


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[H, L, E] each -> [L, H * E]; a token sees those before it and itself."""
    length = q.shape[1]
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)


def nanogpt(vocabulary: int = 264, width: int = 32, layers: int = 2, positions: int = 48, bias: bool = True) -> Weights:
    """A state dict of nanoGPT. OpenLLM's is the same, and has a table of who sees whom besides."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocabulary, width), "transformer.wpe.weight": (positions, width),
        "transformer.ln_f.weight": (width,),
    }  # fmt: skip
    for layer in range(layers):
        path = f"transformer.h.{layer}"
        shapes |= {
            f"{path}.ln_1.weight": (width,), f"{path}.ln_2.weight": (width,),
            f"{path}.attn.c_attn.weight": (3 * width, width), f"{path}.attn.c_proj.weight": (width, width),
            f"{path}.mlp.c_fc.weight": (4 * width, width), f"{path}.mlp.c_proj.weight": (width, 4 * width),
        }  # fmt: skip
    if bias:
        named = [name for name in shapes if name.split(".")[-2] not in ("wte", "wpe")]
        shapes |= {name.replace("weight", "bias"): (shapes[name][0],) for name in named}
    weights = _draw(shapes)
    return {**weights, "lm_head.weight": weights["transformer.wte.weight"]}


def nanogpt_logits(weights: Weights, tokens: Tensor, heads: int) -> Tensor:
    """Logits [L, V] of tokens [L]: LayerNorm of epsilon 1e-5, GELU itself, learned positions."""

    def linear(x: Tensor, path: str) -> Tensor:
        return F.linear(x, weights[f"{path}.weight"], weights.get(f"{path}.bias"))

    def norm(x: Tensor, path: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{path}.weight"]
        return scaled + weights.get(f"{path}.bias", torch.zeros(()))

    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][: len(tokens)]
    for layer in range(sum(name.endswith("ln_1.weight") for name in weights)):
        path = f"transformer.h.{layer}"
        fused = linear(norm(x, f"{path}.ln_1"), f"{path}.attn.c_attn")
        q, k, v = (part.view(len(tokens), heads, -1).transpose(0, 1) for part in fused.split(x.shape[1], dim=1))
        x = x + linear(_attend(q, k, v), f"{path}.attn.c_proj")
        inner = linear(norm(x, f"{path}.ln_2"), f"{path}.mlp.c_fc")
        x = x + linear(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))), f"{path}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["lm_head.weight"].t()


# MiniMind's names since April 2025 -> those before
_EARLIER = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def minimind(
    vocabulary: int = 6400, width: int = 96, inner: int = 320, heads: int = 8, key_value_heads: int = 4,
    experts: int = 0, normed: bool = True, layers: int = 2,
) -> Weights:  # fmt: skip
    """A state dict of MiniMind: of MiniMind-3 with norms of queries and keys, of 2025 without."""
    size = width // heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for layer in range(layers):
        path = f"model.layers.{layer}"
        shapes |= {
            f"{path}.input_layernorm.weight": (width,), f"{path}.post_attention_layernorm.weight": (width,),
            f"{path}.self_attn.q_proj.weight": (width, width), f"{path}.self_attn.o_proj.weight": (width, width),
            f"{path}.self_attn.k_proj.weight": (key_value_heads * size, width),
            f"{path}.self_attn.v_proj.weight": (key_value_heads * size, width),
        }  # fmt: skip
        if normed:
            shapes |= {f"{path}.self_attn.{which}_norm.weight": (size,) for which in "qk"}
        if experts:
            shapes[f"{path}.mlp.gate.weight"] = (experts, width)
        for part in [f"{path}.mlp.experts.{expert}" for expert in range(experts)] or [f"{path}.mlp"]:
            shapes |= {f"{part}.gate_proj.weight": (inner, width), f"{part}.up_proj.weight": (inner, width),
                       f"{part}.down_proj.weight": (width, inner)}  # fmt: skip
    weights = _draw(shapes)
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}


def earlier_names(weights: Weights) -> Weights:
    """The same under the names of MiniMind before April 2025."""
    result = {}
    for name, value in weights.items():
        for later, earlier in _EARLIER.items():
            name = name.replace(f"{later}.", f"{earlier}.")
        result[name] = value
    return result


def minimind_logits(
    weights: Weights, tokens: Tensor, *, heads: int, theta: float, eps: float, neighbours: bool = False, chosen: int = 0
) -> Tensor:
    """Logits [L, V] of tokens [L].

    Args:
        neighbours: each even place of a head is rotated with the one after it (before April 2025), else its halves.
        chosen: experts a token.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]

    def rotate(x: Tensor) -> Tensor:
        """[H, L, E], as complex numbers that are turned by position times frequency."""
        size = x.shape[-1]
        angles = torch.arange(x.shape[1])[:, None] * theta ** -(torch.arange(0, size, 2) / size)
        turn = torch.polar(torch.ones_like(angles), angles)
        real, imaginary = (x[..., 0::2], x[..., 1::2]) if neighbours else x.chunk(2, -1)
        turned = torch.complex(real.contiguous(), imaginary.contiguous()) * turn
        parts = turned.real, turned.imag
        return torch.stack(parts, -1).flatten(-2) if neighbours else torch.cat(parts, -1)

    def feed(x: Tensor, path: str) -> Tensor:
        gate, up, down = (weights[f"{path}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()

    def experts(x: Tensor, path: str) -> Tensor:
        shares = (x @ weights[f"{path}.gate.weight"].t()).softmax(-1)
        rows = []
        for row, share in zip(x, shares):
            values, indices = share.topk(chosen)
            outputs = [feed(row[None], f"{path}.experts.{int(index)}")[0] for index in indices]
            rows.append(sum(value / values.sum() * output for value, output in zip(values, outputs)))
        return torch.stack(rows)  # type: ignore[arg-type]

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(sum(name.endswith("input_layernorm.weight") for name in weights)):
        path = f"model.layers.{layer}"
        hidden = norm(x, f"{path}.input_layernorm")
        q, k, v = (
            (hidden @ weights[f"{path}.self_attn.{which}_proj.weight"].t())
            .view(len(tokens), -1, x.shape[1] // heads)
            .transpose(0, 1)
            for which in "qkv"
        )
        if f"{path}.self_attn.q_norm.weight" in weights:
            q, k = norm(q, f"{path}.self_attn.q_norm"), norm(k, f"{path}.self_attn.k_norm")
        repeats = heads // len(k)
        k, v = rotate(k).repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        x = x + _attend(rotate(q), k, v) @ weights[f"{path}.self_attn.o_proj.weight"].t()
        hidden = norm(x, f"{path}.post_attention_layernorm")
        x = x + (experts(hidden, f"{path}.mlp") if chosen else feed(hidden, f"{path}.mlp"))
    return norm(x, "model.norm") @ weights["lm_head.weight"].t()
