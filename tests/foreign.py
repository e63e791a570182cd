"""Tiny models and tokenizers of other libraries, as their users save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 128,
}  # fmt: skip
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 32}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE}
# name: (class of the configuration, what differs from SIZES)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ROPE}}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-window": ("Qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5,
                               "max_window_layers": 0}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                               "norm_topk_prob": True}),
    "qwen3-moe-mixed": ("Qwen3Moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                                     "moe_intermediate_size": 24, "norm_topk_prob": False, "mlp_only_layers": [0]}),
    "gpt2": ("GPT2", {}),
    "gpt2-untied": ("GPT2", {"tie_word_embeddings": False}),
}  # fmt: skip
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 128,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def foreign_model(kind: str, **changes: Any) -> Any:
    """transformers' model of this kind, with weights of order one, in evaluation mode."""
    import transformers

    name, differences = KINDS[kind]
    sizes = GPT2_SIZES if name == "GPT2" else SIZES
    config = getattr(transformers, f"{name}Config")(**{**sizes, **differences, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
    return model.eval()


TALK = [
    {"role": "user", "content": "hello there"}, {"role": "assistant", "content": "a table"},
    {"role": "user", "content": "bob?"}, {"role": "assistant", "content": "to be"},
]  # fmt: skip
CHATML = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
HEADERS = """{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""
INSTRUCT = """{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- '[INST] ' + message['content'] + ' [/INST]' -}}
{%- elif message['role'] == 'assistant' -%}
{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
{%- else -%}{{- raise_exception('only user and assistant') -}}{%- endif -%}
{%- endfor -%}"""
# name: (kind of vocabulary, special tokens, tokenizer_config.json)
TOKENIZERS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "chatml": ("bytes", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
               {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}),
    "headers": ("bytes", ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                          "<|eot_id|>"],
                {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": HEADERS}),
    "instruct": ("pieces", ["<unk>", "<s>", "</s>"],
                 {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": INSTRUCT}),
    "metaspace": ("first", ["<unk>", "<s>", "</s>"],
                  {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": INSTRUCT}),
    "plain": ("bytes", ["<|endoftext|>"], {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
}  # fmt: skip


def write_tokenizer(folder: Path, name: str) -> Any:
    """tokenizer.json and tokenizer_config.json of a small vocabulary; transformers' tokenizer of them."""
    import transformers

    save_tokenizer(folder, name)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def save_tokenizer(folder: Path, name: str) -> None:
    """The same without loading it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    form, special, config = TOKENIZERS[name]
    if form == "bytes":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        engine = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
    else:
        pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abehilot"]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        engine = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
        if form == "first":
            engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            before = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            engine.normalizer = normalizers.Sequence(before)
        engine.decoder = decoders.Sequence([
            decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
        ])  # fmt: skip
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos = config.get("bos_token")
    if bos and bos != config["eos_token"]:
        engine.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, engine.token_to_id(bos))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
