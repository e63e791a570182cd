"""`minillm convert --input_dir --output_dir`: bare weights of any known style become a full checkpoint with the same
logits, what nobody knows is said to be unknown, and the input stays as it is."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import foreign_model, save_tokenizer
from others import earlier_names, minimind, minimind_logits, nanogpt, nanogpt_logits
from tiny import tiny_config
from torch import Tensor

from minillm.checkpoint.format import RESUMED
from minillm.checkpoint.model import OpenedCheckpoint, open_checkpoint
from minillm.cli import main
from minillm.convert import raw
from minillm.convert.recognise import recognise
from minillm.log import UserError
from minillm.models.transformer import LanguageModel
from minillm.text.tokenizer import ASSETS

TOKENS = torch.randint(256, (40,), generator=torch.Generator().manual_seed(2))
GPT_SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48, "vocab_size": 264, "bias": True, "dropout": 0.1}
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where transformers is not installed: its import takes seconds."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "transformers" else find(name, *more)
    )


def convert(source: Path, output: Path, *flags: str) -> int:
    return main(["convert", "--input_dir", str(source), "--output_dir", str(output), *flags])


def converted(source: Path, output: Path, *flags: str) -> OpenedCheckpoint:
    assert convert(source, output, *flags) == 0
    return open_checkpoint(str(output / "best_model.pt"))


def check_logits(opened: OpenedCheckpoint, expected: Tensor) -> None:
    with torch.inference_mode():
        logits = opened.model.logits(opened.model(TOKENS[None]).hidden)[0, :, : expected.shape[1]]
    assert expected.abs().max() > 0.5, "the reference says nothing"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def shipped_tokenizer(folder: Path) -> None:
    shutil.copy(ASSETS / "tokenizer.json", folder)


def save(path: Path, weights: Any, tokenizer: str = "plain") -> Path:
    """The weights in a file, a small tokenizer beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)
    if tokenizer:
        save_tokenizer(path.parent, tokenizer)
    return path


def hashes(folder: Path) -> dict[str, str]:
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in folder.iterdir()}


def said(capsys: Capture) -> str:
    return capsys.readouterr().err


# --- each style ---


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_keeps_its_logits_and_its_step(tmp_path: Path, alone: None, bias: bool) -> None:
    weights = nanogpt(bias=bias)
    compiled = {f"_orig_mod.{name}": value for name, value in weights.items()}
    content = {
        "model": compiled, "model_args": {**GPT_SIZES, "bias": bias},
        "iter_num": 250, "best_val_loss": torch.tensor(3.2), "config": {"learning_rate": 1e-3}, "optimizer": {},
    }  # fmt: skip
    opened = converted(save(tmp_path / "in" / "ckpt.pt", content).parent, tmp_path / "out")
    assert opened.step == 250
    check_logits(opened, nanogpt_logits(weights, TOKENS, heads=4))


def test_an_export_of_openllm_with_its_table_of_who_sees_whom_keeps_its_logits(tmp_path: Path, alone: None) -> None:
    weights = nanogpt()
    table = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 48, 48).tril() for layer in range(2)}
    save(tmp_path / "in" / "pytorch_model.bin", {**weights, **table})
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": "gpt", **GPT_SIZES}))
    opened = converted(tmp_path / "in", tmp_path / "out", "--training-steps", "10000")
    assert opened.step == 10000
    check_logits(opened, nanogpt_logits(weights, TOKENS, heads=4))


def test_heads_of_64_are_assumed_for_nanogpt_without_a_configuration(
    tmp_path: Path, alone: None, capsys: Capture
) -> None:
    weights = nanogpt(width=128)
    opened = converted(save(tmp_path / "ckpt.pt", weights), tmp_path / "out")
    assert "assumed: heads of 64" in said(capsys)
    check_logits(opened, nanogpt_logits(weights, TOKENS, heads=2))
    assert convert(save(tmp_path / "narrow.pt", nanogpt()), tmp_path / "out2") == 1
    assert "give --num_attention_heads" in said(capsys)


