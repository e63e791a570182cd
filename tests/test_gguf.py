"""What is exported as GGUF does in llama.cpp what it does here, for every architecture; and what cannot is refused."""

from __future__ import annotations

import json
import random
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_model, saved, tiny_config

from minillm.checkpoint.model import OpenedCheckpoint, open_checkpoint
from minillm.cli import main
from minillm.convert import gguf, llama_cpp
from minillm.convert.export import ExportSettings
from minillm.convert.gguf_tokenizer import CUTS
from minillm.convert.parity import PROMPTS, Expected
from minillm.log import UserError
from minillm.text.roles import OURS
from minillm.text.sentencepiece_bpe import SPACE, to_tokenizer_json, train_sentencepiece
from minillm.text.tokenizer import CONTROL_TOKENS, Tokenizer

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

SIZES = {"vocab_size": 6400, "hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3-untied": {"tie_word_embeddings": False},
    "qwen3-moe": {"use_moe": True},
    "qwen3-stretched": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "llama": {"qk_norm": False, "tie_word_embeddings": False},
    "llama3": {"qk_norm": False, "rope_scaling": LLAMA3},
    "mistral": {"model_type": "mistral", "qk_norm": False},
    "gpt2": {"model_type": "gpt2", "qk_norm": False, "qkv_bias": True, "num_key_value_heads": 4},
}

REQUEST: dict[str, Any] = {"context": 64, "texts": [], "prompts": [], "expected": [], "new_tokens": 1, "likeliest": 1}


def checkpoint(folder: Path, name: str = "qwen3", *, family: str = "ar", **changes: Any) -> Path:
    config = tiny_config(**{**SIZES, **MODELS[name], **changes})
    about = {"stage": "full_sft", "architecture": family, "family": {"architecture": family}}
    return saved(folder / "model.pt", random_model(config, scale=0.2), **about)


