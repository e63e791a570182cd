"""How other programs call what we have: Hugging Face's config.json and parameter names <-> ModelConfig and ours.

A dialect is one `model_type`. Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE have our parameter names; GPT-2 has others,
holds its matrices turned around, and queries, keys and values in one. What is not known here is refused by name: a
model that is read almost rightly is worse than one that is not read. No I/O here, and no torch at import time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minillm.log import UserError
from minillm.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

# model_type -> the stem of its classes' names
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "gpt2": "GPT2",
}  # fmt: skip
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")  # two names of one formula
# Buffers that older versions wrote into files; they follow from the configuration.
_NO_PARAMETERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|h\.\d+\.attn\.(bias|masked_bias))")


def dialect_of(config: ModelConfig) -> str:
    """The model_type that describes this model: the one it was imported as, else the one with its parts.

    Raises:
        UserError: none has them.
    """
    if config.model_type:
        return config.model_type
    if config.qk_norm and not config.qkv_bias:
        return "qwen3_moe" if config.use_moe else "qwen3"
    if not config.qk_norm and not config.use_moe:
        if config.qkv_bias:
            return "qwen2"
        return "mistral" if config.sliding_window else "llama"
    raise UserError(
        f"no architecture of Hugging Face that is known here has qk_norm {config.qk_norm}, qkv_bias {config.qkv_bias} "
        f"and use_moe {config.use_moe} together"
    )


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes.

    Args:
        hf: its content, as transformers 4 or 5 writes it.

    Raises:
        UserError: an architecture or something of it that is not known here, by the name of its key.
    """
    kind = hf.get("model_type")
    if kind not in CLASSES:
        raise UserError(f"config.json: model_type is {kind!r}; known are {', '.join(CLASSES)}")
    if hf.get("quantization_config"):
        raise UserError("config.json: quantization_config: quantised weights cannot be trained; take the full ones")
    try:
        return _gpt2_config(hf) if kind == "gpt2" else _llama_like_config(hf)
    except KeyError as error:
        raise UserError(f"config.json: {error.args[0]} is missing, a {kind} model needs it") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json: a value is not of its kind ({error})") from None


def _require(hf: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]]) -> None:
    """Keys that are there must have one of these values; null counts as absent."""
    for key, allowed in expected.items():
        value = hf.get(key)
        if value is not None and value not in allowed:
            only = " or ".join(repr(each) for each in allowed)
            raise UserError(f"config.json: {key} is {value!r}, only {only} is known for {hf['model_type']} models")


def _llama_like_config(hf: Mapping[str, Any]) -> ModelConfig:
    kind = hf["model_type"]
    _require(
        hf,
        {
            "hidden_act": ("silu",),
            "attention_bias": (True,) if kind == "qwen2" else (False,),
            "mlp_bias": (False,),
            "partial_rotary_factor": (1.0,),
            "is_decoder": (True, False),
        },
    )
    heads, hidden, layers = int(hf["num_attention_heads"]), int(hf["hidden_size"]), int(hf["num_hidden_layers"])
    theta, scaling = _rope(hf)
    window, full_layers = _window(hf)
    config = ModelConfig(
        model_type="" if kind in ("qwen3", "qwen3_moe") else kind,
        vocab_size=int(hf["vocab_size"]),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=int(hf.get("num_key_value_heads") or heads),
        head_dim=int(hf.get("head_dim") or hidden // heads),
        intermediate_size=int(hf["intermediate_size"]),
        max_position_embeddings=int(hf["max_position_embeddings"]),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)) or _judges(hf),  # it has no other head
        value_head=_judges(hf),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        qkv_bias=kind == "qwen2",
        sliding_window=window,
        max_window_layers=full_layers,
    )
    return _with_experts(config, hf) if kind == "qwen3_moe" else config


def _with_experts(config: ModelConfig, hf: Mapping[str, Any]) -> ModelConfig:
    step, listed = int(hf.get("decoder_sparse_step") or 1), set(hf.get("mlp_only_layers") or ())
    count = int(hf.get("num_experts") or hf.get("num_local_experts") or 0)  # transformers 5 writes the second
    if not count:
        raise KeyError("num_experts")
    return replace(
        config,
        use_moe=True,
        num_experts=count,
        num_experts_per_tok=int(hf["num_experts_per_tok"]),
        moe_intermediate_size=int(hf["moe_intermediate_size"]),
        router_aux_loss_coef=float(hf.get("router_aux_loss_coef", 0.001)),
        norm_topk_prob=bool(hf.get("norm_topk_prob", False)),
        dense_layers=tuple(i for i in range(config.num_hidden_layers) if i in listed or (i + 1) % step),
    )