OLD = {"key_value_heads": 2, "inner": 256, "normed": False}
MINIMIND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "MiniMind-3": ({}, {"theta": 1e6, "eps": 1e-6}),
    "MiniMind-3 with experts": ({"experts": 4}, {"theta": 1e6, "eps": 1e-6, "chosen": 1}),
    "April 2025": (OLD, {"theta": 1e6, "eps": 1e-5}),
    "February 2025": (OLD, {"theta": 1e6, "eps": 1e-5, "neighbours": True}),
    "2024": ({**OLD, "heads": 16, "key_value_heads": 8}, {"theta": 1e4, "eps": 1e-5, "neighbours": True}),
}


@pytest.mark.parametrize("name", MINIMIND)
def test_weights_of_minimind_alone_are_read_as_it_reads_them_and_what_is_assumed_is_said(
    name: str, tmp_path: Path, alone: None, capsys: Capture
) -> None:
    sizes, arithmetic = MINIMIND[name]
    weights = minimind(**sizes)
    named = earlier_names(weights) if arithmetic.get("neighbours") else weights
    save(tmp_path / "pretrain_96.pth", {f"module.{key}": value for key, value in named.items()}, tokenizer="")
    shipped_tokenizer(tmp_path)
    opened = converted(tmp_path / "pretrain_96.pth", tmp_path / "out")
    check_logits(opened, minimind_logits(weights, TOKENS, heads=sizes.get("heads", 8), **arithmetic))
    told = said(capsys)
    assert f"rope_theta {arithmetic['theta']}" in told.split("assumed")[1] and "MiniMind" in told
    assert (opened.stage, opened.architecture) == ("pretrain", "ar")


def test_a_configuration_of_minimind_counts_more_than_what_it_usually_has(tmp_path: Path, alone: None) -> None:
    weights = earlier_names(minimind(**OLD, heads=4, vocabulary=264))  # type: ignore[arg-type]
    save(tmp_path / "in" / "pretrain_96_resume.pth", {"model": weights, "epoch": 1, "step": 7, "world_size": 1})
    config = {"model_type": "minimind", "dim": 96, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-3,
              "rope_theta": 500.0, "max_seq_len": 64, "vocab_size": 264}  # fmt: skip
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    opened = converted(tmp_path / "in", tmp_path / "out")
    assert opened.step is None  # theirs counts the batches of an epoch
    later = minimind(**OLD, heads=4, vocabulary=264)  # type: ignore[arg-type]
    check_logits(opened, minimind_logits(later, TOKENS, heads=4, theta=500.0, eps=1e-3, neighbours=True))


@pytest.mark.parametrize("kind", ["qwen3-moe", "gpt2", "llama", "qwen2", "qwen3", "mistral-window"])
def test_weights_of_transformers_are_compared_with_transformers(kind: str, tmp_path: Path, capsys: Capture) -> None:
    model = foreign_model(kind)
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}  # experts in one tensor, as here
    path = save(tmp_path / "in" / "pytorch_model.bin", weights)
    (path.parent / "config.json").write_text(json.dumps(model.config.to_dict()))
    opened = converted(path.parent, tmp_path / "out")
    assert f"{type(model).__name__} of transformers" in said(capsys)
    with torch.inference_mode():
        check_logits(opened, model(TOKENS[None]).logits[0])


def test_a_llama_without_a_configuration_needs_what_the_shapes_do_not_tell(
    tmp_path: Path, alone: None, capsys: Capture
) -> None:
    weights = minimind(vocabulary=264, normed=False)
    path = save(tmp_path / "in" / "model.pth", {key.removeprefix("model."): value for key, value in weights.items()})
    assert convert(path, tmp_path / "out") == 1
    assert "nothing tells num_attention_heads" in said(capsys)
    heads = ["--num_attention_heads", "8"]
    assert convert(path, tmp_path / "out", *heads) == 1
    assert "give --rope_theta" in said(capsys)
    opened = converted(path, tmp_path / "out", *heads, "--rope_theta", "5e5", "--rms_norm_eps", "1e-4")
    check_logits(opened, minimind_logits(weights, TOKENS, heads=8, theta=5e5, eps=1e-4))
    assert "by --rope_theta: rope_theta 500000.0" in said(capsys)


