"""A few more tokens for every row, on a CPU: the model's arithmetic with weights laid out for products of few rows.

A step of generation multiplies every weight by a handful of rows, so what costs is fetching weights and starting
operations. Here queries, keys and values are one product and gate and up another, each weight is laid out for the
number of rows it meets (`models/products.py`), and the scales of the norms are folded into the weights behind them.
`decoder_of` gives the model itself where that does not apply.

B rows, L tokens, D hidden_size, H heads, K key/value heads, E head_dim, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.models.cache import Cache
from minillm.models.candidates import Candidates
from minillm.models.layers import MLP, Attention, RMSNorm
from minillm.models.lora import adapted_layers
from minillm.models.products import Product, as_dtype
from minillm.models.transformer import DecoderLayer, LanguageModel


class Decoder(Protocol):
    """Reads what follows in each row: of texts that are written from left to right a token, else a block."""

    def read(self, inputs: Tensor | Candidates, cache: Cache) -> Tensor:
        """Hidden states [B, L, D] of tokens [B, L] or candidates [B, L, K], which the cache takes up."""

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Hidden states [B, D] after the tokens [B], which the cache takes up."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, D] -> [B, V]."""


def decoder_of(model: LanguageModel, dtype: torch.dtype | None = None) -> Decoder:
    """The fast one where it can stand for the model. Weights that change later need a new one.

    A frozen model (no weight requires a gradient) keeps its decoder from call to call, until a weight changes.

    Args:
        dtype: number format of the products; None: that of the weights.
    """
    plain = model.config.denoiser != "bilateral" and not model.config.sliding_window
    fits = plain and model.head_weight.device.type == "cpu"
    beside = any(layer.active and layer.unmerged is None for _, layer in adapted_layers(model))
    if not fits or beside or not all(_known(cast(DecoderLayer, layer)) for layer in model.model.layers):
        return PlainDecoder(model)
    dtype = dtype or model.head_weight.dtype
    weights = list(model.parameters())
    if any(weight.requires_grad or weight.is_inference() for weight in weights):  # the latter count no versions
        return PackedDecoder(model, dtype)
    state = (dtype, tuple((weight.data_ptr(), weight._version) for weight in weights))
    kept = _KEPT.get(model)
    if kept is None or kept[0] != state:
        kept = _KEPT[model] = (state, PackedDecoder(model, dtype))
    return kept[1]


def _known(layer: DecoderLayer) -> bool:
    attention = layer.self_attn
    products = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    biased = any(product.bias is not None for product in products)
    return not biased and isinstance(attention.q_norm, RMSNorm) and isinstance(layer.input_layernorm, RMSNorm)


class PlainDecoder:
    """The model itself."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.logits = model, model.logits

    def read(self, inputs: Tensor | Candidates, cache: Cache) -> Tensor:
        return self.model(inputs, cache=cache).hidden

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        return self.read(tokens[:, None], cache)[:, 0]


_KEPT: WeakKeyDictionary[LanguageModel, tuple[object, PackedDecoder]] = WeakKeyDictionary()


class _Layer(NamedTuple):
    qkv: Product  # D -> (H + 2 K) E
    norms: Tensor  # [H + K, E]: scales of the queries' and keys' norm
    out: Product  # H E -> D
    gate_up: Product | None  # D -> 2 W; None: the part is not an MLP
    down: Product | None  # W -> D
    module: DecoderLayer


class PackedDecoder:
    """Holds copies of the weights; of the experts of a mixture, the model's own. The model must outlive it."""

    def __init__(self, model: LanguageModel, dtype: torch.dtype) -> None:
        self._model, self.config, self.dtype = ref(model), model.config, dtype
        self.eps = torch.tensor(model.config.rms_norm_eps)
        with torch.no_grad():
            self.layers = [self._pack(cast(DecoderLayer, layer)) for layer in model.model.layers]
        self.head = Product([model.head_weight], dtype)

    @property
    def model(self) -> LanguageModel:
        model = self._model()  # a strong reference would keep the model with what is kept of it
        assert model is not None, "the model is gone"
        return model

    def _pack(self, layer: DecoderLayer) -> _Layer:
        attention: Attention = layer.self_attn
        heads, shared = self.config.num_attention_heads, self.config.num_key_value_heads
        products = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        norms = torch.cat((attention.q_norm.weight.expand(heads, -1), attention.k_norm.weight.expand(shared, -1)))
        gate_up = down = None
        if isinstance(layer.mlp, MLP):
            both = (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
            gate_up = Product(both, self.dtype, layer.post_attention_layernorm.weight.detach())
            down = Product([layer.mlp.down_proj.weight], self.dtype)
        qkv = Product(products, self.dtype, layer.input_layernorm.weight.detach())
        return _Layer(qkv, norms, Product([attention.o_proj.weight], self.dtype), gate_up, down, layer)

    def _normed(self, x: Tensor) -> Tensor:
        """x / rms(x): the norm without its scale, float32 or wider."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self.eps, length, length, value=1.0 / x.shape[-1]).rsqrt_()

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        return self.read(tokens[:, None], cache)[:, 0]

    def read(self, inputs: Tensor | Candidates, cache: Cache) -> Tensor:
        config, model = self.config, self.model
        embedded = model.embed(inputs)
        batch, length, _ = embedded.shape
        x, rows = embedded.flatten(0, 1), batch * length
        read = config.num_attention_heads + config.num_key_value_heads  # heads that are normalised and rotated
        positions, mask = cache.positions(length).flatten(), cache.mask(length, config.causal)
        plain_causal = config.causal and mask is None and length > 1

        def by_head(heads: Tensor) -> Tensor:
            return heads.unflatten(0, (batch, length)).transpose(1, 2)

        cos, sin = model.cos[positions][:, None], model.sin[positions][:, None]
        half = config.head_dim // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # a rotation is x cos + (x turned by half) sin
        for layer, held in zip(self.layers, cache.layers):
            heads = layer.qkv(self._normed(x)).view(rows, -1, config.head_dim)
            turned = self._normed(as_dtype(heads[:, :read], x.dtype)) * layer.norms
            turned = as_dtype(torch.addcmul(turned * cos, turned.roll(half, -1), sin), self.dtype)
            keys, values = held.append(by_head(turned[:, config.num_attention_heads :]), by_head(heads[:, read:]))
            queries = turned[:, : config.num_attention_heads]
            if length == 1:  # the queries that share a key stand as its rows, so that it is fetched once
                grouped = queries.unflatten(1, (config.num_key_value_heads, -1))
                found = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
            else:
                found = F.scaled_dot_product_attention(
                    by_head(queries), keys, values, attn_mask=mask, is_causal=plain_causal, enable_gqa=True
                ).transpose(1, 2)
            x = layer.out.added(x, found.reshape(rows, -1))
            if layer.gate_up is None or layer.down is None:
                x = x + layer.module.mlp(layer.module.post_attention_layernorm(x)[:, None])[0][:, 0]
                continue
            gate, up = layer.gate_up(self._normed(x)).chunk(2, -1)
            x = layer.down.added(x, F.silu(gate).mul_(up))
        return (self._normed(x) * model.model.norm.weight).unflatten(0, (batch, length))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)