def _rope(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary embedding, from transformers 5's one key or from the two before it."""
    found = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise UserError(f"config.json: rope_parameters (rope_scaling) is {found!r}, not an object")
    scaling = {key: value for key, value in found.items() if key not in ("rope_theta", "type", "rope_type")}
    kind = found.get("rope_type") or found.get("type") or "default"
    theta = float(found.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    if kind not in ROPE_TYPES:
        raise UserError(f"config.json: rope_type {kind!r} is not known here, only {', '.join(ROPE_TYPES)}")
    if scaling.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise UserError(
            "config.json: partial_rotary_factor is not 1: heads that are rotated in part are not known here"
        )
    if kind == "default":
        return theta, None
    if kind in ("llama3", "yarn") and "original_max_position_embeddings" not in scaling:
        scaling["original_max_position_embeddings"] = (
            hf.get("original_max_position_embeddings") or hf["max_position_embeddings"]
        )
    from minillm.models.rotary import check_scaling

    scaling = {"rope_type": kind, **scaling}
    check_scaling(scaling)
    return theta, scaling


def _window(hf: Mapping[str, Any]) -> tuple[int, int]:
    """The sliding window (0: none) and how many of the first layers are without it."""
    kind, layers = hf["model_type"], int(hf["num_hidden_layers"])
    used = hf.get("use_sliding_window", kind == "mistral")
    window = int(hf.get("sliding_window") or 0) if used and kind != "llama" else 0
    # Qwen3-MoE lets every layer have it, whatever max_window_layers says.
    full = min(layers, int(hf.get("max_window_layers", 28))) if window and kind in ("qwen2", "qwen3") else 0
    if full == layers:
        window, full = 0, 0
    types = hf.get("layer_types")
    if types and set(types) == {"full_attention"}:
        return 0, 0
    if types and (not window or list(types) != ["full_attention"] * full + ["sliding_attention"] * (layers - full)):
        raise UserError(
            "config.json: layer_types: known are layers that see everything, layers with a window, or first those and "
            "then these"
        )
    return window, full


def _judges(hf: Mapping[str, Any]) -> bool:
    """Is it a ...ForSequenceClassification with one label, which is a reward model here?"""
    names = hf.get("architectures") or []
    if not any("SequenceClassification" in str(name) for name in names):
        return False
    labels = len(hf.get("id2label") or {}) or int(hf.get("num_labels", 2))
    if labels != 1:
        raise UserError(f"config.json: a classifier with {labels} labels is not known here, only a reward model's one")
    return True


def _gpt2_config(hf: Mapping[str, Any]) -> ModelConfig:
    _require(
        hf,
        {
            "activation_function": (*GELU_TANH, "gelu"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    )
    hidden, heads = int(hf["n_embd"]), int(hf["n_head"])
    return ModelConfig(
        model_type="gpt2",
        vocab_size=int(hf["vocab_size"]),
        hidden_size=hidden,
        num_hidden_layers=int(hf["n_layer"]),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=int(hf.get("n_inner") or 4 * hidden),
        max_position_embeddings=int(hf.get("n_positions") or hf["n_ctx"]),
        rms_norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", True)) or _judges(hf),
        value_head=_judges(hf),
        qk_norm=False,
        qkv_bias=True,
        exact_gelu=hf.get("activation_function") == "gelu",
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The part of a config.json that describes the model: model_type, architectures and sizes. Tokens, dtype and what
    is ours are the caller's to add. `config_from` reads it back.

    Raises:
        UserError: no architecture that is known here has these parts.
    """
    kind = dialect_of(config)
    head = "ForSequenceClassification" if config.value_head else ("LMHeadModel" if kind == "gpt2" else "ForCausalLM")
    values: dict[str, Any] = {"architectures": [CLASSES[kind] + head], "model_type": kind}
    values |= _gpt2_values(config) if kind == "gpt2" else _llama_like_values(config, kind)
    if config.value_head:
        values |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return values


def _llama_like_values(config: ModelConfig, kind: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if config.rope_scaling:
        values["rope_scaling"] = dict(config.rope_scaling)  # as transformers 4 reads it
    if kind != "qwen2":
        values["attention_bias"] = False
    if kind == "llama":
        values["mlp_bias"] = False
    if kind == "mistral":
        values["sliding_window"] = config.sliding_window or None
    elif config.sliding_window:
        values |= {"use_sliding_window": True, "sliding_window": config.sliding_window,
                   "max_window_layers": config.max_window_layers}  # fmt: skip
    if kind == "qwen3_moe":
        values |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(config.dense_layers),
            "router_aux_loss_coef": config.router_aux_loss_coef,
        }
    return values


def _gpt2_values(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.max_position_embeddings,
        "n_ctx": config.max_position_embeddings,
        "activation_function": "gelu" if config.exact_gelu else "gelu_new",
        "layer_norm_epsilon": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def weights_from(weights: Mapping[str, Tensor], model_type: str, config: ModelConfig) -> dict[str, Tensor]:
    """Parameters of a Hugging Face model under our names and in our shapes. Keys that nothing here knows keep their
    names: whoever loads them reports them. Gradients can be mapped in the same way."""
    found = {key: value for key, value in weights.items() if not _NO_PARAMETERS.fullmatch(key)}
    found = _gpt2_from(found) if model_type == "gpt2" else _llama_like_from(found)
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    return found


def weights_to(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our parameters under the names and in the shapes of the model's own architecture (`dialect_of`)."""
    return _gpt2_to(weights) if dialect_of(config) == "gpt2" else dict(weights)


def _llama_like_from(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # A model that was saved without its head has names without the first part.
    prefix = "model." if "embed_tokens.weight" in weights else ""
    result: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key if key.startswith(("lm_head.", "score.")) else prefix + key
        experts, _, fused = name.rpartition(".experts.")
        if fused in ("gate_up_proj", "down_proj"):  # transformers 5 in memory: all experts in one tensor
            for index, matrix in enumerate(value):
                parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else (fused,)
                for part, piece in zip(parts, matrix.chunk(len(parts))):
                    result[f"{experts}.experts.{index}.{part}.weight"] = piece
        else:
            result[name] = value
    return result


# GPT-2's last names -> ours, inside a layer; the matrices among them are stored input first.
_GPT2_LAYER = {
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
_GPT2_OUTSIDE = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm"}
_QKV = tuple(f"self_attn.{which}_proj" for which in "qkv")


def _gpt2_from(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key.removeprefix("transformer.")
        module, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"h\.(\d+)\.(.+)", module)
        if layer and layer[2] in _GPT2_LAYER:
            own = f"model.layers.{layer[1]}.{_GPT2_LAYER[layer[2]]}.{kind}"
            result[own] = value.t().contiguous() if value.ndim == 2 else value
        elif layer and layer[2] == "attn.c_attn":
            for part, piece in zip(_QKV, value.chunk(3, dim=-1)):
                piece = piece.t() if piece.ndim == 2 else piece
                result[f"model.layers.{layer[1]}.{part}.{kind}"] = piece.contiguous()
        elif module in _GPT2_OUTSIDE:
            result[f"model.{_GPT2_OUTSIDE[module]}.{kind}"] = value
        else:
            result[key] = value
    return result


def _gpt2_to(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch

    inside = {own: name for name, own in _GPT2_LAYER.items()}
    outside = {own: name for name, own in _GPT2_OUTSIDE.items()}
    result: dict[str, Tensor] = {}
    for key, value in weights.items():
        module, _, kind = key.removeprefix("model.").rpartition(".")
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
        if layer and layer[2] in inside:
            name = f"transformer.h.{layer[1]}.{inside[layer[2]]}.{kind}"
            result[name] = value.t().contiguous() if value.ndim == 2 else value
        elif layer and layer[2] == _QKV[0]:
            parts = [weights[f"model.layers.{layer[1]}.{part}.{kind}"] for part in _QKV]
            joined = torch.cat(parts)
            name = f"transformer.h.{layer[1]}.attn.c_attn.{kind}"
            result[name] = joined.t().contiguous() if joined.ndim == 2 else joined
        elif layer and layer[2] in _QKV:
            continue  # in c_attn, with the queries
        else:
            result[f"transformer.{outside[module]}.{kind}" if module in outside else key] = value
    return result
