"""Which program wrote a bare state dict, told by its key names, and the same weights under Hugging Face's names.

What the shapes cannot tell (heads, rotary base, epsilon, experts a token) comes from a configuration, else from what
the user says, else from what the style always had, which is reported as assumed. Where several values are as likely as
each other it is an error that names the flag. `models/dialects.py` goes on from Hugging Face's names.

H heads, E head_dim, D hidden_size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minillm.log import UserError
from minillm.models.config import LARGEST

# Tables that some programs store beside their weights: they follow from the configuration.
BUFFERS = re.compile(r"(^|\.)(freqs_cos|freqs_sin|pos_cis|mask|inv_freq|masked_bias)$")
# model_type -> for people. Such a configuration is whole: what it does not say has transformers' default.
WHOLE = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3-MoE",
    "gpt2": "GPT-2",
}  # fmt: skip
FRACTIONS = ("rope_theta", "rms_norm_eps", "layer_norm_epsilon")  # fields that are no whole numbers
# What other programs call what Hugging Face calls so.
SYNONYMS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size", "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings", "n_routed_experts": "num_experts", "block_size": "n_positions",
}  # fmt: skip
LLAMA_KEYS = re.compile(
    r"lm_head\.weight|model\.(embed_tokens|norm)\.weight|model\.layers\.\d+\.("
    r"self_attn\.([qkv]_proj\.(weight|bias)|o_proj\.(weight|bias)|[qk]_norm\.weight)|"
    r"mlp\.((experts\.\d+\.)?(gate|up|down)_proj|gate)\.weight|mlp\.experts\.(gate_up|down)_proj|"
    r"(input|post_attention)_layernorm\.weight)"
)
GPT_KEYS = re.compile(
    r"lm_head\.weight|transformer\.(wte|wpe)\.weight|transformer\.(ln_f|h\.\d+\.(ln_[12]|attn\.c_(attn|proj)|"
    r"mlp\.c_(fc|proj)))\.(weight|bias)"
)
ORIGINAL = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


@dataclass
class Recognised:
    """A state dict that was understood."""

    style: str  # for people
    weights: dict[str, Tensor]  # under Hugging Face's names, in its orientation
    config: dict[str, Any]  # as in Hugging Face's config.json
    origins: dict[str, str]  # of fields of `config`: "configuration", "shapes", "--flag" or "assumed: why"
    own_tokens: bool = False  # token ids may mean what they mean in the shipped tokenizer


@dataclass(frozen=True)
class _Kind:
    """Who writes these weights, and what they always had: None where it differed."""

    style: str
    model_type: str
    rope_theta: float | None
    rms_norm_eps: float
    positions: int
    heads: int | None = None
    experts_per_tok: int | None = None
    own_tokens: bool = False


MINIMIND_3 = _Kind("MiniMind-3", "qwen3", 1e6, 1e-6, 32768, experts_per_tok=1)
MINIMIND_2 = _Kind("MiniMind (April 2025 to January 2026)", "llama", 1e6, 1e-5, 32768, heads=8)
MINIMIND_EARLY_2025 = _Kind("MiniMind (February to April 2025)", "llama", 1e6, 1e-5, 8192, heads=8)
MINIMIND_2024 = _Kind("MiniMind (2024)", "llama", 1e4, 1e-5, 512, heads=16)
OWN = _Kind("MiniLLM", "qwen3", 1e4, 1e-6, 2048, experts_per_tok=2, own_tokens=True)
QWEN3 = _Kind("Qwen3", "qwen3", 1e6, 1e-6, 32768, experts_per_tok=8)
NORMED = _Kind("Qwen3's names", "qwen3", None, 1e-6, 2048, own_tokens=True)
QWEN2 = _Kind("Qwen2", "qwen2", 1e6, 1e-6, 32768)
PLAIN = _Kind("Llama's names", "llama", None, 1e-5, 2048)


@dataclass
class _Facts:
    """Values of fields, each with where it comes from; what contradicts is an error."""

    config: Mapping[str, Any]
    given: Mapping[str, Any]  # flags
    where: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def take(self, name: str, shape: Any = None, assumed: Any = None, why: str = "", flag: str = "") -> Any:
        """The value of a field: the configuration's, else that of the shapes, else the flag's, else the assumed one.

        Raises:
            UserError: two of them contradict each other, or none is there.
        """
        flag = flag or name
        found: list[tuple[Any, str]] = []
        if self.config.get(name) is not None:
            found.append((self.config[name], "configuration"))
        if shape is not None:
            found.append((shape, "shapes"))
        if flag in self.given:
            found.append((self.given[flag], f"--{flag}"))
        for value, origin in found[1:]:
            if value != found[0][0]:
                hint = ": leave the flag out" if origin.startswith("--") else ""
                raise UserError(
                    f"{self.where}: {name} is {found[0][0]} by the {found[0][1]}, {value} by {origin}{hint}"
                )
        if not found and assumed is not None:
            found.append((assumed, f"assumed: {why}"))
        if not found:
            raise UserError(f"{self.where}: nothing tells {name}, and no value can be assumed: give --{flag}")
        value, origin = found[0]
        kinds = (int, float) if name in FRACTIONS else (int,)
        if name != "activation_function" and not (type(value) in kinds and 0 < value < LARGEST):
            kind = "number" if name in FRACTIONS else "whole number"
            raise UserError(f"{self.where}: {name} is {value!r} by the {origin}: it must be a positive {kind}")
        self.values[name], self.origins[name] = value, origin
        return value

    @property
    def minimind(self) -> bool:
        return self.config.get("model_type") == "minimind"


def recognise(
    weights: Mapping[str, Tensor], config: Mapping[str, Any] | None, given: Mapping[str, Any], where: str
) -> Recognised:
    """Weights of MiniLLM, Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, GPT-2, nanoGPT (OpenLLM) or MiniMind, understood.

    Args:
        weights: a state dict without the prefixes of wrappers.
        config: what a config.json or another program's checkpoint says; None if there is none.
        given: the values of flags that the user gave, by name.
        where: the file, for messages.

    Raises:
        UserError: the names are of no known style, a part cannot be expressed, values contradict each other, or one is
            missing that cannot be assumed.
    """
    weights = {key: value for key, value in weights.items() if not BUFFERS.search(key) and value.ndim < 4}
    facts = _Facts(_translated(config or {}), given, where)
    readers = {"attn.c_attn.weight": _gpt, "attention.wq.weight": _original, "self_attn.q_proj.weight": _llama}
    read = next((read for end, read in readers.items() if any(key.endswith(end) for key in weights)), None)
    if read is None:
        raise UserError(
            f"{where}: {', '.join(sorted(weights)[:3])} are key names of no style that is known: MiniLLM, Llama, "
            "Mistral, Qwen2, Qwen3, Qwen3-MoE, GPT-2, nanoGPT, MiniMind"
        )
    found = read(weights, facts)
    for flag in given:
        if flag not in found.origins and not (flag == "num_attention_heads" and "n_head" in found.origins):
            raise UserError(f"{where}: --{flag} means nothing for weights of {found.style}: leave it out")
    return found


def _translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration under Hugging Face's names, without what is None."""
    if isinstance(config.get("model_config"), dict):  # OpenLLM keeps the sizes in a section of their own
        config = config["model_config"]
    values = {SYNONYMS.get(name, name): value for name, value in config.items() if value is not None}
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        values.setdefault("rope_theta", rope["rope_theta"])
    return values