GUESSES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "ours": ({"vocabulary": 6400, "inner": 384}, "MiniLLM", {"rope_theta": 1e4, "rms_norm_eps": 1e-6}),
    "ours with experts": ({"vocabulary": 6400, "inner": 192, "experts": 8}, "MiniLLM", {"num_experts_per_tok": 2}),
    "Qwen3": ({"vocabulary": 151936}, "Qwen3", {"rope_theta": 1e6, "max_position_embeddings": 32768}),
    "Qwen3-MoE": ({"vocabulary": 151936, "experts": 4}, "Qwen3", {"num_experts_per_tok": 8, "norm_topk_prob": True}),
}


@pytest.mark.parametrize("name", GUESSES)
def test_whose_weights_they_are_is_told_by_their_sizes(name: str) -> None:
    sizes, style, values = GUESSES[name]
    with torch.device("meta"):
        weights = {key: torch.empty(value.shape) for key, value in minimind(**{"vocabulary": 9, **sizes}).items()}
        weights["model.embed_tokens.weight"] = torch.empty(sizes["vocabulary"], 96)
    del weights["lm_head.weight"]
    found = recognise(weights, None, {}, "file")
    assert found.style == style and found.own_tokens == (style == "MiniLLM")
    assert {field: found.config[field] for field in values} == values


def test_weights_of_qwen2_tell_all_but_their_heads() -> None:
    weights = minimind(vocabulary=300, normed=False)
    weights |= {key.replace("weight", "bias"): value[:, 0] for key, value in weights.items() if key[-13] in "qkv"}
    with pytest.raises(UserError, match="give --num_attention_heads"):
        recognise(weights, None, {}, "file")
    found = recognise(weights, None, {"num_attention_heads": 8}, "file")
    assert (found.config["model_type"], found.config["rope_theta"], found.config["head_dim"]) == ("qwen2", 1e6, 12)


def test_our_own_weights_are_known_by_their_widths(tmp_path: Path, alone: None, capsys: Capture) -> None:
    config = tiny_config(vocab_size=264, hidden_size=32, intermediate_size=128, head_dim=8, tie_word_embeddings=False)
    model = LanguageModel(config).eval()
    model.init_weights(0)
    opened = converted(save(tmp_path / "weights.pth", model.state_dict()), tmp_path / "out")
    assert "assumed: what MiniLLM has: rope_theta 10000.0" in said(capsys)
    tokens = TOKENS[None]
    assert torch.equal(opened.model(tokens).hidden, model(tokens).hidden)


def test_flat_weights_of_a_run_find_its_configuration_and_tokenizer(tmp_path: Path, alone: None) -> None:
    config = tiny_config(vocab_size=264, rope_theta=77.0, causal=False)
    run = tmp_path / "diffusion_pretrain_16"
    save(tmp_path / "diffusion_pretrain_16.pth", LanguageModel(config).state_dict(), tokenizer="")
    assert convert(tmp_path / "diffusion_pretrain_16.pth", tmp_path / "out") == 1  # nothing tells
    run.mkdir()
    from minillm.text.imported import import_tokenizer

    save_tokenizer(tmp_path / "small", "plain")
    found = import_tokenizer(tmp_path / "small", 264, {})
    assert found is not None
    found.tokenizer.save(run)
    values = {"minillm": config.to_dict(), "minillm_family": {"architecture": "diffusion"}}
    (run / "config.json").write_text(json.dumps(values))
    opened = converted(tmp_path / "diffusion_pretrain_16.pth", tmp_path / "out")
    assert (opened.architecture, opened.model.config) == ("diffusion", config)


# --- files, tokenizers ---


def test_shards_are_put_together(tmp_path: Path, alone: None) -> None:
    from safetensors.torch import save_file

    weights = nanogpt()
    del weights["lm_head.weight"]
    folder = tmp_path / "in"
    save_tokenizer(folder, "plain")
    names, shards = sorted(weights), {}
    for number, part in enumerate((names[:5], names[5:])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, str(folder / file))
        shards |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "config.json").write_text(json.dumps(GPT_SIZES))
    check_logits(converted(folder, tmp_path / "out"), nanogpt_logits(nanogpt(), TOKENS, heads=4))
    (folder / file).unlink()
    assert convert(folder, tmp_path / "out2") == 1


def test_of_several_files_one_has_to_be_named(tmp_path: Path, alone: None, capsys: Capture) -> None:
    for name in ("a.pth", "b.pth"):
        save(tmp_path / "in" / name, {"model": nanogpt(), "model_args": GPT_SIZES})
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert "several files with weights (a.pth, b.pth)" in said(capsys)
    assert convert(tmp_path / "in" / "a.pth", tmp_path / "out") == 0


