"""Masked diffusion (dense or mixture of experts) and sparse-distribution diffusion (SDD) for transformers.

`minillm export` puts this file beside the weights; transformers loads it with trust_remote_code=True. It needs torch
and transformers, nothing else. Parameters have the names of Hugging Face's Qwen3 and Qwen3-MoE, whose layers these
are, looking both ways. For training and for everything left out here there is MiniLLM.

    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    tokens = model.generate(**tokenizer("Once upon", return_tensors="pt"), max_new_tokens=64)

B batch, L length, D hidden_size, V vocabulary, H heads, E head_dim, K candidates a position (SDD).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

KeysValues = tuple[Tensor, Tensor]  # of one layer, each [B, key/value heads, L, E]
KEPT_BELIEF = 0.9  # SDD: from one step of writing to the next; the rest goes to REST


class MiniLLMConfig(PretrainedConfig):
    """Sizes under Qwen3's names, the tokens that are treated apart, and what the family needs to know."""

    model_type = "minillm"

    def __init__(self, **values: Any) -> None:
        """Everything stands in config.json."""
        self.vocab_size = values.pop("vocab_size", 6400)
        self.hidden_size = values.pop("hidden_size", 512)
        self.intermediate_size = values.pop("intermediate_size", 2048)
        self.num_hidden_layers = values.pop("num_hidden_layers", 8)
        self.num_attention_heads = values.pop("num_attention_heads", 8)
        self.num_key_value_heads = values.pop("num_key_value_heads", 4)
        self.head_dim = values.pop("head_dim", 64)
        self.max_position_embeddings = values.pop("max_position_embeddings", 2048)
        self.rope_theta = values.pop("rope_theta", 10000.0)
        self.rms_norm_eps = values.pop("rms_norm_eps", 1e-6)
        self.qk_norm = values.pop("qk_norm", True)  # queries and keys are normalised
        self.qkv_bias = values.pop("qkv_bias", False)
        self.num_experts = values.pop("num_experts", 0)  # 0: dense
        self.num_experts_per_tok = values.pop("num_experts_per_tok", 2)
        self.moe_intermediate_size = values.pop("moe_intermediate_size", 1024)
        self.denoiser = values.pop("denoiser", "")  # SDD: "aggregate" or "bilateral"; "" is masked diffusion
        self.num_candidates = values.pop("num_candidates", 1)  # K
        self.diffusion_block = values.pop("diffusion_block", 0)  # above 0: blocks of so many tokens, one after another
        self.mask_token_id = values.pop("mask_token_id", 0)
        self.ignore_token_id = values.pop("ignore_token_id", 0)  # stands after a text's end; never shown
        self.control_token_ids = values.pop("control_token_ids", [])  # never written
        self.stop_token_ids = values.pop("stop_token_ids", [])
        super().__init__(**values)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def linear(width: int, out: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, out, bias=bias)


class MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(width, inner), linear(width, inner), linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SparseMoe(nn.Module):
    """Each token visits its top experts; their probabilities are renormalised to sum to one."""

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__()
        self.gate = linear(config.hidden_size, config.num_experts)
        self.experts = nn.ModuleList(
            MLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        self.top_k = config.num_experts_per_tok

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        probabilities, chosen = self.gate(flat).float().softmax(-1).topk(self.top_k, dim=-1)
        probabilities = (probabilities / probabilities.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows, places = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(flat[rows]) * probabilities[rows, places, None])
        return out.view_as(x)


class Attention(nn.Module):
    """Grouped-query attention with normalised, rotated queries and keys, to both sides."""

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__()
        self.shape = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        heads, key_value_heads, size = self.shape
        self.q_proj = linear(config.hidden_size, heads * size, config.qkv_bias)
        self.k_proj = linear(config.hidden_size, key_value_heads * size, config.qkv_bias)
        self.v_proj = linear(config.hidden_size, key_value_heads * size, config.qkv_bias)
        self.o_proj = linear(heads * size, config.hidden_size)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        heads, key_value_heads, size = self.shape
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, (heads, size))), rotary).transpose(1, 2)
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, (key_value_heads, size))), rotary).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (key_value_heads, size)).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads != key_value_heads)
        return self.o_proj(out.transpose(1, 2).flatten(-2)), (k, v)


