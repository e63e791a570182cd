"""LoRA: a small adapter is trained, the weights stay; what it says is what peft says, in files and in numbers."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BOTH, DENSE, MOE, random_model, tiny_config
from torch import Tensor
from training import TINY, equal, load, without_times

from minillm.checkpoint.adapter import fingerprint, read_adapter, save_adapter, weighted_paths
from minillm.checkpoint.files import extract_weights, read_tensors
from minillm.checkpoint.model import open_checkpoint
from minillm.cli import main
from minillm.log import UserError
from minillm.models.config import LINEAR_LAYERS, ModelConfig
from minillm.models.heads import token_log_probs, weighted_cross_entropy
from minillm.models.lora import (
    AdaptedLinear,
    LoraConfig,
    Pair,
    activate,
    adapted_layers,
    adapter_size,
    add_adapter,
    base_of,
    folded,
    lay_adapter,
    merge,
    pairs_of,
    unmerge,
    without_adapters,
)
from minillm.models.transformer import LanguageModel, count_parameters, flops_per_token

CONFIG = LoraConfig(rank=3, alpha=6.0)
TOKENS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
LARGE = tiny_config(vocab_size=6400, hidden_size=32, head_dim=8, intermediate_size=48)
LARGE_MOE = replace(LARGE, use_moe=True, moe_intermediate_size=24)
BILATERAL = replace(DENSE, causal=False, denoiser="bilateral")


def fill(model: LanguageModel, seed: int = 5, name: str = "default") -> None:
    """Give B values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_B[name].normal_(std=0.1, generator=generator)


def adapted(config: ModelConfig, lora: LoraConfig = CONFIG) -> LanguageModel:
    """A random model with an adapter that says something."""
    model = random_model(config)
    add_adapter(model, lora, seed=0)
    fill(model)
    return model