def test_the_shipped_tokenizer_is_taken_only_where_it_may_be_theirs(
    tmp_path: Path, alone: None, capsys: Capture
) -> None:
    own = LanguageModel(tiny_config(vocab_size=6400, hidden_size=32, intermediate_size=128, head_dim=8))
    save(tmp_path / "own.pth", own.state_dict(), tokenizer="")
    save(tmp_path / "theirs.pth", minimind(), tokenizer="")
    assert convert(tmp_path / "own.pth", tmp_path / "out") == 0
    assert "the shipped one, with as many entries, is assumed" in said(capsys)
    assert convert(tmp_path / "theirs.pth", tmp_path / "out2") == 1  # as many entries, which mean something else
    assert "name theirs with --tokenizer" in said(capsys)
    assert convert(tmp_path / "theirs.pth", tmp_path / "out2", "--tokenizer", str(tmp_path / "nowhere")) == 1
    assert "name a folder with tokenizer.json" in said(capsys)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path, alone: None, capsys: Capture) -> None:
    content = {"model": nanogpt(vocabulary=200), "model_args": {**GPT_SIZES, "vocab_size": 200}}
    assert convert(save(tmp_path / "ckpt.pt", content), tmp_path / "out") == 1
    assert "262 entries with its control tokens, the weights have a vocabulary of 200" in said(capsys)
    shipped_tokenizer(tmp_path)
    assert convert(tmp_path / "ckpt.pt", tmp_path / "out") == 1
    assert "6400 entries with its control tokens, the weights have a vocabulary of 200" in said(capsys)


def test_a_sentencepiece_tokenizer_of_another_program_travels_with_its_ids(tmp_path: Path, alone: None) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    lines = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").splitlines()
    model = tmp_path / "in" / "tokenizer.model"
    model.parent.mkdir()
    with model.open("wb") as file:  # as OpenLLM trains it: no bytes, a space before every text, repeated ones dropped
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, model_type="bpe", vocab_size=500, num_threads=1,
            normalization_rule_name="identity", pad_id=0, unk_id=1, bos_id=2, eos_id=3, minloglevel=2,
        )  # fmt: skip
    (tmp_path / "in" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "SentencePieceTokenizer", "eos_token": "</s>", "bos_token": "<s>"})
    )
    sizes = {**GPT_SIZES, "vocab_size": 500}
    save(tmp_path / "in" / "pytorch_model.bin", nanogpt(vocabulary=500), tokenizer="")
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": "gpt", **sizes}))
    opened = converted(tmp_path / "in", tmp_path / "out")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for line in (*lines, " two  spaces ", "unheard-of: \u4ece\u524d"):
        assert opened.tokenizer.encode(line) == theirs.encode(line)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()
    assert opened.tokenizer.roles.end_of_text == "</s>" and opened.model.config.vocab_size > 500


# --- what is written ---

WRITTEN = {
    "best_model.pt", "best_model.pt.sha256", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "training_config.json", "training_log.json", "README.md",
}  # fmt: skip


def small_checkpoint(tmp_path: Path) -> Path:
    content = {"state_dict": nanogpt(), "config": GPT_SIZES}
    return save(tmp_path / "in" / "weights.pth", content)


def test_the_input_stays_as_it_is_and_the_output_is_whole(tmp_path: Path, alone: None, capsys: Capture) -> None:
    source = small_checkpoint(tmp_path)
    before = hashes(source.parent)
    assert convert(source, tmp_path / "out") == 0
    assert hashes(source.parent) == before
    assert {each.name for each in (tmp_path / "out").iterdir()} == WRITTEN
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in", "out"]  # nothing left beside
    told = said(capsys)
    assert "before: " in told and "after:  " in told and " MB" in told
    assert "those of the model in memory, before it was written (transformers is not installed)" in told