def rotary_tables(positions: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, L, 1, E] of positions [B, L] (arXiv 2104.09864)."""
    frequencies = theta ** -(torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    angles = (positions.float().unsqueeze(-1) * frequencies).repeat(1, 1, 2).unsqueeze(2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * rotary[0].to(x.dtype) + torch.cat((-second, first), dim=-1) * rotary[1].to(x.dtype)


class DecoderLayer(nn.Module):
    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SparseMoe(config) if config.num_experts else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        attended, kept = self.self_attn(self.input_layernorm(x), rotary, mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class CandidateAttention(nn.Module):
    """SDD, bilateral: the candidates of a position look at each other, biased by their log-probabilities."""

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.head_dim
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj, self.k_proj, self.v_proj = linear(width, inner), linear(width, inner), linear(width, inner)
        self.o_proj = linear(inner, width)

    def forward(self, candidates: Tensor, log_probabilities: Tensor) -> Tensor:
        x = self.norm(candidates)
        bias = log_probabilities.to(x.dtype).unsqueeze(-2).expand(*x.shape[:-1], x.shape[-2])
        return self.o_proj(
            F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), attn_mask=bias)
        )


class CandidateInput(nn.Module):
    """SDD: positions hold K candidates with probabilities; what is missing to 1 belongs to one embedding, REST."""

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__()
        self.rest = nn.Parameter(torch.zeros(1, config.hidden_size))
        if config.denoiser == "bilateral":
            self.layers = nn.ModuleList(CandidateAttention(config) for _ in range(config.num_hidden_layers))
            self.readout = linear(config.hidden_size, 1)

    def pool(self, candidates: Tensor, log_probabilities: Tensor) -> Tensor:
        """One vector a position."""
        scores = self.readout(candidates).squeeze(-1).float() + log_probabilities
        return (scores.softmax(-1).to(candidates.dtype).unsqueeze(-1) * candidates).sum(-2)


class Backbone(nn.Module):
    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.denoiser:
            self.candidates = CandidateInput(config)

    def forward(
        self,
        tokens: Tensor,
        probabilities: Tensor | None,
        positions: Tensor,
        mask: Tensor | None = None,
        past: Sequence[KeysValues] | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Hidden states [B, L, D] and every layer's keys and values, those of `past` included.

        tokens [B, L], or with probabilities [B, L, K] candidates [B, L, K]; positions [B, L]; mask bool [B, 1, L, L].
        """
        rotary = rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
        kept: list[KeysValues] = []

        def through(index: int, x: Tensor) -> Tensor:
            x, keys_values = self.layers[index](x, rotary, mask, past[index] if past else None)
            kept.append(keys_values)
            return x

        if probabilities is None:
            x = self.embed_tokens(tokens)
        elif self.config.denoiser == "aggregate":
            rest = (1.0 - probabilities.sum(-1, keepdim=True)).clamp(min=0.0)
            vectors = self.embed_tokens(tokens)
            x = (vectors * probabilities.to(vectors.dtype).unsqueeze(-1)).sum(-2)
            x = x + rest.to(vectors.dtype) * self.candidates.rest
        else:
            return self.norm(self._bilateral(tokens, probabilities, through)), kept
        for index in range(len(self.layers)):
            x = through(index, x)
        return self.norm(x), kept

    def _bilateral(self, tokens: Tensor, probabilities: Tensor, through: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Candidates (REST is the last) stay apart; a layer reads them pooled, and all take up what it adds."""
        parts = self.candidates
        rest = (1.0 - probabilities.sum(-1, keepdim=True)).clamp(min=0.0)
        logs = torch.cat((probabilities, rest), dim=-1).clamp(min=1e-9).log()
        vectors = self.embed_tokens(tokens)
        candidates = torch.cat((vectors, parts.rest.expand(*vectors.shape[:-2], 1, -1)), dim=-2)
        for index, attend in enumerate(parts.layers):
            candidates = candidates + attend(candidates, logs)
            pooled = parts.pool(candidates, logs)
            candidates = candidates + (through(index, pooled) - pooled).unsqueeze(-2)
        return parts.pool(candidates, logs)


class MiniLLMForMaskedLM(PreTrainedModel):
    config_class = MiniLLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]

    def __init__(self, config: MiniLLMConfig) -> None:
        super().__init__(config)
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.config.tie_word_embeddings else self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        probabilities: Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """Logits [B, L, V] of what stands at each position (not behind it).

        Args:
            input_ids: [B, L], hidden positions are the mask token. SDD: [B, L], all of them known, or with
                `probabilities` [B, L, K] candidates [B, L, K].
            attention_mask: [B, L], 0 where there is padding.
        """
        if self.config.denoiser and probabilities is None:
            input_ids, probabilities = self._known(input_ids)
        batch, length = input_ids.shape[:2]
        positions, mask = torch.arange(length, device=input_ids.device).expand(batch, length), None
        if attention_mask is not None and not bool(attention_mask.all()):
            real = attention_mask.bool()
            positions = (real.cumsum(1) - 1).clamp(min=0)
            mask = (real[:, None, :] == real[:, :, None])[:, None]
        return MaskedLMOutput(logits=self._logits(self.model(input_ids, probabilities, positions, mask)[0]))

    def _logits(self, hidden: Tensor) -> Tensor:
        return (
            F.linear(hidden, self.model.embed_tokens.weight)
            if self.config.tie_word_embeddings
            else self.lm_head(hidden)
        )

    def _known(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """SDD: certainty. The token of each place with probability 1, the other K - 1 places empty."""
        count = self.config.num_candidates
        probabilities = torch.zeros(*tokens.shape, count, device=tokens.device)
        probabilities[..., 0] = 1.0
        return tokens.unsqueeze(-1).expand(*tokens.shape, count), probabilities

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        steps: int = 0,
        block_length: int = 32,
        threshold: float = 0.0,
        seed: int = 0,
        **_: Any,
    ) -> Tensor:
        """The prompts and what is written behind them: int64 [B, L + new], padded at the right.

        It writes what `minillm generate` does with the same settings. Prompt i has seed + i.

        Args:
            input_ids: [B, L]; attention_mask: [B, L], 0 where there is padding.
            temperature: 0 takes the most probable token everywhere.
            steps: over the whole text; 0 is one token a step.
            block_length: blocks are written one after another; 0 is all at once.
            threshold: above 0, every position at least so probable is revealed at once.
        """
        new = []
        for index, row in enumerate(input_ids):
            prompt = row if attention_mask is None else row[attention_mask[index].bool()]
            writer = Writer(
                self, prompt[None], max_new_tokens, temperature, steps, block_length, threshold, seed + index
            )
            new.append(writer.run())
        pad = self.config.pad_token_id
        longest = max(map(len, new))
        rows = [row + [pad] * (longest - len(row)) for row in new]
        return torch.cat(
            (input_ids, torch.tensor(rows, dtype=torch.int64, device=input_ids.device).view(len(new), -1)), 1
        )


class Writer:
    """One prompt on its way to text: a canvas of hidden positions, of which each step reveals the surest."""

    def __init__(
        self,
        model: MiniLLMForMaskedLM,
        prompt: Tensor,
        max_new_tokens: int,
        temperature: float,
        steps: int,
        block_length: int,
        threshold: float,
        seed: int,
    ) -> None:
        self.model, self.config, self.text = model, model.config, prompt
        self.max_new_tokens, self.temperature, self.steps = max_new_tokens, temperature, steps
        self.size, self.threshold = self.config.diffusion_block or block_length, threshold
        self.random = torch.Generator().manual_seed(seed)
        limit = self.config.max_position_embeddings
        if prompt.shape[1] + max_new_tokens > limit:
            raise ValueError(f"{prompt.shape[1]} prompt tokens and {max_new_tokens} new ones exceed {limit} positions")

    def run(self) -> list[int]:
        """The new tokens, up to the first stop token."""
        prompt, size = self.text.shape[1], self.size or self.max_new_tokens
        past: list[KeysValues] | None = None
        if self.config.diffusion_block:  # finished blocks never look ahead: what was read of them stays
            past = []
            for start in range(0, prompt // size * size, size):
                past = self._look(*self._see(self.text[:, start : start + size]), past)[1]
        left = self.max_new_tokens
        while left:
            given = self.text.shape[1] - _length(past) if past is not None else 0  # the rest of a prompt
            new = min(size - given, left)
            block = self._write_block(given, new, past)
            left -= new
            if past is not None:
                past = self._look(*self._see(block), past)[1]
            self.text = torch.cat((self.text, block[:, given:]), dim=1)
            if set(block[0, given:].tolist()) & set(self.config.stop_token_ids):
                break
        written = self.text[0, prompt:].tolist()
        end = next((i for i, token in enumerate(written) if token in self.config.stop_token_ids), None)
        return [token for token in written[:end] if token != self.config.ignore_token_id]

    def _see(
        self, tokens: Tensor, hidden: Tensor | None = None, beliefs: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the model is shown of tokens [1, N]: the mask token where they are hidden, or (SDD) beliefs."""
        if not self.config.denoiser:
            return (tokens if hidden is None else tokens.masked_fill(hidden, self.config.mask_token_id)), None
        known = self.model._known(tokens)
        if hidden is None or beliefs is None:
            return known
        where = hidden.unsqueeze(-1)
        return torch.where(where, beliefs[0], known[0]), torch.where(where, KEPT_BELIEF * beliefs[1], known[1])

    def _look(
        self, tokens: Tensor, probabilities: Tensor | None, past: list[KeysValues] | None
    ) -> tuple[Tensor, list[KeysValues]]:
        start = _length(past)
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        return self.model.model(tokens, probabilities, positions, None, past)

    def _write_block(self, given: int, new: int, past: list[KeysValues] | None) -> Tensor:
        """Tokens [1, given + new], of which the last `new` are written. The text before the block is read once a
        block and its keys and values kept (Fast-dLLM, arXiv 2505.22618); with block_length 0 at every step."""
        device, vocabulary = self.text.device, self.config.vocab_size
        tokens = torch.zeros(1, given + new, dtype=torch.int64, device=device)
        if given:
            tokens[:, :given] = self.text[:, -given:]
        hidden = torch.arange(given + new, device=device)[None] >= given
        beliefs, step = None, 0
        if self.config.denoiser:  # total uncertainty; the first pass makes beliefs, it reveals nothing
            shape = (given + new, self.config.num_candidates)
            drawn = torch.randint(vocabulary, shape, generator=self.random)[None].to(device)
            beliefs, step = (drawn, torch.full(drawn.shape, 1.0 / vocabulary, device=device)), -1
        steps = max(1, min(new, round(self.steps * new / self.max_new_tokens))) if self.steps else new
        while bool(hidden.any()):
            if past is not None:
                states = self._look(*self._see(tokens, hidden, beliefs), past)[0]
            else:
                before, block = self._see(self.text), self._see(tokens, hidden, beliefs)
                row = torch.cat((before[0], block[0]), dim=1)
                mass = None if before[1] is None or block[1] is None else torch.cat((before[1], block[1]), dim=1)
                states, kept = self._look(row, mass, None)
                states = states[:, self.text.shape[1] :]
                if self.size:
                    past = [(k[:, :, : self.text.shape[1]], v[:, :, : self.text.shape[1]]) for k, v in kept]
            logits = self.model._logits(states[hidden]).float()
            logits[:, self.config.control_token_ids] = float("-inf")
            if beliefs is not None:
                values, best = logits.topk(self.config.num_candidates, dim=-1)
                beliefs[0][hidden] = best
                beliefs[1][hidden] = (values - logits.logsumexp(-1, keepdim=True)).exp()
            step += 1
            if step > 0:
                self._reveal(tokens, hidden, logits, max(0, round(new * (1 - step / steps))))
        return tokens

    def _reveal(self, tokens: Tensor, hidden: Tensor, logits: Tensor, stay_hidden: int) -> None:
        """Choose a token for every hidden position and keep the surest, in place."""
        probabilities = logits.softmax(-1)
        if self.temperature:
            chances = (logits / self.temperature).softmax(-1).cpu()
            noise = torch.stack([torch.empty(row.shape).exponential_(generator=self.random) for row in chances])
            chosen = (chances / noise).argmax(-1).to(logits.device)
        else:
            chosen = logits.argmax(-1)
        confidence = probabilities.gather(1, chosen[:, None]).squeeze(1)
        columns = hidden[0].nonzero().squeeze(1)
        rank = confidence.argsort(descending=True, stable=True).argsort()
        if self.threshold:
            now = (confidence >= self.threshold) | (rank == 0)
        else:
            now = rank < max(1, len(columns) - stay_hidden)
        tokens[0, columns[now]] = chosen[now]
        hidden[0, columns[now]] = False


def _length(past: Sequence[KeysValues] | None) -> int:
    """How many positions are kept."""
    return past[0][0].shape[2] if past else 0