def _refuse_unknown(weights: Mapping[str, Tensor], known: re.Pattern[str], style: str, facts: _Facts) -> None:
    unknown = sorted(key for key in weights if not known.fullmatch(key))
    shared = [key for key in unknown if "shared_expert" in key]
    if shared:
        raise UserError(
            f"{facts.where}: {shared[0]} belongs to shared experts, which every token visits. MiniLLM has none: these "
            "weights cannot be converted"
        )
    for key, value in weights.items():
        if value.ndim not in (1, 2) and not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            raise UserError(f"{facts.where}: {key} is {tuple(value.shape)}: it should be a vector or a matrix")
    if unknown:
        raise UserError(
            f"{facts.where}: {len(unknown)} parameters have no place in a {style} model: {', '.join(unknown[:3])}"
        )


def _shape(weights: Mapping[str, Tensor], key: str, facts: _Facts, dims: int = 2) -> torch.Size:
    if key not in weights:
        raise UserError(f"{facts.where}: {key} is missing")
    if weights[key].ndim != dims:
        raise UserError(f"{facts.where}: {key} is {tuple(weights[key].shape)}, expected are {dims} dimensions")
    return weights[key].shape


def _numbers(weights: Mapping[str, Tensor], pattern: str) -> set[int]:
    """The numbers of layers (or experts) whose keys begin with the pattern."""
    return {int(match.group(1)) for key in weights if (match := re.match(pattern, key))}


