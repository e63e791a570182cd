"""What is exported does in transformers what it does here, for every family; and what does not is refused."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_model, saved, tiny_config

from minillm.checkpoint.model import OpenedCheckpoint, open_checkpoint
from minillm.cli import main
from minillm.convert.huggingface import REMOTE_CODE
from minillm.families import saved_family
from minillm.families.base import Sampling
from minillm.models.candidates import Candidates

SIZES = {"vocab_size": 6400, "hidden_size": 32, "head_dim": 8}
AGGREGATE = {"denoiser": "aggregate", "k_schedule": [1, 3]}
BILATERAL = {"denoiser": "bilateral", "k_schedule": [3]}
# name: (family, its settings, model)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ar": ("ar", {}, {}),
    "ar-moe": ("ar", {}, {"use_moe": True}),
    "ar-untied": ("ar", {}, {"tie_word_embeddings": False}),
    "llama": ("ar", {}, {"model_type": "llama", "qk_norm": False}),
    "qwen2": ("ar", {}, {"model_type": "qwen2", "qk_norm": False, "qkv_bias": True}),
    "gpt2": ("ar", {}, {"model_type": "gpt2", "qk_norm": False, "qkv_bias": True, "num_key_value_heads": 4}),
    "diffusion": ("diffusion", {}, {"tie_word_embeddings": False}),
    "diffusion-moe": ("diffusion", {}, {"use_moe": True}),
    "diffusion-llama": ("diffusion", {}, {"qk_norm": False, "qkv_bias": True}),
    "diffusion-blocks": ("diffusion", {"diffusion_block": 4}, {}),
    "sdd": ("sdd", AGGREGATE, {}),
    "sdd-moe": ("sdd", AGGREGATE, {"use_moe": True}),
    "sdd-bilateral": ("sdd", BILATERAL, {}),
    "sdd-bilateral-moe": ("sdd", BILATERAL, {"use_moe": True}),
}
SLOW = {"ar-untied", "qwen2", "diffusion-llama", "sdd-bilateral-moe"}
EACH = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]
OTHERS = [name for name, (family, _, _) in MODELS.items() if family != "ar"]
HOW_TO_WRITE: list[dict[str, Any]] = [
    {},
    {"block_length": 0, "steps": 5},
    {"block_length": 5, "threshold": 0.2},
    {"block_length": 6, "temperature": 0.9, "seed": 3},
]
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "gpt2": "GPT2LMHeadModel",
           "ar": "Qwen3ForCausalLM", "ar-moe": "Qwen3MoeForCausalLM", "ar-untied": "Qwen3ForCausalLM"}  # fmt: skip


def checkpoint(path: Path, name: str, **changes: Any) -> Path:
    family, settings, parts = MODELS[name]
    denoiser = {"denoiser": settings["denoiser"]} if family == "sdd" else {}
    config = tiny_config(**SIZES, **denoiser, **{**parts, **changes}, causal=family == "ar")
    model = random_model(config, scale=0.3)
    return saved(
        path, model, stage="full_sft", architecture=family, family={"architecture": family, **settings}, global_step=7
    )


def export(source: Path, output: Path, *flags: str) -> int:
    return main(["export", "--checkpoint", str(source), "--output", str(output), *flags])


def load(folder: Path, auto_class: str = "AutoModelForMaskedLM") -> Any:
    import transformers

    remote = auto_class == "AutoModelForMaskedLM"
    return getattr(transformers, auto_class).from_pretrained(str(folder), trust_remote_code=remote).eval()


def our_logits(opened: OpenedCheckpoint, tokens: torch.Tensor) -> torch.Tensor:
    inputs: torch.Tensor | Candidates = tokens
    if opened.model.config.denoiser:
        inputs = Candidates.known(tokens, opened.family["k_schedule"][-1])
    with torch.no_grad():
        return opened.model.logits(opened.model(inputs).hidden)


@pytest.mark.parametrize("name", EACH)
def test_transformers_computes_the_same_logits(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "a.pt", name)
    assert export(source, tmp_path / "hf") == 0
    said = capsys.readouterr().err
    assert re.search(r"reads 4 prompts into the same ids and gives the same \d\d greedily written tokens", said)
    model = load(tmp_path / "hf", "AutoModelForCausalLM" if name in CLASSES else "AutoModelForMaskedLM")
    assert type(model).__name__ == CLASSES.get(name, "MiniLLMForMaskedLM")
    tokens = torch.arange(10, 50).view(2, 20)
    with torch.no_grad():
        theirs = model(input_ids=tokens).logits
    ours = our_logits(open_checkpoint(str(source)), tokens)
    largest = float(ours.abs().max())  # 8 to 11: float32 keeps six digits of it
    assert float((theirs - ours).abs().max()) < 3e-6 * largest


@pytest.mark.parametrize("name", OTHERS)
def test_generate_of_the_shipped_code_writes_what_ours_writes(
    name: str, exported: dict[str, tuple[Path, Path]]
) -> None:
    source, folder = exported[name]
    opened, model = open_checkpoint(str(source)), load(folder)
    family, pad = saved_family(opened.family, opened.tokenizer), model.config.pad_token_id
    prompts = [[300, 301, 302, 303, 304], [777, 778, 779]]
    padded = torch.tensor([prompts[0], [0, 0, *prompts[1]]])
    stops = (opened.tokenizer.end_of_text_id, opened.tokenizer.end_of_turn_id)
    different = set()
    for how in HOW_TO_WRITE:
        settings = {"max_new_tokens": 13, "temperature": 0.0, "block_length": 32, "stop_ids": stops, **how}
        ours = family.generate(opened.model, prompts, Sampling(**settings))
        written = model.generate(padded, attention_mask=padded > 0, max_new_tokens=13, **how)[:, 5:]
        assert [[token for token in row if token != pad] for row in written.tolist()] == ours, how
        different |= {token for row in ours for token in row}
    assert len(different) > 10  # it is no single token over and over


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(checkpoint, folder) of every model that needs the shipped code."""
    found = {}
    for name in OTHERS:
        folder = tmp_path_factory.mktemp(name)
        source = checkpoint(folder / "a.pt", name)
        assert export(source, folder / "hf", "--no_check") == 0
        found[name] = (source, folder / "hf")
    return found


