"""minillm export --format gguf: one file that llama.cpp runs, with tokenizer and chat template in it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.convert import llama_cpp
from minillm.convert.card import title_of
from minillm.convert.gguf_tokenizer import describe
from minillm.log import UserError, warn
from minillm.models.dialects import dialect_of, weights_to

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from minillm.checkpoint.model import OpenedCheckpoint
    from minillm.convert.export import ExportSettings
    from minillm.convert.parity import Expected
    from minillm.models.config import ModelConfig
    from minillm.models.transformer import LanguageModel

TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # what the format calls files of mostly this type
LARGEST_F16 = 65504.0
BLOCK = 32  # numbers that q8_0 packs together, all of one row
# Hugging Face's model_type -> what llama.cpp calls it
FORMS = {
    "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "qwen2": "qwen2", "llama": "llama", "mistral": "llama", "gpt2": "gpt2",
}  # fmt: skip
IN_FULL = (".mlp.gate.weight", ".wpe.weight")  # routers and positions stay in 32 bits, as vectors do
# How far natural logarithms of probabilities may be apart. Measured on small models: 0.0009 (GPT-2's, for which
# llama.cpp looks GELU up in a table; else 0.0001), 0.008 and 0.14.
ALLOWED = {"f32": 0.005, "f16": 0.05, "q8_0": 0.5}
LIKELIEST = 100  # of so many tokens the probabilities are compared
# What tokenizers tend to disagree about. Control tokens are read as such.
SAMPLES = (
    "don't I'LL we've HE'S it's", "  two  spaces\n\n\nlines \t tabs \r\n\r\n x", "\n", "   ", " " * 40 + "x", "a" * 200,
    "1234567890 3.14 -17 ２３ ½ ² Ⅷ", "你好,世界!今天是2024年。混合mixed文字", "日本語テキスト、カタカナ。",
    "안녕하세요 हिन्दी عربى",
    "def f(x, *args):\n    return {'a': x**2}  # ok\n\tif x != 0: pass\r\n", "!@#$%^&*()_+-=[]{};':\",./<>?`~\\|",
    "é ñ ü ß İ ſ", "😀 👨‍👩‍👧 🇨🇳", "a\u200bb \u00a0c\u3000d\u2028e\x85f\x00g", "<think>a</think> <answer> b</answer>",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>", "<|im_end |> <|im_end", "_x__y_",
)  # fmt: skip
HEAD_OF_FILE = 4096  # our own key stands in it, see `may_replace`


def require(settings: ExportSettings) -> None:
    """UserError where gguf or llama.cpp is missing, or flags do not fit the format."""
    if settings.adapter_only or settings.quantize:
        flag = "--adapter_only" if settings.adapter_only else "--quantize"
        raise UserError(f"{flag} does not go with --format gguf; smaller files are made with --gguf_type f16 or q8_0")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--format gguf needs the library gguf: pip install 'minillm-trainer[export]'")
    if not settings.no_check:
        llama_cpp.require()


def kind_of(settings: ExportSettings) -> str:
    """The type that most numbers have in the file."""
    return settings.gguf_type or "f16"


def may_replace(path: Path) -> bool:
    """Only a GGUF file that says that we wrote it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(HEAD_OF_FILE)
    return start.startswith(b"GGUF") and b"minillm.stage" in start