def _tie(weights: dict[str, Tensor], embedding: str, facts: _Facts) -> None:
    """Find out whether the head is the embedding; one that was written out although it is, is left out."""
    head, said = weights.get("lm_head.weight"), facts.config.get("tie_word_embeddings")
    same = head is None or (head.shape == weights[embedding].shape and torch.equal(head, weights[embedding]))
    if head is None and said is False:
        raise UserError(f"{facts.where}: lm_head.weight is missing, the configuration says tie_word_embeddings false")
    if not same and said is True:
        raise UserError(
            f"{facts.where}: the configuration says tie_word_embeddings true, but lm_head.weight is not {embedding}"
        )
    tied = same if said is None else bool(said)
    if tied:
        weights.pop("lm_head.weight", None)
    facts.values["tie_word_embeddings"] = tied
    facts.origins["tie_word_embeddings"] = "weights" if said is None else "configuration"


def _whole(weights: dict[str, Tensor], facts: _Facts, sizes: Mapping[str, Any], usual: Mapping[str, Any]) -> Recognised:
    """The configuration says it all: it is held against shapes and flags. `usual` has transformers' defaults."""
    for name, value in sizes.items():
        if name in facts.config:
            facts.take(name, value)
    for name, value in usual.items():
        facts.take(name, assumed=value, why="transformers' default")
    for flag in facts.given:
        name = "n_head" if flag == "num_attention_heads" and "n_head" in facts.config else flag
        if name in facts.config:
            facts.take(name, flag=flag)
    return Recognised(
        WHOLE[facts.config["model_type"]], weights, {**facts.config, **facts.values}, facts.origins, own_tokens=True
    )


# --- names of Hugging Face's Llama, which Mistral, Qwen, MiniMind (since April 2025) and MiniLLM have, too ---


def _kind(facts: _Facts, sizes: _Sizes, *, biases: bool) -> _Kind:
    """Who writes weights of these sizes."""
    width, vocabulary, hidden = sizes.width, sizes.vocabulary, sizes.hidden
    if biases:
        return QWEN2
    if sizes.head_dim:
        if facts.minimind or (vocabulary == 6400 and width == math.ceil(hidden * math.pi / 64) * 64 != 4 * hidden):
            return MINIMIND_3
        if vocabulary < 100_000 and width == (2 if sizes.experts else 4) * hidden:
            return OWN  # the widths it has where none is asked for
        return QWEN3 if vocabulary > 150_000 else NORMED
    shape_of_theirs = sizes.queries == 4 * sizes.keys and width == math.ceil(int(hidden * 8 / 3) / 64) * 64
    return MINIMIND_2 if facts.minimind or (vocabulary == 6400 and shape_of_theirs) else PLAIN


@dataclass(frozen=True)
class _Sizes:
    """What the shapes of weights under Llama's names tell."""

    vocabulary: int
    hidden: int
    queries: int  # H * E, the rows of the queries' matrix
    keys: int
    width: int  # of the feed-forward part, or of an expert where there are any
    head_dim: int | None  # None: no norms of queries and keys, which would tell
    experts: int
    layers: int
    dense_layers: list[int]  # layers without experts in a model with experts
    dense_width: int  # of those


def _sizes(weights: Mapping[str, Tensor], facts: _Facts) -> _Sizes:
    vocabulary, hidden = _shape(weights, "model.embed_tokens.weight", facts)
    first = "model.layers.0.self_attn."
    layers = 1 + max(_numbers(weights, r"model\.layers\.(\d+)\."), default=0)
    sparse = sorted(_numbers(weights, r"model\.layers\.(\d+)\.mlp\.experts\."))
    dense = [layer for layer in range(layers) if layer not in sparse]
    dense_width = _shape(weights, f"model.layers.{dense[0]}.mlp.gate_proj.weight", facts)[0] if dense else 0
    experts, width = 0, dense_width
    if sparse:
        path = f"model.layers.{sparse[0]}.mlp.experts."
        if f"{path}gate_up_proj" in weights:  # transformers 5 in memory: all experts in one tensor
            experts, double, _ = _shape(weights, f"{path}gate_up_proj", facts, 3)
            width = double // 2
        else:
            experts = 1 + max(_numbers(weights, re.escape(path) + r"(\d+)\."))
            width = _shape(weights, f"{path}0.gate_proj.weight", facts)[0]
    normed = f"{first}q_norm.weight" in weights
    return _Sizes(
        vocabulary=vocabulary,
        hidden=hidden,
        queries=_shape(weights, f"{first}q_proj.weight", facts)[0],
        keys=_shape(weights, f"{first}k_proj.weight", facts)[0],
        width=width,
        head_dim=_shape(weights, f"{first}q_norm.weight", facts, 1)[0] if normed else None,
        experts=experts,
        layers=layers,
        dense_layers=dense if sparse else [],
        dense_width=dense_width,
    )