def test_padding_changes_no_logits_in_the_shipped_code(exported: dict[str, tuple[Path, Path]]) -> None:
    for name in ("diffusion", "sdd"):
        model, tokens = load(exported[name][1]), torch.arange(40, 47)[None]
        padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), tokens), dim=1)
        with torch.no_grad():
            alone = model(tokens).logits
            beside = model(padded, attention_mask=(padded > 0).long()).logits[:, 3:]
        torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-5)


def test_the_shipped_code_needs_torch_and_transformers_only() -> None:
    found = set()
    for node in ast.walk(ast.parse(REMOTE_CODE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    assert found <= {"__future__", "collections", "typing", "torch", "transformers"}


@pytest.mark.slow
def test_a_program_without_minillm_loads_the_folder(exported: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    program = f"""
import sys
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
folder = {str(exported["sdd"][1])!r}
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer("Once upon", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=4)
assert tokens.shape[1] > prompt["input_ids"].shape[1] and not any(name.startswith("minillm") for name in sys.modules)
AutoModel.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForMaskedLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
assert again.generate(**prompt, max_new_tokens=4).tolist() == tokens.tolist()
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def tamper(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let every folder be changed after it was written and before it is checked."""
    from minillm.convert import huggingface

    write = huggingface.write_model

    def changed(opened: OpenedCheckpoint, folder: Path) -> None:
        write(opened, folder)
        change(folder)

    monkeypatch.setattr(huggingface, "write_model", changed)


def change_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def scramble_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= -3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lose_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(folder: Path, file: str, **changes: Any) -> None:
    values = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**values, **changes}), encoding="utf-8")