def test_what_is_unknown_is_said_to_be_unknown_and_no_number_is_made_up(tmp_path: Path, alone: None) -> None:
    assert convert(small_checkpoint(tmp_path), tmp_path / "out") == 0
    (entry,) = json.loads((tmp_path / "out" / "training_log.json").read_text())
    assert entry.pop("note").startswith("unknown") and set(entry.values()) == {None}
    settings = json.loads((tmp_path / "out" / "training_config.json").read_text())
    assert settings["unknown"] == "every setting of the training" and settings["total_steps"] is None
    assert "unknown" in (tmp_path / "out" / "README.md").read_text()
    content = torch.load(tmp_path / "out" / "best_model.pt", weights_only=True)
    assert {"optimizer_state_dict", "best_loss", "training_log", "global_step"} <= set(content["unknown"])
    assert not any(content[key] for key in content["unknown"])


def test_the_format_is_that_of_a_training_without_what_a_run_is_resumed_from(tmp_path: Path, alone: None) -> None:
    assert convert(small_checkpoint(tmp_path), tmp_path / "out") == 0
    content = torch.load(tmp_path / "out" / "best_model.pt", weights_only=True)
    assert set(RESUMED) - set(content) == {"progress"}
    assert all(isinstance(content[name], kind) for name, kind in RESUMED.items() if name != "progress")
    assert {"step", "config", "best_loss", "best_validation_loss", "training_stats", "parent"} <= set(content)


def test_training_generation_and_evaluation_take_the_output(tmp_path: Path, alone: None, demo_data: Path) -> None:
    out, checkpoint = tmp_path / "out", str(tmp_path / "out" / "best_model.pt")
    assert convert(small_checkpoint(tmp_path), out) == 0
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": "a small text " * 8}) for _ in range(8)))
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    chats.write_text("\n".join(json.dumps({"conversations": turns}) for _ in range(8)))
    small = ["--max_seq_len", "48", "--batch_size", "2", "--max_steps", "1", "--no_wandb", "--device", "cpu"]
    runs = ["--pretrained_path", checkpoint, "--out_dir", str(tmp_path / "runs"), *small]
    assert main(["sft", "--data_path", str(chats), *runs]) == 0
    assert main(["generate", "--checkpoint", checkpoint, "--prompt", "a", "--max_new_tokens", "2"]) == 0
    evaluated = ["--checkpoint", checkpoint, "--data_path", str(data), "--max_seq_len", "48", "--eval_samples", "2"]
    assert main(["evaluate", *evaluated, "--output", str(tmp_path / "report")]) == 0


def test_a_conversion_cannot_be_resumed_and_says_what_to_do(tmp_path: Path, alone: None, capsys: Capture) -> None:
    assert convert(small_checkpoint(tmp_path), tmp_path / "out") == 0
    resumed = ["--resume_from", str(tmp_path / "out" / "best_model.pt"), "--no_wandb", "--out_dir", str(tmp_path)]
    assert main(["pretrain", "--data_path", str(tmp_path / "in"), *resumed]) == 1
    assert "Start from it with --pretrained_path" in said(capsys)


def test_only_an_earlier_conversion_is_replaced(tmp_path: Path, alone: None, capsys: Capture) -> None:
    source, out = small_checkpoint(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("work of years")
    assert convert(source, out) == 1
    assert "exists and is no earlier conversion" in said(capsys)
    (out / "training_config.json").write_text('{"run_name": "a run that trained for days"}')
    assert convert(source, out) == 1
    assert {each.name for each in out.iterdir()} == {"thesis.txt", "training_config.json"}
    again = tmp_path / "again"
    assert convert(source, again) == convert(source, again) == 0
    assert convert(again / "best_model.pt", again) == 1
    assert "holds the input" in said(capsys)
    assert convert(source.parent, source.parent / "out") == 1
    assert "is inside the input" in said(capsys)
    assert convert(again / "best_model.pt", tmp_path / "third") == 1
    assert "is a full checkpoint of MiniLLM already" in said(capsys)


def test_other_logits_than_those_of_the_input_are_an_error_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def theirs(tokens: Tensor, understood: raw.Understood) -> tuple[Tensor, str]:
        return torch.zeros(*tokens.shape, 264), "another program"

    monkeypatch.setattr(raw, "_in_transformers", theirs)
    assert convert(small_checkpoint(tmp_path), tmp_path / "out") == 1
    assert "computes other logits than another program" in said(capsys)
    assert [each.name for each in tmp_path.iterdir()] == ["in"]


# --- what is refused ---


def with_shared_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, "model.layers.0.mlp.shared_experts.0.gate_proj.weight": torch.zeros(320, 96)}