def _llama(weights: dict[str, Tensor], facts: _Facts) -> Recognised:
    if "embed_tokens.weight" in weights:  # saved without the head: the names begin inside of "model."
        weights = {key if key == "lm_head.weight" else f"model.{key}": value for key, value in weights.items()}
    _refuse_unknown(weights, LLAMA_KEYS, "Llama-like", facts)
    sizes = _sizes(weights, facts)
    kind = _kind(facts, sizes, biases="model.layers.0.self_attn.q_proj.bias" in weights)
    return _llama_like(weights, facts, kind, sizes)


def _llama_like(weights: dict[str, Tensor], facts: _Facts, kind: _Kind, sizes: _Sizes) -> Recognised:
    """The configuration of weights under Llama's names."""
    found: dict[str, Any] = {
        "vocab_size": sizes.vocabulary, "hidden_size": sizes.hidden, "num_hidden_layers": sizes.layers,
    }  # fmt: skip
    if sizes.experts:
        found |= {"num_experts": sizes.experts, "moe_intermediate_size": sizes.width}
    if sizes.dense_width:
        found["intermediate_size"] = sizes.dense_width
    _tie(weights, "model.embed_tokens.weight", facts)
    if facts.config.get("model_type") in WHOLE:
        if "num_attention_heads" in facts.config:
            said = facts.take("num_attention_heads")
            head_dim = facts.take("head_dim") if "head_dim" in facts.config else max(1, sizes.hidden // said)
            found |= {"num_attention_heads": sizes.queries // head_dim, "num_key_value_heads": sizes.keys // head_dim}
        return _whole(weights, facts, found, {"rope_theta": 1e4})
    for name, value in found.items():
        facts.take(name, value)
    why = f"what {kind.style} {'had' if kind.style.startswith('MiniMind (') else 'has'}"
    head_dim = sizes.head_dim
    if head_dim is None:
        heads = facts.take("num_attention_heads", assumed=kind.heads, why=why)
        if sizes.queries % heads:
            raise UserError(f"{facts.where}: {heads} heads cannot share {sizes.queries} rows of queries")
        head_dim = sizes.queries // heads
    else:
        facts.take("num_attention_heads", sizes.queries // head_dim)
    if head_dim % 2 or sizes.keys % head_dim:
        raise UserError(f"{facts.where}: heads of {head_dim} fit neither rotation nor the {sizes.keys} rows of keys")
    facts.take("head_dim", head_dim)
    facts.take("num_key_value_heads", sizes.keys // head_dim)
    facts.take("rope_theta", assumed=kind.rope_theta, why=why)
    facts.take("rms_norm_eps", assumed=kind.rms_norm_eps, why=why)
    facts.take("max_position_embeddings", assumed=kind.positions, why=why)
    config: dict[str, Any] = {
        "hidden_act": facts.config.get("hidden_act", "silu"), "model_type": kind.model_type, **facts.values,
    }  # fmt: skip
    _refuse_scaling(facts)
    if sizes.experts:
        if sizes.head_dim is None:
            raise UserError(
                f"{facts.where}: experts without norms of queries and keys (q_norm, k_norm) are not known here"
            )
        active = sizes.width * facts.take("num_experts_per_tok", assumed=kind.experts_per_tok, why=why)
        config |= {
            "model_type": "qwen3_moe", "norm_topk_prob": facts.config.get("norm_topk_prob", True),
            "mlp_only_layers": sizes.dense_layers, "intermediate_size": sizes.dense_width or active,
        }  # fmt: skip
    return Recognised(kind.style, weights, {**config, **facts.values}, facts.origins, kind.own_tokens)


def _refuse_scaling(facts: _Facts) -> None:
    """MiniMind's YaRN is not that of transformers, and a part of generating only: weights are trained without it."""
    for name in ("inference_rope_scaling", "rope_scaling"):
        if facts.config.get(name):
            raise UserError(
                f"{facts.where}: the configuration has {name}; a rotary embedding that is stretched (YaRN) cannot be "
                "converted from this style. The weights were trained without it: take it out of a copy of config.json"
            )


# --- Llama's original names, which MiniMind had until April 2025 ---


def _original(weights: dict[str, Tensor], facts: _Facts) -> Recognised:
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key.replace("tok_embeddings.", "embed_tokens.")
        for theirs, ours in ORIGINAL.items():
            name = re.sub(rf"^(layers\.\d+\.){re.escape(theirs)}\.", rf"\g<1>{ours}.", name)
        renamed["lm_head.weight" if key == "output.weight" else f"model.{name}"] = value
    _refuse_unknown(renamed, LLAMA_KEYS, "Llama-like", facts)
    sizes = _sizes(renamed, facts)
    kind = PLAIN
    if facts.minimind or sizes.vocabulary == 6400:
        kind = {0.25: MINIMIND_EARLY_2025, 0.5: MINIMIND_2024}.get(sizes.keys / sizes.queries, PLAIN)
    if facts.minimind and "rope_theta" not in facts.config:
        kind = MINIMIND_2024  # its configuration had no rotary base yet
    result = _llama_like(renamed, facts, kind, sizes)
    for key in result.weights:
        if key.endswith(("q_proj.weight", "k_proj.weight")):
            result.weights[key] = halves(result.weights[key], result.config["head_dim"])
    return result


def halves(matrix: Tensor, head_dim: int) -> Tensor:
    """Rows [H * E, D] of a projection whose neighbours are rotated together, in the order in which the first half of a
    head is rotated with its second half, as Hugging Face and we do (arXiv 2104.09864 has the neighbours)."""
    rows, width = matrix.shape
    return matrix.view(rows // head_dim, head_dim // 2, 2, width).transpose(1, 2).reshape(rows, width)


# --- GPT-2 and nanoGPT ---


def _gpt(weights: dict[str, Tensor], facts: _Facts) -> Recognised:
    if "wte.weight" in weights:  # saved without the head
        weights = {key if key == "lm_head.weight" else f"transformer.{key}": value for key, value in weights.items()}
    _refuse_unknown(weights, GPT_KEYS, "GPT-2", facts)
    first = "transformer.h.0."
    vocabulary, width = _shape(weights, "transformer.wte.weight", facts)
    fused = tuple(_shape(weights, first + "attn.c_attn.weight", facts))
    if fused not in ((3 * width, width), (width, 3 * width)):
        raise UserError(f"{facts.where}: {first}attn.c_attn.weight is {fused}, not {width} by 3 x {width}")
    layers = 1 + max(_numbers(weights, r"transformer\.h\.(\d+)\."))
    linear = fused[0] == 3 * width
    style = "nanoGPT" if linear else "GPT-2"
    if linear:
        weights = _as_gpt2(weights, layers)
    _tie(weights, "transformer.wte.weight", facts)
    sizes = {
        "vocab_size": vocabulary, "n_embd": width, "n_layer": layers,
        "n_positions": _shape(weights, "transformer.wpe.weight", facts)[0],
        "n_inner": _shape(weights, first + "mlp.c_fc.weight", facts)[1],
    }  # fmt: skip
    if facts.config.get("model_type") == "gpt2" and not linear:
        return _whole(weights, facts, sizes, {})
    for name, value in sizes.items():
        facts.take(name, value)
    usual = width // 64 if width % 64 == 0 else None
    heads = facts.take("n_head", assumed=usual, why="heads of 64, as in every GPT-2", flag="num_attention_heads")
    if width % heads:
        raise UserError(f"{facts.where}: {heads} heads cannot share a width of {width}")
    # nanoGPT has had GELU itself since May 2023; GPT-2 has its tanh form.
    why = f"what {style} has"
    facts.take("activation_function", assumed="gelu" if linear else "gelu_new", why=why)
    facts.take("layer_norm_epsilon", assumed=1e-5, why=why)
    return Recognised(style, weights, {**facts.values, "model_type": "gpt2"}, facts.origins)


def _as_gpt2(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """nanoGPT's matrices turned around, as GPT-2's are kept, and biases of zero where it was trained without."""
    result = {
        key: value.t() if re.search(r"\.c_(attn|proj|fc)\.weight$", key) else value for key, value in weights.items()
    }
    names = ["ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    for path in ["transformer.ln_f", *(f"transformer.h.{layer}.{name}" for layer in range(layers) for name in names)]:
        weight = result.get(f"{path}.weight")
        if weight is not None:
            result.setdefault(f"{path}.bias", torch.zeros(weight.shape[-1], dtype=weight.dtype))
    return result
