"""Quantised exports run in transformers, say what they cost, and are what the printed loss was measured on; adapters
on their own run in peft."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_huggingface import checkpoint, export, load
from tiny import random_model

from minillm.checkpoint.adapter import save_adapter
from minillm.checkpoint.model import open_checkpoint
from minillm.cli import main
from minillm.convert.huggingface import auto_class
from minillm.models.lora import LoraConfig, Pair
from minillm.text.chat import CLASSIC_TEMPLATE
from minillm.text.tokenizer import Tokenizer

EVEN = {"intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1}


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    turns = [
        {"conversations": [{"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": f"{2 * i}."}]}
        for i in range(30)
    ]
    path = tmp_path / "val.jsonl"
    path.write_text("\n".join(map(json.dumps, turns)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("ar-moe", "int8"),
        ("sdd", "int4"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("ar", "int8"), ("ar", "int4"), ("qwen2", "int8"), ("diffusion-moe", "int4"),
                         ("sdd-bilateral", "int8"))
        ),
    ],
)  # fmt: skip
def test_a_quantised_export_is_loaded_by_transformers_and_its_loss_is_printed(
    name: str, bits: str, tmp_path: Path, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "a.pt", name, **EVEN)
    assert export(source, tmp_path / "q", "--quantize", bits, "--validation_data", str(held_out)) == 0
    said = capsys.readouterr().err
    assert "greedily written tokens" in said
    before, after = (int(size.replace(",", "")) for size in re.findall(r"([\d,]+) -> ([\d,]+) bytes", said)[0])
    assert before > after == (tmp_path / "q" / "model.safetensors").stat().st_size
    losses = re.search(r"loss ([\d.]+) -> ([\d.]+) nats", said)
    assert losses and 0 < abs(float(losses[1]) - float(losses[2])) < (0.3 if bits == "int8" else 1.5)
    assert ("perplexity (upper bound)" in said) == (not name.startswith(("ar", "qwen2")))
    assert ("no smaller than int8's" in said) == (bits == "int4")
    model = load(tmp_path / "q", auto_class(open_checkpoint(str(source))))
    (row,) = {
        type(value.data).__name__ for key, value in model.named_parameters() if key.endswith("self_attn.k_proj.weight")
    }
    assert row == {"int8": "Int8Tensor", "int4": "IntxUnpackedToInt8Tensor"}[bits]
    assert type(model.get_input_embeddings().weight.data) is torch.Tensor


def test_a_loss_that_was_not_measured_is_said_to_be_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(checkpoint(tmp_path / "a.pt", "ar"), tmp_path / "q", "--quantize", "int8") == 0
    said = capsys.readouterr().err
    assert "was not measured" in said and not re.search(r"perplexity \d", said)
    flags = ["--prompt", "Hi", "--max_new_tokens", "2"]
    assert main(["generate", "--checkpoint", str(tmp_path / "q" / "model.safetensors"), *flags]) == 1
    assert "is quantised by torchao: only transformers reads it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("ar-moe", ["--quantize", "int4"], "torchao has in 8 bits only; give int8"),
        ("ar", ["--quantize", "int4"], "has rows of 24 weights, and 32 share a scale; give int8"),
        ("gpt2", ["--quantize", "int8"], "no linear layers in a GPT-2"),
        ("ar", ["--validation_data", "x"], "--validation_data is what --quantize measures"),
        ("ar", ["--adapter_only"], "--adapter_only takes one --adapter"),
        ("ar", ["--base", "x"], "--base goes with --adapter_only"),
        ("ar", ["--gguf_type", "q8_0"], "--gguf_type q8_0 goes with --format gguf"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(
    name: str, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkpoint(tmp_path / "a.pt", name), tmp_path / "q", *flags) == 1
    assert message in capsys.readouterr().err
    assert {each.name for each in tmp_path.iterdir()} == {"a.pt"}


def test_without_torchao_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "a.pt", "ar")
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert export(source, tmp_path / "q", "--quantize", "int8") == 1
    assert "--quantize needs torchao: pip install 'minillm-trainer[quant]'" in capsys.readouterr().err


def adapter(folder: Path, source: Path, **changes: Any) -> Path:
    """An adapter with random matrices on every linear layer of a checkpoint."""
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for key, value in open_checkpoint(str(source)).model.state_dict().items():
        if key.endswith("_proj.weight") and "candidates" not in key:
            a, b = (
                torch.randn(2, value.shape[1], generator=generator),
                torch.randn(value.shape[0], 2, generator=generator),
            )
            pairs[key.removesuffix(".weight")] = Pair(a * 0.1, b * 0.1)
    save_adapter(folder, pairs, LoraConfig(2, 4.0), base="", facts={"stage": "lora"}, causal=True)
    return folder


@pytest.mark.parametrize(
    "name", ["ar", *(pytest.param(each, marks=pytest.mark.slow) for each in ("qwen2", "sdd", "diffusion-moe"))]
)
def test_an_adapter_alone_gives_peft_the_logits_of_the_merged_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    source = checkpoint(tmp_path / "a.pt", name)
    folder = adapter(tmp_path / "lora", source)
    own = Tokenizer.load()
    Tokenizer(own.json_text, CLASSIC_TEMPLATE).save(folder)  # it was trained with another template than the base
    flags = ["--adapter", str(folder), "--adapter_only", "--base", "someone/base"]
    assert export(source, tmp_path / "alone", *flags) == 0
    assert "checked: peft" in capsys.readouterr().err
    assert export(source, tmp_path / "base", "--no_check") == 0
    assert export(source, tmp_path / "merged", "--adapter", str(folder), "--no_check") == 0
    kind, tokens = auto_class(open_checkpoint(str(source))), torch.arange(20, 30)[None]
    merged = load(tmp_path / "merged", kind)
    base = load(tmp_path / "base", kind)
    with torch.no_grad():
        plain = base(input_ids=tokens).logits
        laid = PeftModel.from_pretrained(base, str(tmp_path / "alone")).eval()(input_ids=tokens).logits
        expected = merged(input_ids=tokens).logits
    torch.testing.assert_close(laid, expected, atol=1e-4, rtol=1e-4)
    assert float((laid - plain).abs().max()) > 0.01
    values = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "someone/base"
    card = (tmp_path / "alone" / "README.md").read_text()
    assert "base_model: someone/base" in card and "| stage | lora |" in card and "| steps | unknown |" in card
    assert Tokenizer.load(tmp_path / "alone").chat_template == CLASSIC_TEMPLATE
    assert export(source, tmp_path / "alone", *flags, "--no_check") == 0  # an earlier export may be replaced


def test_a_run_folder_is_no_earlier_export_of_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "a.pt", "ar")
    folder = adapter(tmp_path / "lora", source)
    assert export(source, folder, "--adapter", str(folder), "--adapter_only") == 1
    assert "is not an earlier export" in capsys.readouterr().err


def test_an_adapter_for_tensors_that_transformers_does_not_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "a.pt", "ar-moe")
    folder = adapter(tmp_path / "lora", source)
    assert export(source, tmp_path / "alone", "--adapter", str(folder), "--adapter_only") == 1
    assert "leave out --adapter_only, and it is merged" in capsys.readouterr().err


def test_a_quantised_folder_that_is_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minillm.convert import quantize

    whole = quantize.quantize

    def changed(opened: Any, settings: Any, folder: Path) -> None:
        whole(opened, settings, folder)
        opened.model.load_state_dict(random_model(opened.model.config, seed=5).state_dict())

    monkeypatch.setattr(quantize, "quantize", changed)
    assert export(checkpoint(tmp_path / "a.pt", "ar"), tmp_path / "q", "--quantize", "int8") == 1
    assert "the export is refused" in capsys.readouterr().err and not (tmp_path / "q").exists()