def write(opened: OpenedCheckpoint, settings: ExportSettings, beside: Path) -> None:
    """The file.

    Raises:
        UserError: the model or its tokenizer cannot be expressed, or a tensor does not fit the type.
    """
    import gguf

    config = opened.model.config
    if opened.architecture != "ar":
        raise UserError(
            f"{opened.path} is a {opened.architecture} model, which llama.cpp does not have: only ar models become GGUF"
        )
    if config.value_head:
        raise UserError(f"{opened.path} is a reward model: llama.cpp has no place for its value head")
    form = _form(config)
    tokenizer = describe(opened.tokenizer, config.vocab_size)
    if tokenizer.normalizes:
        warn(
            f"the tokenizer normalises text ({tokenizer.normalizes}) and llama.cpp does not: a letter and an accent "
            "behind it get other ids there"
        )
    writer = gguf.GGUFWriter(beside, form)
    writer.add_string("minillm.stage", opened.stage)
    writer.add_name(title_of(opened.path))
    writer.add_file_type(TYPES[kind_of(settings)])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config)
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.kinds)
    if tokenizer.model == "gpt2":
        writer.add_tokenizer_pre(tokenizer.cut)
        writer.add_token_merges(tokenizer.merges)
    else:
        writer.add_token_scores(tokenizer.scores)
        writer.add_add_space_prefix(tokenizer.space_prefix)
    roles, text = opened.tokenizer.roles, opened.tokenizer
    begin, end = text.token_to_id(roles.begin), text.token_to_id(roles.end)
    writer.add_add_bos_token(bool(text.begin_ids))
    # where there is no such token: one that is harmless, as the format else assumes some entry
    writer.add_bos_token_id(text.end_of_text_id if begin is None else begin)
    writer.add_eos_token_id(text.end_of_turn_id if end is None else end)
    writer.add_eot_token_id(text.end_of_turn_id)
    writer.add_pad_token_id(text.pad_id)
    writer.add_chat_template(text.chat_template)
    for name, theirs, value in tensors(weights_to(opened.model.state_dict(), config), config, form):
        data, kind = _stored(name, value, kind_of(settings))
        writer.add_tensor(theirs, data, raw_dtype=kind)
    if (config.rope_scaling or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _slowed(opened.model))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _form(config: ModelConfig) -> str:
    """What llama.cpp calls the architecture.

    Raises:
        UserError: it has something that llama.cpp's model of that name has not.
    """
    kind = dialect_of(config)
    form = FORMS[kind]
    scaling = (config.rope_scaling or {}).get("rope_type", "default")
    cannot = ""
    if 0 < config.sliding_window < config.max_position_embeddings:
        cannot = f"a sliding window (of {config.sliding_window} tokens)"
    elif scaling not in ("default", "linear", *["llama3"] * (form == "llama")):
        cannot = f"rotary scaling of type {scaling} (as we write it)"
    elif config.use_moe and config.dense_layers:
        cannot = f"layers without experts ({', '.join(map(str, config.dense_layers))})"
    elif config.use_moe and not config.norm_topk_prob:
        cannot = "experts whose probabilities are not made to sum to one"
    elif config.exact_gelu:
        cannot = "GELU itself (nanoGPT), only its tanh form"
    if cannot:
        raise UserError(f"llama.cpp's {form} models cannot have {cannot}, so this {kind} model cannot become GGUF")
    return form


