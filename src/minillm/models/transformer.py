"""The backbone that every family trains: Qwen3's modules and arithmetic, dense or mixture of experts,
causal or bidirectional. Parameter names are Hugging Face's, so that exporting is saving.

B batch, L length, D hidden_size, V vocabulary.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from minillm.models.attention import Mask, packed_mask
from minillm.models.cache import Cache, Layer
from minillm.models.candidates import CandidateInput, Candidates
from minillm.models.config import ModelConfig
from minillm.models.experts import SparseMoe, load_balancing_loss
from minillm.models.gpt2 import Gpt2Layer
from minillm.models.layers import MLP, Attention, RMSNorm
from minillm.models.linear import Linear
from minillm.models.rotary import rotary_tables
from minillm.models.value import ValueHead


class Output(NamedTuple):
    """What the backbone says: hidden states [B, L, D] and, for experts, the router's auxiliary loss."""

    hidden: Tensor
    router_loss: Tensor | None


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        experts = config.use_moe and index not in config.dense_layers
        self.self_attn = Attention(config)
        self.mlp = SparseMoe(config) if experts else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: Layer | None
    ) -> tuple[Tensor, Tensor | None]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        out = self.mlp(self.post_attention_layernorm(x))
        if isinstance(out, tuple):
            return x + out[0], out[1]
        return x + out, None


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            self.layers = nn.ModuleList(Gpt2Layer(config) for _ in range(config.num_hidden_layers))
            self.norm = cast(RMSNorm, nn.LayerNorm(config.hidden_size, config.rms_norm_eps))
        else:
            self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.denoiser:
            self.candidates = CandidateInput(config)