def change_template(folder: Path) -> None:
    edit_json(folder, "tokenizer_config.json", chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")


def change_tokenizer(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    values["model"]["merges"] = values["model"]["merges"][:50]
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ar", change_weight, "an English text"),
        ("sdd", change_weight, "an English text"),
        ("ar", scramble_weight, "writes something else after an English text: token"),
        ("sdd", scramble_weight, "writes something else after an English text: token"),
        ("ar", lose_weight, "reports missing keys: model.layers.1.mlp.down_proj.weight"),
        ("sdd", lose_weight, "reports missing keys: model.layers.1.mlp.down_proj.weight"),
        ("ar", change_template, "reads an English conversation otherwise: token"),
        ("ar", change_tokenizer, "reads an English text otherwise: token"),
    ],
)
def test_an_artefact_that_differs_is_refused_and_the_earlier_one_stays(
    name: str,
    change: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = checkpoint(tmp_path / "a.pt", name)
    assert export(source, tmp_path / "hf", "--no_check") == 0
    before = {each.name: each.read_bytes() for each in (tmp_path / "hf").iterdir()}
    tamper(monkeypatch, change)
    assert export(source, tmp_path / "hf") == 1
    said = capsys.readouterr().err
    assert "the export is refused, nothing was written: transformers" in said and message in said
    assert {each.name: each.read_bytes() for each in (tmp_path / "hf").iterdir()} == before
    assert {each.name for each in tmp_path.iterdir()} == {"a.pt", "hf"}


def test_a_mismatch_says_position_both_tokens_and_the_largest_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper(monkeypatch, scramble_weight)
    assert export(checkpoint(tmp_path / "a.pt", "ar"), tmp_path / "hf") == 1
    said = capsys.readouterr().err
    found = [word for word in said.replace(",", " ").replace(";", " ").split() if word.isdigit()]
    assert len(found) >= 3 and "expected" in said and "the largest difference of logits on the prompt is" in said
    assert not (tmp_path / "hf").exists()


def test_weights_above_the_limit_are_cut_into_files_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minillm.convert.huggingface.SHARD_BYTES", 10_000)
    source = checkpoint(tmp_path / "a.pt", "ar")
    assert export(source, tmp_path / "hf") == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    weights = open_checkpoint(str(source)).model.state_dict()
    files = sorted(each.name for each in (tmp_path / "hf").glob("model-*.safetensors"))
    assert index["weight_map"].keys() == weights.keys() and sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    assert index["metadata"]["total_size"] == sum(each.numel() * 4 for each in weights.values())
    assert not (tmp_path / "hf" / "model.safetensors").exists()
    for name in files[1:]:  # the first holds the embedding, which is larger alone
        assert (tmp_path / "hf" / name).stat().st_size < 12_000
    again = open_checkpoint(str(tmp_path / "hf")).model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in weights.items())
    assert export(source, tmp_path / "hf") == 0  # it is known as an earlier export


def test_without_transformers_only_an_export_that_says_unchecked_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "a.pt", "ar")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert export(source, tmp_path / "hf") == 1
    said = capsys.readouterr().err
    assert "transformers is not installed" in said and "--no_check" in said and not (tmp_path / "hf").exists()
    assert export(source, tmp_path / "hf", "--no_check") == 0
    assert "is not checked" in capsys.readouterr().err
    assert "| checked | no:" in (tmp_path / "hf" / "README.md").read_text()


def test_the_card_says_what_it_is_and_that_it_was_checked(tmp_path: Path) -> None:
    import yaml

    for name, words in {"ar": "Qwen3", "sdd": "trust_remote_code=True"}.items():
        assert export(checkpoint(tmp_path / f"{name}.pt", name), tmp_path / name) == 0
        _, head, body = (tmp_path / name / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        assert yaml.safe_load(head)["library_name"] == "transformers"
        assert "| checked | transformers" in body and words in body and "| steps | 7 |" in body


def test_a_reward_model_judges_the_same_and_a_changed_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "a.pt", "ar", value_head=True)
    assert export(source, tmp_path / "hf") == 0
    assert "the same judgements" in capsys.readouterr().err
    tamper(monkeypatch, scramble_weight)
    assert export(source, tmp_path / "other") == 1
    assert "judges an English text" in capsys.readouterr().err


def test_a_model_that_the_shipped_code_cannot_hold_is_refused_by_the_name_of_its_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(checkpoint(tmp_path / "a.pt", "diffusion", value_head=True), tmp_path / "hf") == 1
    assert "a diffusion model with value_head True cannot be exported" in capsys.readouterr().err