def _add_sizes(writer: Any, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.learned_positions:
        writer.add_layer_norm_eps(config.rms_norm_eps)
        return
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.rope_scaling and config.rope_scaling["rope_type"] == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(float(config.rope_scaling["factor"]))
    if config.use_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _slowed(model: LanguageModel) -> np.ndarray:
    """By how much each of the E / 2 rotations is slower than its frequency. At position 1 the angle is the speed, and
    it is at most 1, so that the sine tells it."""
    import torch

    config = model.config
    plain = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    return (plain / model.sin[1, : config.head_dim // 2].asin()).numpy()


def tensors(weights: dict[str, Tensor], config: ModelConfig, form: str) -> Iterator[tuple[str, str, Tensor]]:
    """(Hugging Face's name, llama.cpp's name, values) of each tensor; experts of a layer are one [experts, out, in]."""
    import gguf
    import torch

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == form)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, value in weights.items():
        before, experts, after = name.partition(".experts.0.")
        if experts:
            parts = [weights[f"{before}.experts.{index}.{after}"] for index in range(config.num_experts)]
            name, value = f"{before}.experts.{after}", torch.stack(parts)
        elif ".experts." in name:
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise UserError(f"llama.cpp's {form} models have no place for {name}")
        if form == "llama" and ".self_attn.q_proj." in name:
            value = _interleaved(value, config.num_attention_heads)
        elif form == "llama" and ".self_attn.k_proj." in name:
            value = _interleaved(value, config.num_key_value_heads)
        elif form == "gpt2" and ".c_" in name and value.ndim == 2:
            value = value.t()  # Hugging Face's GPT-2 has them input first
        yield name, theirs, value.float()


def _interleaved(value: Tensor, heads: int) -> Tensor:
    """Rows [heads * E, ..] of queries or keys in the order of llama.cpp's llama models, which turn neighbours (0, 1),
    (2, 3) ... against each other where Hugging Face's turn the halves (0, E / 2), (1, E / 2 + 1) ..."""
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(value.shape)


def _stored(name: str, value: Tensor, kind: str) -> tuple[np.ndarray, Any]:
    """The numbers as they stand in the file, and their type where it does not follow from them."""
    import gguf
    import numpy as np

    data = value.contiguous().numpy()
    if kind == "f32" or value.ndim == 1 or name.endswith(IN_FULL):
        return data, None
    if kind == "f16":
        largest = float(np.abs(data).max())
        if largest > LARGEST_F16:
            raise UserError(f"{name} has a number of size {largest:g}, more than 16 bits hold: give --gguf_type f32")
        return data.astype(np.float16), None
    if data.shape[-1] % BLOCK:
        raise UserError(
            f"{name} has rows of {data.shape[-1]} numbers, and q8_0 packs {BLOCK} at a time: give --gguf_type f16"
        )
    return gguf.quantize(data, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0


def check(opened: OpenedCheckpoint, settings: ExportSettings, beside: Path) -> str:
    """Let llama.cpp read, render, tokenize and write, and compare with the checkpoint: a sentence about it.

    Where the greedy tokens part, both tokens must be about as likely here (ALLOWED); writing is compared again behind
    the expected one.

    Raises:
        UserError: llama.cpp does not run the file, or something differs; it says what and where.
    """
    from minillm.convert.parity import check_ids, expectations, refused

    allowed = ALLOWED[kind_of(settings)]
    expected = expectations(opened)
    texts = [list(each.prompt.messages) or each.prompt.text for each in expected]
    answer = llama_cpp.ask(
        beside,
        {
            "context": max(len(each.ids) + each.new_tokens for each in expected),
            "texts": [*texts, *SAMPLES],
            "prompts": [each.ids for each in expected],
            "expected": [each.tokens for each in expected],
            "new_tokens": expected[0].new_tokens,
            "likeliest": LIKELIEST,
        },
    )
    for each, ids in zip(expected, answer["ids"]):
        check_ids(each, ids, "llama.cpp")
    for text, ids in zip(SAMPLES, answer["ids"][len(texts) :]):
        ours = opened.tokenizer.begin_ids + opened.tokenizer.encode(text, parse_special=True)
        if ids != ours:
            raise refused("llama.cpp", f"reads {text!r} as {ids}, expected {ours}: it has another tokenizer")
    largest, ties, written = 0.0, 0, 0
    for each, told, tokens in zip(expected, answer["next"], answer["written"]):
        for token, value in told:
            largest = max(largest, abs(value - float(each.logits[-1].log_softmax(-1)[token])))
        if not largest <= allowed:
            raise refused(
                "llama.cpp",
                f"gives the next token after {each.prompt.name} another probability: logarithms differ by "
                f"{largest:.2g}, where the numbers of a {kind_of(settings)} file explain {allowed:g}",
            )
        ties += _near_ties(opened, each, tokens, allowed)
        written += len(tokens)
    what = f"the same {written} greedily written tokens"
    if ties:
        same = written - ties
        what = f"{written} greedily written tokens, {same} of them the same and {ties} of nearly equal probability"
    return (
        f"llama.cpp reads {len(texts) + len(SAMPLES)} texts into the same ids and gives {what}; logarithms of "
        f"probabilities differ by at most {largest:.1g}"
    )


def _near_ties(opened: OpenedCheckpoint, expected: Expected, tokens: list[int], allowed: float) -> int:
    """How many tokens are not the expected ones, but nearly as likely here. Raises UserError for one that is not."""
    import torch

    from minillm.convert.parity import refused

    tokenizer, ties = opened.tokenizer, 0
    ends = (tokenizer.end_of_turn_id, tokenizer.end_of_text_id)
    for place, token in enumerate(tokens):
        ours = expected.tokens[place] if place < len(expected.tokens) else None
        if token == ours or (ours is None and token in ends):
            continue
        ids = torch.tensor([expected.ids + expected.tokens[:place]])
        with torch.inference_mode():
            values = opened.model.logits(opened.model(ids).hidden[0, -1]).log_softmax(-1)
        best = float(values.max() if ours is None else values[ours])
        behind = best - float(values[token])
        if not behind <= allowed:
            raise refused(
                "llama.cpp",
                f"writes something else after {expected.prompt.name}: token {place + 1} is {token}, expected "
                f"{'an end' if ours is None else ours}; here the first is less likely by {behind:.2g} nats",
            )
        ties += 1
    if len(tokens) < len(expected.tokens):
        stops = f"stops after {len(tokens)} of {len(expected.tokens)} tokens behind {expected.prompt.name}"
        raise refused("llama.cpp", stops)
    return ties


def usage(opened: OpenedCheckpoint, settings: ExportSettings) -> str:
    """How the export is run, as a person would type it."""
    return f"llama-cli -m {settings.output}"