Damage = Callable[[dict[str, Tensor]], dict[str, Tensor]]
REFUSED: dict[str, tuple[Damage, dict[str, Any], list[str], str]] = {
    "shared experts": (with_shared_experts, {}, [], "shared_experts.0.gate_proj.weight belongs to shared experts"),
    "another part": (lambda w: {**w, "model.layers.0.adapter.weight": w["model.norm.weight"]}, {}, [], "have no place"),
    "unknown names": (lambda w: {f"encoder.{k[-9:]}": v for k, v in w.items()}, {}, [], "of no style that is known"),
    "no layers": (lambda w: {k: v for k, v in w.items() if "q_proj" not in k}, {}, [], "of no style that is known"),
    "a missing matrix": (lambda w: {k: v for k, v in w.items() if "1.mlp.up" not in k}, {}, [], "layers.1.mlp.up_proj"),
    "a width that differs": (lambda w: w, {"hidden_size": 100}, [], "hidden_size is 100 by the configuration, 96 by"),
    "a flag that differs": (lambda w: w, {"rope_theta": 1e4}, ["--rope_theta", "1e6"], "leave the flag out"),
    "a flag without a use": (lambda w: w, {}, ["--num_experts_per_tok", "1"], "--num_experts_per_tok means nothing"),
    "a head that is said to be tied": (
        lambda w: {**w, "lm_head.weight": w["lm_head.weight"] + 1}, {"tie_word_embeddings": True}, [],
        "lm_head.weight is not model.embed_tokens.weight",
    ),
    "heads that do not fit": (lambda w: w, {"num_attention_heads": 16}, [], "num_attention_heads is 16"),
    "heads that are no number": (lambda w: w, {"num_attention_heads": "many"}, [], "num_attention_heads is many"),
    "no heads": (lambda w: {k: v for k, v in w.items() if "_norm" not in k}, {"num_attention_heads": 0}, [],
                 "is 0 by the configuration: it must be a positive whole number"),
    "three dimensions": (
        lambda w: {k: v[None] if "gate_proj" in k else v for k, v in w.items()}, {}, [],
        "should be a vector or a matrix",
    ),
    "a stretched rotary embedding": (lambda w: w, {"inference_rope_scaling": True}, [], "YaRN"),
    "quantised weights": (lambda w: {k: v.to(torch.int8) for k, v in w.items()}, {}, [], "quantised"),
    "values that are not finite": (
        lambda w: {**w, "model.norm.weight": w["model.norm.weight"] / 0}, {}, [], "NaN or infinite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_rightly_is_refused_by_name(
    name: str, tmp_path: Path, alone: None, capsys: Capture
) -> None:
    damage, config, flags, message = REFUSED[name]
    path = save(tmp_path / "in" / "pretrain.pth", damage(minimind(vocabulary=264)))
    (path.parent / "config.json").write_text(json.dumps({"model_type": "minimind", **config}))
    assert convert(path, tmp_path / "out", *flags) == 1
    assert message in said(capsys)
    assert [each.name for each in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say what to convert"),
        (["--input_dir", "a", "--checkpoint", "b.pt"], "belong to raw weights"),
        (["--input_dir", "a", "--output_dir", "b", "--to", "sdd"], "--to to another family"),
        (["--input_dir", "a"], "--output_dir is required"),
        (["--checkpoint", "a.pt", "--to", "sdd"], "--output is required"),
    ],
)
def test_the_two_journeys_do_not_mix(flags: list[str], message: str, capsys: Capture) -> None:
    assert main(["convert", *flags]) == 2
    assert message in said(capsys)


def test_loading_weights_that_stand_alone_says_once_what_is_assumed(tmp_path: Path, capsys: Capture) -> None:
    model = LanguageModel(tiny_config(vocab_size=6400, use_moe=True))
    torch.save(model.state_dict(), tmp_path / "pretrain_16_moe.pth")
    open_checkpoint(str(tmp_path / "pretrain_16_moe.pth"))
    (warning,) = [line for line in said(capsys).splitlines() if line.startswith("warning")]
    assert "rotary base of 10000" in warning and "2 experts a token" in warning and "minillm convert" in warning