class LanguageModel(nn.Module):
    """Tokens in, hidden states out; the vocabulary head is applied by whoever needs logits, where needed."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.value_head:
            self.score = ValueHead(config.hidden_size)
        cos, sin = rotary_tables(
            config.max_position_embeddings, config.head_dim, config.rope_theta, config.rope_scaling
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary head [V, D]."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def init_weights(self, seed: int) -> None:
        """Every parameter in one place. Normal(0, 0.02); what writes into the residual stream is divided by
        sqrt(2 * layers), so that its variance does not grow with depth (GPT-2); norms are one, biases zero.

        A parameter's values follow from the seed and its name: families that share a part begin with the same one.
        Models that look both ways begin by looking around themselves (`_start_nearby`)."""
        depth = 1.0 / math.sqrt(2 * self.config.num_hidden_layers)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                    continue
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                values = torch.empty(parameter.shape).normal_(
                    0.0, 0.02 * (depth if residual else 1.0), generator=generator
                )
                parameter.copy_(values)
            if not self.config.causal:
                self._start_nearby(seed)

    def _start_nearby(self, seed: int) -> None:
        """Let attention begin with what is near. A hidden position knows nothing of its own, and a model that has to
        find out first where its neighbours are spends hundreds of steps on how frequent tokens are.

        All embeddings share a direction (logits of a tied head do not see it, a softmax is blind to constants), keys
        are made of it as queries are, and the rotary embedding makes their product largest where positions are
        close. Measured in experiments/sdd.md."""
        config = self.config
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} shared direction".encode()))
        shared = 0.03 * torch.randint(2, (config.hidden_size,), generator=generator).mul(2).sub(1).float()
        self.model.embed_tokens.weight.add_(shared)
        if config.denoiser:
            self.model.candidates.rest.add_(shared)
        group = config.num_attention_heads // config.num_key_value_heads
        for attention in self.modules():
            if isinstance(attention, Attention):
                queries = attention.q_proj.weight.view(config.num_key_value_heads, group, config.head_dim, -1)
                keys = queries.mean(1) * group**0.5
                attention.k_proj.weight.copy_(keys.reshape(attention.k_proj.weight.shape))
                if config.qk_norm:
                    attention.q_norm.weight.fill_(3.0)

    def forward(
        self,
        inputs: Tensor | Candidates,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        mask: Mask = None,
        cache: Cache | None = None,
    ) -> Output:
        """Hidden states of `inputs`.

        Args:
            inputs: token ids [B, L], embeddings [B, L, D], or candidates [B, L, K].
            positions: [B, L] for the rotary embedding; None counts from 0 (or goes on after the cache).
            segments: int [B, L]; tokens see only their own segment, -1 is padding. None: one segment.
            mask: bool [B, 1, L, L], who may look at whom (True), instead of segments and causality.
            cache: where generation stands; it is extended by L.
        """
        separate = isinstance(inputs, Candidates) and self.model.candidates.bilateral
        x = self.embed(inputs) if not separate else None
        length = (inputs.tokens if isinstance(inputs, Candidates) else inputs).shape[1]
        if mask is None and segments is not None:
            windows = bool(self.config.sliding_window)
            mask = packed_mask(segments, self.config.causal, self.config.head_dim, dense=windows)
        if cache is not None:
            positions, mask = cache.positions(length), cache.mask(length, self.config.causal)
        masks = [mask] * len(self.model.layers)
        if self.config.sliding_window:
            near = self._window_mask(mask, length, cache)
            masks[self.config.max_window_layers :] = [near] * (len(masks) - self.config.max_window_layers)
        if positions is None:
            if length > self.config.max_position_embeddings:
                raise ValueError(f"{length} tokens, the model has {self.config.max_position_embeddings} positions")
            cos, sin = self.cos[:length, None], self.sin[:length, None]
        else:
            cos, sin = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)
        dtype = self.head_weight.dtype if x is None else x.dtype
        cos, sin = cos.to(dtype), sin.to(dtype)
        if self.config.learned_positions and x is not None:
            places = torch.arange(length, device=x.device) if positions is None else positions
            x = x + self.model.embed_positions(places)
        caches: Sequence[Layer | None] = cache.layers if cache is not None else [None] * len(self.model.layers)
        router_logits: list[Tensor] = []

        def through(index: int, x: Tensor) -> Tensor:
            x, logits = self.model.layers[index](x, cos, sin, masks[index], caches[index])
            if logits is not None:
                router_logits.append(logits)
            return x

        if x is None:
            assert isinstance(inputs, Candidates)
            x = self._bilateral(inputs, through)
        else:
            for index in range(len(self.model.layers)):
                x = through(index, x)
        router_loss = None
        if router_logits and self.training:
            valid = segments.flatten() >= 0 if segments is not None else None
            router_loss = load_balancing_loss(router_logits, self.config.num_experts_per_tok, valid)
        return Output(self.model.norm(x), router_loss)

    def _window_mask(self, mask: Mask, length: int, cache: Cache | None) -> Mask:
        """A mask [B, 1, L, keys] (None: all before) narrowed to the sliding window. Distances are those of places in
        the row, which are those of positions within a segment."""
        keys_at = torch.arange(length, device=self.head_weight.device)
        places = keys_at[None]
        if cache is not None:
            # a row of the cache begins with its padding, so the next token's place is not its position
            places = cache.places_of(length)
            keys_at = torch.arange(int(places.max()) + 1, device=places.device)
        if len(keys_at) <= self.config.sliding_window:
            return mask
        behind = places[:, None, :, None] - keys_at
        near = behind < self.config.sliding_window
        if mask is None:
            return near & (behind >= 0)
        assert isinstance(mask, Tensor)
        return near & mask

    def embed(self, inputs: Tensor | Candidates) -> Tensor:
        """Vectors [B, L, D] of token ids or candidates; what is vectors already stays."""
        if isinstance(inputs, Candidates):
            return self.model.candidates.aggregate(inputs, self.model.embed_tokens.weight)
        return self.model.embed_tokens(inputs) if inputs.ndim == 2 else inputs

    def _bilateral(self, inputs: Candidates, through: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Candidates stay apart: they attend to each other, are read pooled, and take up what a layer adds."""
        parts = self.model.candidates
        candidates, log_probabilities = parts.separate(inputs, self.model.embed_tokens.weight)
        for index, attend in enumerate(parts.layers):
            candidates = candidates + attend(candidates, log_probabilities)
            pooled = parts.pool(candidates, log_probabilities)
            candidates = candidates + (through(index, pooled) - pooled).unsqueeze(-2)
        return parts.pool(candidates, log_probabilities)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [.., D] -> logits [.., V]. For generation and tests; losses never need all of them."""
        return nn.functional.linear(hidden, self.head_weight.to(hidden.dtype))


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: LanguageModel) -> float:
    """6 FLOPs a token for each parameter that a token passes through: 2 forward, 2 for the gradient of what comes in,
    2 for that of the parameter, which frozen ones (LoRA's) do without."""
    config = model.config
    total = count_parameters(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / total
    if not config.tie_word_embeddings:
        total -= config.vocab_size * config.hidden_size  # looking a row up is no arithmetic
    if config.use_moe:
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        layers = config.num_hidden_layers - len(config.dense_layers)
        total -= layers * expert * (config.num_experts - config.num_experts_per_tok)
    return (4.0 + 2.0 * trained) * total