def export(source: Path, output: Path, *flags: str) -> int:
    return main(["export", "--checkpoint", str(source), "--output", str(output), "--format", "gguf", *flags])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("qwen3-untied", "mistral"))) for name in MODELS]
)
def test_llama_cpp_writes_the_same_greedy_tokens(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert export(checkpoint(tmp_path, name), tmp_path / "m.gguf", "--gguf_type", "f32") == 0
    said = capfd.readouterr()
    found = re.search(r"reads (\d+) texts into the same ids and gives the same (\d+) greedily written tokens", said.err)
    assert found and int(found[1]) == len(PROMPTS) + len(gguf.SAMPLES) and int(found[2]) > 16
    difference = float(said.err.split("differ by at most ")[1].split()[0])
    assert difference < (2e-3 if name == "gpt2" else 1e-4)  # llama.cpp looks GELU up in a table of 16-bit numbers
    assert not said.out and all(line[0] == "[" for line in said.err.splitlines())  # llama.cpp's log stays out


@pytest.mark.parametrize(("kind", "most"), [("f16", 0.02), ("q8_0", 0.4)])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_smaller_numbers_stay_close(
    name: str, kind: str, most: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path, name)
    assert export(source, tmp_path / "m.gguf", "--gguf_type", kind) == 0
    assert 0 < float(capsys.readouterr().err.split("differ by at most ")[1].split()[0]) < most
    size = sum(value.numel() for value in open_checkpoint(str(source)).model.state_dict().values())
    weights = (tmp_path / "m.gguf").stat().st_size - 250_000  # about what the tokenizer takes
    assert weights < size * {"f16": 2, "q8_0": 34 / 32}[kind] * 1.2


def texts() -> list[str]:
    """Texts that tokenizers may cut differently: those of the check, and random ones."""
    drawn = random.Random(0)
    usual = [
        chr(c)
        for c in [*range(32, 127), *range(0xA0, 0x180), 9, 10, 13, *range(0x4E00, 0x4E40), *range(0x3000, 0x3010)]
    ]
    usual += list(" \n'") * 30 + list("0123456789，。！？😀\u0301\u200d\u0660\uff11")
    wide = [chr(c) for c in range(1, 0x30000) if not 0xD800 <= c < 0xE000]
    rows = ["".join(drawn.choices(usual, k=drawn.randint(1, 30))) for _ in range(300)]
    rows += ["".join(drawn.choices(wide, k=drawn.randint(1, 15))) for _ in range(300)]
    return [
        *gguf.SAMPLES,
        *rows,
        *(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_t*.py")),
    ]


CORPUS = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_[a-d]*.py")]


def tokenizer_that_cuts(way: str) -> Tokenizer:
    """A small byte-level BPE that cuts text in one of the ways llama.cpp knows (a key of CUTS)."""
    import tokenizers
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt2" in way)
    first = {"gpt2": [], "digits gpt2": [pre_tokenizers.Digits(individual_digits=True)]}
    split = [pre_tokenizers.Split(tokenizers.Regex(way), behavior="isolated")]
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence([*first.get(way, split), byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    engine.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(
        vocab_size=800, special_tokens=list(CONTROL_TOKENS), initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip
    return Tokenizer(engine.to_str(), "")


def tokenizer_of_pieces() -> Tokenizer:
    """A SentencePiece BPE that puts <s> and a space before every text, as Llama 2's does."""
    content = json.loads(to_tokenizer_json(train_sentencepiece(CORPUS, 900)))
    content["normalizer"] = {
        "type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, content["normalizer"]]
    }  # fmt: skip
    content["pre_tokenizer"] = None
    return with_beginning(content, "")


def with_beginning(content: dict[str, Any], template: str) -> Tokenizer:
    """The tokenizer with <|im_start|> put before every text, which a template knows as bos_token."""
    begin = {"id": "<|im_start|>", "ids": [2], "tokens": ["<|im_start|>"]}
    content["post_processor"] = {
        "type": "TemplateProcessing", "special_tokens": {begin["id"]: begin}, "pair": [],
        "single": [{"SpecialToken": {"id": begin["id"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    }  # fmt: skip
    return Tokenizer(json.dumps(content), template, replace(OURS, begin="<|im_start|>"))


def ids_in_llama_cpp(tokenizer: Tokenizer, rows: list[str], folder: Path) -> list[list[int]]:
    model = random_model(tiny_config(vocab_size=tokenizer.vocab_size))
    opened = OpenedCheckpoint(folder / "m.pt", model, tokenizer, {"architecture": "ar"}, "pretrain", None)
    gguf.write(opened, ExportSettings(checkpoint="", output="", gguf_type="f32"), folder / "m.gguf")
    answer = llama_cpp.ask(folder / "m.gguf", {**REQUEST, "texts": rows})
    return list(answer["ids"])


@pytest.mark.parametrize("way", ["ours", "sentencepiece", "sentencepiece behind a space", *CUTS])
def test_llama_cpp_reads_any_text_into_the_same_ids(way: str, tmp_path: Path) -> None:
    if way == "ours":
        tokenizer = Tokenizer.load()
    elif way == "sentencepiece":
        (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(CORPUS, 900))
        tokenizer = Tokenizer.load(tmp_path)
    else:
        tokenizer = tokenizer_that_cuts(way) if way in CUTS else tokenizer_of_pieces()
    rows = texts()
    ours = [tokenizer.begin_ids + tokenizer.encode(row, parse_special=True) for row in rows]
    different = [row for row, a, b in zip(rows, ours, ids_in_llama_cpp(tokenizer, rows, tmp_path)) if a != b]
    assert len(rows) > 600 and not different


def test_a_template_that_writes_the_beginning_itself_is_rendered_with_one_beginning(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + ':' + m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = with_beginning(json.loads(tokenizer_that_cuts("gpt2").json_text), template)
    model = random_model(tiny_config(**{**SIZES, "vocab_size": tokenizer.vocab_size}), scale=0.2)
    source = saved(tmp_path / "model.pt", model, stage="full_sft", tokenizer=tokenizer.to_dict())
    assert export(source, tmp_path / "m.gguf", "--gguf_type", "f32") == 0


def test_a_way_of_cutting_that_llama_cpp_has_no_name_for_is_refused(tmp_path: Path) -> None:
    content = json.loads(Tokenizer.load().json_text)
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\w+|\W"}
    with pytest.raises(UserError, match=r"cuts text in a way that has no name known here in llama.cpp \(\\w\+"):
        ids_in_llama_cpp(Tokenizer(json.dumps(content), ""), [], tmp_path)


def test_the_file_says_what_a_program_needs_to_chat(tmp_path: Path) -> None:
    from gguf import GGUFReader

    assert export(checkpoint(tmp_path), tmp_path / "m.gguf", "--no_check") == 0
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "m.gguf").fields.items()}
    tokenizer = Tokenizer.load()
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.eot_token_id"] == tokenizer.end_of_turn_id
    assert fields["tokenizer.ggml.tokens"][tokenizer.end_of_turn_id] == "<|im_end|>"
    assert fields["tokenizer.ggml.token_type"][:7] == [3] * 6 + [4]  # control tokens, then <think>
    assert fields["general.architecture"] == "qwen3" and fields["qwen3.attention.key_length"] == 16
    assert not any("/" in str(value) for name, value in fields.items() if name.startswith("general."))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("order", "gives the next token after an English text another probability"),
        ("cut", "reads .* as .*, expected .*: it has another tokenizer"),
        ("template", "reads an English conversation otherwise: token"),
    ],
)
def test_a_file_that_is_wrong_is_refused_and_not_left_behind(
    broken: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "order":
        monkeypatch.setattr(gguf, "_interleaved", lambda value, heads: value)
    elif broken == "cut":
        right = gguf.describe
        monkeypatch.setattr(gguf, "describe", lambda *args: right(*args)._replace(cut="gpt-2"))
    else:
        import gguf as library

        right = library.GGUFWriter.add_chat_template
        monkeypatch.setattr(library.GGUFWriter, "add_chat_template", lambda self, text: right(self, text + "!"))
    assert export(checkpoint(tmp_path, "llama"), tmp_path / "m.gguf", "--gguf_type", "f32") == 1
    assert re.search(f"the export is refused, nothing was written: llama.cpp {said}", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    ("changes", "flags", "said"),
    [
        ({"family": "diffusion", "causal": False}, [], "is a diffusion model, which llama.cpp does not have"),
        ({"value_head": True}, [], "is a reward model: llama.cpp has no place for its value head"),
        ({"sliding_window": 8}, [], "qwen3 models cannot have a sliding window (of 8 tokens)"),
        ({"rope_scaling": LLAMA3}, [], "qwen3 models cannot have rotary scaling of type llama3"),
        ({"use_moe": True, "dense_layers": (1,)}, [], "qwen3moe models cannot have layers without experts (1)"),
        ({"use_moe": True, "norm_topk_prob": False}, [], "experts whose probabilities are not made to sum to one"),
        ({"intermediate_size": 80}, ["--gguf_type", "q8_0"], "layers.0.mlp.down_proj.weight has rows of 80 numbers"),
        ({}, ["--quantize", "int8"], "--quantize does not go with --format gguf"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_by_name(
    changes: dict[str, Any], flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkpoint(tmp_path, **changes), tmp_path / "m.gguf", *flags) == 1
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_number_that_16_bits_do_not_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(tiny_config(**SIZES))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5
    source = saved(tmp_path / "model.pt", model)
    assert export(source, tmp_path / "m.gguf") == 1
    assert "layers.1.mlp.up_proj.weight has a number of size 100000, more than 16 bits hold" in capsys.readouterr().err


def test_only_a_file_of_ours_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = checkpoint(tmp_path), tmp_path / "m.gguf"
    output.write_bytes(b"GGUF of somebody else")
    assert export(source, output) == 1
    assert "exists and is not an earlier export" in capsys.readouterr().err
    assert output.read_bytes() == b"GGUF of somebody else"
    output.unlink()
    assert export(source, output, "--no_check") == export(source, output, "--no_check") == 0


def test_a_file_that_llama_cpp_does_not_take_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 400)
    with pytest.raises(UserError, match=r"llama\.cpp cannot run m\.gguf: it failed; its last words: "):
        llama_cpp.ask(tmp_path / "m.gguf", REQUEST)


def test_a_crash_or_a_hang_of_native_code_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashes.py").write_text("import os, sys\nos.abort()\n")
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(llama_cpp, "MODULE", "crashes")
    with pytest.raises(UserError, match=f"it was ended by signal {int(signal.SIGABRT)}; its last words: none"):
        llama_cpp.ask(tmp_path / "m.gguf", REQUEST)
    monkeypatch.setattr(llama_cpp, "MODULE", "hangs")
    with pytest.raises(UserError, match="was not done with m.gguf after 0.5 s and was ended"):
        llama_cpp.ask(tmp_path / "m.gguf", REQUEST, seconds=0.5)


def test_tokens_that_are_nearly_as_likely_are_counted_and_others_refused(tmp_path: Path) -> None:
    opened = open_checkpoint(str(checkpoint(tmp_path)))
    ids = [300, 301, 302]
    with torch.no_grad():
        logits = opened.model.logits(opened.model(torch.tensor([ids])).hidden[0])
    best, second = logits[-1].topk(2).indices.tolist()
    behind = float(logits[-1, best] - logits[-1, second])
    expected = Expected(PROMPTS[0], ids, ids, 1, [best], logits, False)
    assert gguf._near_ties(opened, expected, [best], behind * 0.9) == 0
    assert gguf._near_ties(opened, expected, [second], behind * 1.1) == 1
    with pytest.raises(UserError, match=f"token 1 is {second}, expected {best}; here the first is less likely by"):
        gguf._near_ties(opened, expected, [second], behind * 0.9)
    with pytest.raises(UserError, match="stops after 0 of 1 tokens"):
        gguf._near_ties(opened, expected, [], 0.5)