def logits(model: LanguageModel, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model.logits(model(tokens).hidden)


def loss_of(model: LanguageModel, tokens: Tensor = TOKENS) -> Tensor:
    weights = torch.full(tokens.shape, 1.0 / tokens.numel())
    return weighted_cross_entropy(model(tokens).hidden, model.head_weight, tokens.roll(-1, 1), weights).loss


@BOTH
def test_a_new_adapter_changes_nothing(config: ModelConfig) -> None:
    plain, model = random_model(config), random_model(config)
    add_adapter(model, CONFIG, seed=0)
    assert torch.equal(logits(plain), logits(model))
    names = {key.rsplit(".", 1)[0] for key in plain.state_dict() if key.split(".")[-2] in LINEAR_LAYERS}
    assert {path for path, _ in adapted_layers(model)} == names


def test_a_begins_as_the_seed_and_the_layer_say() -> None:
    values = []
    for seed, targets in ((0, LINEAR_LAYERS), (0, ("up_proj",)), (1, LINEAR_LAYERS)):
        model = random_model(DENSE)
        add_adapter(model, LoraConfig(4, 8.0, targets), seed)
        values.append(pairs_of(model.state_dict())["model.layers.1.mlp.up_proj"].a)
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert values[0].abs().max() <= 1 / 16**0.5 and values[0].std() == pytest.approx(1 / (3 * 16) ** 0.5, rel=0.2)


@BOTH
@pytest.mark.parametrize("method", ["sft", "score"])
def test_gradients_follow_from_those_of_the_whole_weights(config: ModelConfig, method: str) -> None:
    """For W + s B A the chain rule gives dA = s B^T dW and dB = s dW A^T; nothing frozen gets a gradient."""

    def backward(model: LanguageModel) -> None:
        if method == "sft":
            loss_of(model).backward()
        else:
            mask = torch.ones_like(TOKENS, dtype=torch.bool)
            token_log_probs(model(TOKENS).hidden, model.head_weight, TOKENS, mask).mean().backward()

    model = adapted(config)
    whole = LanguageModel(config)
    pairs = pairs_of(model.state_dict())
    whole.load_state_dict(folded(without_adapters(model.state_dict()), pairs, CONFIG.scale))
    backward(model)
    backward(whole.eval())
    for path, layer in adapted_layers(model):
        slope = whole.get_submodule(path).weight.grad
        assert slope is not None and (slope.abs().max() > 0 or ".experts." in path)  # some get no token
        a, b = pairs[path]
        torch.testing.assert_close(layer.lora_A["default"].grad, CONFIG.scale * b.T @ slope, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.lora_B["default"].grad, CONFIG.scale * slope @ a.T, atol=1e-5, rtol=1e-4)
    for key, parameter in model.named_parameters():
        assert (".lora_" in key) == parameter.requires_grad == (parameter.grad is not None), key


def test_the_hand_written_gradient_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    layer = AdaptedLinear(torch.nn.Linear(7, 5, bias=False)).requires_grad_(False)
    layer.add("default", Pair(torch.randn(2, 7), torch.randn(5, 2)), 0.7)
    layer.active = {"default": 1.0}
    for shape in ((3, 4, 7), (6, 7), (0, 7)):
        x = torch.randn(shape, requires_grad=True)
        results = []
        for hand in (True, False):
            layer.weight.requires_grad_(not hand)  # a weight that is trained takes the plain way
            inputs = (x, layer.lora_A["default"], layer.lora_B["default"])
            out = layer(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("config", [DENSE, MOE, BILATERAL], ids=["dense", "moe", "bilateral"])
def test_merged_says_the_same_and_unmerging_restores_every_bit(config: ModelConfig) -> None:
    model = adapted(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    unmerged = logits(model)
    merge(model)
    merge(model)  # again: no more than once
    assert not torch.equal(model.state_dict()["model.layers.0.self_attn.q_proj.weight"],
                           before["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip
    torch.testing.assert_close(logits(model), unmerged, atol=1e-4, rtol=0)
    unmerge(model)
    assert equal(dict(model.state_dict()), before)
    assert torch.equal(logits(model), unmerged)


def test_several_adapters_are_switched_and_mixed() -> None:
    model = random_model(DENSE)
    weights, plain = dict(model.state_dict()), logits(model)
    sources = {}
    for name, lora in (("one", LoraConfig(2, 4.0)), ("two", LoraConfig(3, 1.0, ("q_proj", "up_proj")))):
        other = random_model(DENSE)
        add_adapter(other, lora, seed=1)
        fill(other, seed=len(name) + lora.rank)
        sources[name] = pairs_of(other.state_dict()), lora.scale
        lay_adapter(model, *sources[name], name)
    assert torch.equal(logits(model), plain)  # laid over it, not yet switched on
    for mix in ({"one": 1.0}, {"two": 1.0}, {"one": 0.7, "two": -0.3}, {"one": 0.0, "two": 1.0}):
        activate(model, mix)
        expected = LanguageModel(DENSE).eval()
        state = weights
        for name, weight in mix.items():
            pairs, scale = sources[name]
            state = folded(state, pairs, scale * weight)
        expected.load_state_dict(state)
        torch.testing.assert_close(logits(model), logits(expected), atol=1e-4, rtol=0)
        merge(model)
        torch.testing.assert_close(logits(model), logits(expected), atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="unmerge them first"):
            activate(model, {"one": 1.0})
        unmerge(model)
    activate(model, {})
    assert torch.equal(logits(model), plain)
    with pytest.raises(ValueError, match="no adapter 'three'; there are one, two"):
        activate(model, {"three": 1.0})
    with pytest.raises(ValueError, match="already"):
        lay_adapter(model, *sources["one"], "one")
    with pytest.raises(ValueError, match=r"no linear layer model\.layers\.9"):
        lay_adapter(model, {"model.layers.9.mlp.up_proj": Pair(torch.ones(1, 1), torch.ones(1, 1))}, 1.0, "x")


@pytest.mark.parametrize("config", [DENSE, MOE, BILATERAL], ids=["dense", "moe", "bilateral"])
def test_the_model_without_its_adapter_is_there_without_a_copy(config: ModelConfig) -> None:
    model = adapted(config)
    base = base_of(model)
    assert torch.equal(logits(base), logits(random_model(config)))
    assert not torch.equal(logits(base), logits(model))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(parameter.data_ptr() in own for parameter in base.parameters())


def test_frozen_weights_cost_less_arithmetic() -> None:
    plain, model = random_model(DENSE), adapted(DENSE)
    added, total = adapter_size(model), count_parameters(plain)
    assert flops_per_token(plain) == 6.0 * total
    assert flops_per_token(model) == pytest.approx(4.0 * total + 6.0 * added)
    assert count_parameters(model) == total + added


# Files, and peft


@pytest.fixture(scope="module")
def peft() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


def saved(model: LanguageModel, path: Path, stage: str = "full_sft", architecture: str = "ar") -> Path:
    """A checkpoint to start from."""
    family = {"architecture": architecture}
    if model.config.denoiser:
        family["denoiser"] = model.config.denoiser
    torch.save({"model_state_dict": model.state_dict(), "model_config": model.config.to_dict(), "stage": stage,
                "architecture": architecture, "family": family, "global_step": 0}, path)  # fmt: skip
    return path


@pytest.mark.parametrize("config", [LARGE, LARGE_MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("targets", [LINEAR_LAYERS, ("q_proj", "v_proj")], ids=["all", "some"])
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_our_adapter_on_our_export(
    config: ModelConfig, targets: tuple[str, ...], peft: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model(config, seed=1, scale=0.15)
    saved(model, tmp_path / "base.pt")
    lora = LoraConfig(3, 6.0, targets)
    add_adapter(model, lora, seed=0)
    fill(model)
    tokens = torch.randint(6400, (2, 12), generator=torch.Generator().manual_seed(1))
    save_adapter(tmp_path / "ours", pairs_of(model.state_dict()), lora, base="", facts={}, causal=True)
    assert main(["export", "--checkpoint", str(tmp_path / "base.pt"), "--output", str(tmp_path / "hf")]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        alone = base(tokens).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours", is_trainable=True).eval()
    with torch.no_grad():
        found = theirs(tokens).logits
    torch.testing.assert_close(found, logits(model, tokens), atol=1e-5, rtol=0)
    assert (found - alone).abs().max() > 0.1
    if config.use_moe:
        return  # peft fuses the matrices of all experts into one
    loss_of(model, tokens).backward()
    torch.nn.functional.cross_entropy(
        theirs(tokens).logits.flatten(0, 1), tokens.roll(-1, 1).flatten()
    ).backward()  # fmt: skip
    theirs_grads = {key: value.grad for key, value in theirs.named_parameters() if value.requires_grad}
    ours_grads = {f"base_model.model.{key.replace('.default', '.default.weight')}": value.grad
                  for key, value in model.named_parameters() if value.requires_grad}  # fmt: skip
    assert theirs_grads.keys() == ours_grads.keys()
    for key, value in ours_grads.items():
        torch.testing.assert_close(value, theirs_grads[key], atol=1e-5, rtol=1e-4, msg=key)

    theirs.save_pretrained(tmp_path / "theirs")
    back = read_adapter(tmp_path / "theirs")
    assert back.scale == lora.scale and back.facts == {} and equal(back.pairs, pairs_of(model.state_dict()))


@pytest.mark.filterwarnings("ignore")
def test_we_load_what_peft_has_trained(peft: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = random_model(LARGE, seed=1, scale=0.15)
    checkpoint = saved(base, tmp_path / "base.pt")
    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "hf")]) == 0
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
        peft.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False, use_rslora=True),
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = torch.randint(6400, (2, 12), generator=torch.Generator().manual_seed(1))
    opened = open_checkpoint(str(checkpoint), adapters=[str(tmp_path / "theirs")])
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(logits(opened.model, tokens), expected, atol=2e-5, rtol=0)
    assert (expected - logits(base, tokens)).abs().max() > 0.1


def written(folder: Path, **changes: Any) -> Path:
    """An adapter in this folder, its configuration with these changes."""
    save_adapter(folder, pairs_of(adapted(DENSE).state_dict()), CONFIG, base="", facts={"stage": "lora"}, causal=True)
    values = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "only 'LORA'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"r": 5}, "is not a matrix of rank 5"),
        ({"r": "many"}, "is not the configuration"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_adapter(written(tmp_path, **changes))


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not match its recorded SHA-256"):
        read_adapter(folder)
    with pytest.raises(UserError, match="there is no adapter in"):
        read_adapter(tmp_path)
    nan = pairs_of(adapted(DENSE).state_dict())
    next(iter(nan.values())).b.fill_(float("nan"))
    save_adapter(tmp_path / "nan", nan, CONFIG, base="", facts={}, causal=True)
    with pytest.raises(UserError, match="NaN"):
        read_adapter(tmp_path / "nan")


def test_paths_may_have_weights(tmp_path: Path) -> None:
    odd = tmp_path / "odd:2"
    odd.mkdir()
    assert weighted_paths(["a", "b:0.5", "c:-1", str(odd), f"{odd}:3", "d:x"]) == [
        (Path("a"), 1.0), (Path("b"), 0.5), (Path("c"), -1.0), (odd, 1.0), (odd, 3.0), (Path("d:x"), 1.0),
    ]  # fmt: skip
    with pytest.raises(UserError, match="nan is no weight"):
        weighted_paths(["a:nan"])


def test_a_fingerprint_is_of_names_and_values() -> None:
    weights = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    same = fingerprint(weights)
    assert fingerprint({"b": torch.ones(2, 2), "a": torch.arange(4.0)}) == same
    assert fingerprint({**weights, "a": torch.arange(4.0) + 1e-6}) != same
    assert fingerprint({"c": weights["a"], "b": weights["b"]}) != same


# Training

RUN = ("--max_steps", "4", "--save_every", "2", "--eval_every", "2", "--max_seq_len", "64", "--warmup_steps", "1")
FAMILIES = {
    "ar": replace(LARGE),
    "diffusion": replace(LARGE, causal=False),
    "sdd": replace(LARGE, causal=False, denoiser="bilateral"),
}


def train(command: str, data: Path, out: Path, base: Path, *flags: str) -> int:
    name = {"lora": "sft", "sft": "sft", "dpo": "dpo", "reward": "dpo"}[command]
    return main([command, "--data_path", str(data / f"{name}.jsonl"), "--validation_data",
                 str(data / f"{name}_val.jsonl"), "--out_dir", str(out), "--pretrained_path", str(base), *TINY, *RUN,
                 *flags])  # fmt: skip


def go_on_elsewhere(folder: Path, out: Path) -> Path:
    """A copy of a finished run's folder as it was after two steps."""
    again = out / folder.name
    shutil.copytree(folder, again)
    for name in ("last.pt", "best_model.pt", "step_000004.pt"):
        (again / name).unlink(missing_ok=True)
    return again


def assert_same_end(one: Path, two: Path) -> None:
    first, second = (without_times(load(folder / "last.pt")) for folder in (one, two))
    for key in ("model_state_dict", "optimizer_state_dict", "training_log", "validation_log", "rng_state", "adapter"):
        assert equal(first[key], second[key]), key


def base_file(architecture: str, experts: bool, folder: Path) -> tuple[LanguageModel, Path]:
    config = replace(FAMILIES[architecture], use_moe=experts, moe_intermediate_size=24)
    model = LanguageModel(config)
    model.init_weights(1)
    return model, saved(model, folder / "base.pt", architecture=architecture)


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_trains_an_adapter_and_nothing_else(
    architecture: str, experts: bool, demo_data: Path, tmp_path: Path
) -> None:
    model, base = base_file(architecture, experts, tmp_path)
    flags = ("--architecture", architecture, "--lora_rank", "2", *(["--use_moe"] if experts else []))
    assert train("lora", demo_data, tmp_path / "one", base, *flags) == 0
    prefix = "" if architecture == "ar" else f"{architecture}_"
    folder = tmp_path / "one" / f"{prefix}lora_32{'_moe' if experts else ''}"
    last = load(folder / "last.pt")

    # The weights are untouched, the adapter is not; the optimizer holds the adapter alone.
    weights = last["model_state_dict"]
    assert equal(without_adapters(weights), dict(model.state_dict()))
    pairs = pairs_of(weights)
    assert pairs and all(pair.b.abs().max() > 0 for path, pair in pairs.items() if ".experts." not in path)
    sizes = sorted(state["exp_avg"].numel() for state in last["optimizer_state_dict"]["adamw"]["state"].values())
    assert sizes == sorted(matrix.numel() for pair in pairs.values() for matrix in pair)
    assert set(last["optimizer_state_dict"]) == {"adamw"}

    # Resumed in the middle it ends with the same bits.
    again = go_on_elsewhere(folder, tmp_path / "two")
    assert train("lora", demo_data, tmp_path / "two", base, *flags, "--resume_from", "auto") == 0
    assert_same_end(folder, again)

    # The flat weights are the best checkpoint's, merged; the folder holds that adapter in peft's form.
    flat = read_tensors(folder.with_suffix(".pth"))
    assert equal(flat, extract_weights(load(folder / "best_model.pt"), folder))
    assert flat.keys() == model.state_dict().keys() and not equal(flat, dict(model.state_dict()))
    opened = open_checkpoint(str(base), adapters=[str(folder)])
    assert equal(dict(opened.model.state_dict()), flat)
    assert opened.architecture == architecture and opened.stage == "lora" and opened.speaks_in_turns
    assert "LoRA of rank 2" in (folder / "README.md").read_text()


def test_dpo_with_an_adapter_needs_no_copy_for_its_reference(demo_data: Path, tmp_path: Path) -> None:
    model, base = base_file("ar", False, tmp_path)
    flags = ("--lora_rank", "2", "--lora_targets", "q_proj", "v_proj", "--log_every", "1")
    assert train("dpo", demo_data, tmp_path / "one", base, *flags) == 0
    folder = tmp_path / "one" / "rlhf_32"
    last = load(folder / "last.pt")
    assert not (folder / "reference.pth").exists()
    assert equal(without_adapters(last["model_state_dict"]), dict(model.state_dict()))
    assert {path.rsplit(".", 1)[1] for path in pairs_of(last["model_state_dict"])} == {"q_proj", "v_proj"}
    margins = [row["rewards/margins"] for row in last["training_log"]]
    assert abs(margins[0]) < 1e-6 < abs(margins[-1])  # it begins as its reference and moves away
    again = go_on_elsewhere(folder, tmp_path / "two")
    assert train("dpo", demo_data, tmp_path / "two", base, *flags, "--resume_from", "auto") == 0
    assert_same_end(folder, again)


def test_a_later_stage_starts_from_the_merged_model(demo_data: Path, tmp_path: Path) -> None:
    _, base = base_file("ar", False, tmp_path)
    assert train("sft", demo_data, tmp_path, base, "--lora_rank", "2", "--ema", "0.5") == 0
    for source in ("full_sft_32.pth", "full_sft_32/best_model.pt"):
        assert train("dpo", demo_data, tmp_path, tmp_path / source, "--max_steps", "1", "--lora_rank", "1") == 0
        begun = without_adapters(load(tmp_path / "rlhf_32" / "last.pt")["model_state_dict"])
        assert equal(begun, read_tensors(tmp_path / "full_sft_32.pth"))
    # With an average of the adapter that is what is merged.
    best = load(tmp_path / "full_sft_32" / "best_model.pt")
    averaged = pairs_of(best["ema_state_dict"])
    assert not equal(averaged, pairs_of(best["model_state_dict"]))
    assert equal(read_adapter(tmp_path / "full_sft_32").pairs, averaged)
    assert equal(without_adapters(best["ema_state_dict"]), without_adapters(best["model_state_dict"]))


def test_what_is_asked_of_an_adapter_is_checked(
    demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, base = base_file("ar", False, tmp_path)
    assert train("sft", demo_data, tmp_path, base, "--lora_alpha", "3") == 2
    assert "give --lora_rank" in capsys.readouterr().err
    assert train("sft", demo_data, tmp_path, base, "--lora_rank", "2", "--lora_targets", "q") == 2
    assert "'q' is not one of all, q_proj" in capsys.readouterr().err
    assert main(["lora", "--data_path", str(demo_data / "sft.jsonl"), "--out_dir", str(tmp_path), *TINY]) == 1
    assert "give --pretrained_path" in capsys.readouterr().err
    assert main(["pretrain", "--lora_rank", "2"]) == 2
    capsys.readouterr()
    assert train("lora", demo_data, tmp_path, base, "--max_steps", "1", "--optimizer", "muon") == 0
    text = capsys.readouterr().err
    assert "the adapter is trained with adamw" in text and "rank 8, alpha 16, on all linear layers" in text
    assert "peak lr 0.003" in text
    assert train("lora", demo_data, tmp_path, base, "--lora_rank", "4", "--resume_from", "auto") == 1
    assert "trained with rank 8" in capsys.readouterr().err
    assert train("sft", demo_data, tmp_path, base, "--max_steps", "1") == 0
    assert train("sft", demo_data, tmp_path, base, "--lora_rank", "4", "--resume_from", "auto") == 1
    assert "trained with no adapter" in capsys.readouterr().err


# Using adapters


def test_commands_take_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(LARGE, seed=1, scale=0.15)
    base = saved(model, tmp_path / "base.pt")
    own = fingerprint(dict(model.state_dict()))
    folders = []
    for number, about in enumerate((own, "other")):
        other = random_model(LARGE, seed=1, scale=0.15)
        add_adapter(other, CONFIG, seed=number)
        fill(other, seed=number)
        folders.append(tmp_path / f"adapter{number}")
        facts = {"stage": "lora", "base_sha256": about}
        save_adapter(folders[-1], pairs_of(other.state_dict()), CONFIG, base="", facts=facts, causal=True)

    def write(*flags: str) -> str:
        capsys.readouterr()
        words = ["--prompt", "Once", "--raw", "--max_new_tokens", "12", "--temperature", "0"]
        assert main(["generate", *flags, *words]) == 0
        return capsys.readouterr().out

    mixed = ("--adapter", f"{folders[0]}:0.7", f"{folders[1]}:-0.4")
    texts = [write("--checkpoint", str(base), *flags) for flags in ((), ("--adapter", str(folders[0])), mixed)]
    assert len(set(texts)) == 3
    assert write("--checkpoint", str(base), "--adapter", f"{folders[0]}:0") == texts[0]

    merged = tmp_path / "merged.pt"
    assert main(["merge", "--checkpoint", str(base), *mixed, "--output", str(merged)]) == 0
    said = capsys.readouterr().err
    assert "adapter1 was trained beside other weights" in said and "adapter0 was trained beside" not in said
    assert write("--checkpoint", str(merged)) == texts[2]
    assert open_checkpoint(str(merged)).stage == "lora"
    for name, flags in (("one", ("--checkpoint", str(base), *mixed)), ("two", ("--checkpoint", str(merged)))):
        assert main(["export", *flags, "--output", str(tmp_path / name)]) == 0
    one, two = (read_tensors(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert equal(one, two) and not equal(one, dict(model.state_dict()))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved(random_model(LARGE), tmp_path / "base.pt")
    written(tmp_path / "small")
    flags = ["--checkpoint", str(base), "--adapter", str(tmp_path / "small")]
    assert main(["generate", *flags, "--prompt", "x"]) == 1
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_reaches_the_loss_of_full_fine_tuning_within_three_percent() -> None:
    from benchmarks.proofs.lora import passed, prove

    result = prove(seed=0)
    assert passed(result), result
    assert result["full"] < 0.9 * result["before"]  # there was something to learn
