"""GPT-2's layers, for models that were imported as such: LayerNorm, biases everywhere, a feed-forward part with GELU.
Positions are embeddings, which LanguageModel adds. The parts have the names they have in the other models, so that
adapters, caches and optimizers find them.

B batch, L length, D hidden_size, H heads, E head_dim.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from minillm.models.attention import Mask, attend
from minillm.models.cache import Layer
from minillm.models.config import ModelConfig
from minillm.models.linear import BiasedLinear


class Gpt2Attention(nn.Module):
    """Attention of as many key/value heads as heads; neither norms nor rotations."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_dim, self.causal = config.num_attention_heads, config.head_dim, config.causal
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj, self.k_proj = BiasedLinear(width, inner), BiasedLinear(width, inner)
        self.v_proj, self.o_proj = BiasedLinear(width, inner), BiasedLinear(inner, width)

    def forward(self, x: Tensor, mask: Mask, cache: Layer | None) -> Tensor:
        """x [B, L, D]; the mask as `attend` takes it, None: causal as configured."""
        batch, length, _ = x.shape
        q, k, v = (
            project(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            k, v = cache.append(k, v)
        out = attend(q, k, v, mask, self.causal)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class Gpt2MLP(nn.Module):
    """[.., D] -> [.., D] with GELU (arXiv 1606.08415), in its tanh form unless `exact`."""

    def __init__(self, hidden_size: int, width: int, exact: bool) -> None:
        super().__init__()
        self.form = "none" if exact else "tanh"
        self.up_proj, self.down_proj = BiasedLinear(hidden_size, width), BiasedLinear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate=self.form))


class Gpt2Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Gpt2Attention(config)
        self.mlp = Gpt2MLP(config.hidden_size, config.intermediate_size, config.exact_gelu)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: Layer | None) -> tuple[Tensor, None]:
        """As the other layers; the angles are not used."""
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x)), None
