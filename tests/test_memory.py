"""What training takes in memory: formulas against what is counted, 8-bit moments, `estimate`, `--batch_size auto`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_model, tiny_config
from torch import Tensor
from training import TINY, equal, load

from minillm.cli import main
from minillm.log import UserError
from minillm.models import attention_products, experts
from minillm.models.candidates import Candidates
from minillm.models.config import PRESETS, ModelConfig, ModelSettings, build_model_config
from minillm.models.heads import weighted_cross_entropy
from minillm.models.transformer import LanguageModel, count_parameters
from minillm.text.tokenizer import Tokenizer
from minillm.train import batch_size, estimate, memory
from minillm.train.arithmetic import recomputed_flops
from minillm.train.job import _check_shards
from minillm.train.memory import Load, activation_bytes, memory_of, optimizer_bytes, parameters
from minillm.train.optim import Optimizers, build_optimizers
from minillm.train.recompute import checkpoint_layers
from minillm.train.settings import DataSettings, OptimSettings, RunSettings, Settings, TrackSettings

# Large enough that 8 bits are used, and that what a formula leaves out does not matter.
WIDE = tiny_config(hidden_size=64, head_dim=16, intermediate_size=192, num_hidden_layers=2, moe_intermediate_size=96)
SHAPES = {
    "dense": WIDE,
    "moe": replace(WIDE, use_moe=True),
    "dense and moe": replace(WIDE, use_moe=True, dense_layers=(0,)),
    "without norms, with biases": replace(WIDE, qk_norm=False, qkv_bias=True, tie_word_embeddings=False),
    "gpt2": replace(WIDE, model_type="gpt2", num_key_value_heads=4),
    "aggregate": replace(WIDE, causal=False, denoiser="aggregate", value_head=True),
    "bilateral": replace(WIDE, causal=False, denoiser="bilateral"),
}


def test_both_places_know_the_same_of_attention_by_products() -> None:
    assert attention_products.LONGEST == memory.ATTENTION_LONGEST
    queries = {str(dtype).removeprefix("torch."): count for dtype, count in attention_products.QUERIES.items()}
    assert queries == memory.ATTENTION_QUERIES


def test_both_places_know_the_same_of_experts_rows() -> None:
    assert (memory.EXPERT_ROWS, memory.MANY_EXPERT_ROWS) == (experts.ROWS, experts.MANY_ROWS)


def preset(name: str, **changes: Any) -> ModelConfig:
    return build_model_config(
        ModelSettings(model_config=name, **changes), vocab_size=6400, max_seq_len=512, causal=True
    )


def one_step(model: LanguageModel, optimizers: Optimizers, rate: float = 3e-3) -> float:
    """A step on the same few sentences; its loss."""
    tokens = torch.arange(64).view(4, 16) * 7 % 50
    loss = weighted_cross_entropy(model(tokens).hidden, model.head_weight, tokens.roll(-1, 1), torch.ones(4, 16)).loss
    (loss / 64).backward()
    optimizers.set_lr(rate)
    for optimizer in optimizers.optimizers:
        optimizer.step()
    optimizers.zero_grad()
    return loss.item() / 64


def trained(optimizer: str, steps: int) -> tuple[LanguageModel, Optimizers, list[float]]:
    model = random_model(WIDE, scale=0.05).train()
    optimizers = build_optimizers(model, OptimSettings(optimizer=optimizer, learning_rate=3e-3))
    return model, optimizers, [one_step(model, optimizers) for _ in range(steps)]


@pytest.mark.parametrize("config", SHAPES.values(), ids=list(SHAPES))
def test_parameters_are_counted_without_building_the_model(config: ModelConfig) -> None:
    assert parameters(config) == count_parameters(LanguageModel(config))


def kept_bytes(model: LanguageModel, load: Load) -> int:
    """What a forward pass keeps for its gradient beside the weights, by autograd's own word."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    inputs: Any = torch.arange(load.tokens).view(load.rows, load.length) % 50
    if load.config.denoiser:
        inputs = Candidates.known(inputs, load.candidates)
    segments = torch.zeros(load.rows, load.length, dtype=torch.long) if load.packed else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs, segments=segments)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


@pytest.mark.parametrize("amd", [False, True], ids=["", "AMD"])
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("name", ["dense", "moe", "gpt2", "bilateral"])
def test_the_formula_for_a_layers_memory_is_what_autograd_keeps(
    name: str, packed: bool, kind: str, amd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two depths: their difference is what layers keep, and nothing else."""
    for module in (memory, attention_products):
        monkeypatch.setattr(module, "AMD", amd)
    monkeypatch.setattr(experts, "by_shape", lambda x: amd)
    counted, computed = [], []
    for layers in (2, 6):
        config = replace(SHAPES[name], num_hidden_layers=layers)
        load = Load(config, rows=4, length=64, optimizer="adamw", gradient_checkpointing=kind, packed=packed)
        model = random_model(config).train()
        checkpoint_layers(model, kind)
        counted.append(kept_bytes(model, load))
        computed.append(activation_bytes(load))
    assert computed[1] - computed[0] == pytest.approx(counted[1] - counted[0], rel=0.06)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw8bit"])
def test_the_formula_for_optimizer_state_is_what_optimizers_hold(optimizer: str) -> None:
    if optimizer == "adamw8bit":
        pytest.importorskip("torchao")
    _, optimizers, _ = trained(optimizer, 1)
    held = 0
    for part in optimizers.state_dict().values():
        for values in part["state"].values():
            held += sum(value.nbytes for name, value in values.items() if value.ndim and "qmap" not in name)
    assert held == pytest.approx(optimizer_bytes(WIDE, optimizer), rel=0.01)


def test_8_bit_moments_learn_as_those_of_32_do() -> None:
    pytest.importorskip("torchao")
    _, _, exact = trained("adamw", 12)
    _, _, rough = trained("adamw8bit", 12)
    assert exact[-1] < 0.7 * exact[0]
    assert rough[-1] == pytest.approx(exact[-1], rel=0.05) and rough != exact


def test_8_bit_moments_are_saved_as_plain_tensors_and_go_on_as_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model, optimizers, _ = trained("adamw8bit", 3)
    torch.save({"model": model.state_dict(), "optimizers": optimizers.state_dict()}, tmp_path / "saved.pt")
    content = load(tmp_path / "saved.pt")  # weights_only
    state = next(iter(values for values in content["optimizers"]["adamw8bit"]["state"].values() if len(values) > 3))
    assert {type(value) for value in state.values()} == {Tensor} and state["exp_avg.codes"].dtype == torch.uint8
    again = random_model(WIDE, seed=5).train()
    others = build_optimizers(again, OptimSettings(optimizer="adamw8bit", learning_rate=3e-3))
    again.load_state_dict(content["model"])
    others.load_state_dict(content["optimizers"])
    assert [one_step(model, optimizers) for _ in range(3)] == [one_step(again, others) for _ in range(3)]
    assert equal(model.state_dict(), again.state_dict()) and equal(optimizers.state_dict(), others.state_dict())


def test_damaged_8_bit_moments_are_refused_in_a_sentence() -> None:
    pytest.importorskip("torchao")
    _, optimizers, _ = trained("adamw8bit", 1)
    state = optimizers.state_dict()
    values = next(values for values in state["adamw8bit"]["state"].values() if "exp_avg.codes" in values)
    values["exp_avg.scale"] = values["exp_avg.scale"][:-1]
    with pytest.raises(UserError, match="optimizer_state_dict of adamw8bit cannot be used.*8 bits"):
        optimizers.load_state_dict(state)


def test_a_missing_torchao_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"adamw8bit needs torchao.*minillm-trainer\[quant\]"):
        trained("adamw8bit", 1)


def test_8_bit_moments_are_refused_where_weights_are_shared() -> None:
    optim = OptimSettings(optimizer="adamw8bit")
    settings = Settings(ModelSettings(), DataSettings(), RunSettings(), optim, TrackSettings())
    _check_shards(1, settings)
    with pytest.raises(UserError, match="--shards 1"):
        _check_shards(2, settings)


def test_what_saves_memory_is_less_in_the_estimate() -> None:
    plain = Load(preset("xl"), rows=2, length=1024, optimizer="adamw")
    peak = memory_of(plain).peak
    for change in (
        {"gradient_checkpointing": "selective"}, {"gradient_checkpointing": "full"}, {"optimizer": "adamw8bit"},
        {"optimizer": "muon"}, {"rows": 1}, {"shards": 4}, {"micro_batches": 1}, {"trained_share": 0.01},
    ):  # fmt: skip
        assert memory_of(replace(plain, **change)).peak < peak, change
    assert memory_of(replace(plain, frozen_models=1)).weights == 2 * memory_of(plain).weights


@pytest.mark.parametrize("name", PRESETS)
def test_computing_a_forward_pass_again_is_at_most_a_third_of_the_work(name: str) -> None:
    config = preset(name)
    full, selective = (recomputed_flops(config, kind) / (6 * parameters(config)) for kind in ("full", "selective"))
    assert 0 < selective < full < 1 / 3


def test_the_constants_of_the_formulas_are_those_of_the_code() -> None:
    from minillm.models import heads, linear
    from minillm.train import optim

    assert memory.LOGITS_AT_ONCE == heads.CHUNK_ELEMENTS and memory.MUON_AT_ONCE == optim.MUON_ELEMENTS
    assert memory.TURNED_FROM == linear.MANY_ROWS
    assert Tokenizer.load().vocab_size == estimate.VOCABULARY


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(estimate, "measure_speed", lambda *_, **__: 1e11)
    yield


def test_estimate_says_memory_by_kind_speed_days_and_cost(
    known_machine: None, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["estimate", "--model_config", "xl", "--batch_size", "8", "--max_seq_len", "1024", "--device", "cpu"]
    assert main([*flags, "--dtype", "float32", "--tokens", "1e9", "--price_per_hour", "2"]) == 0
    text = capsys.readouterr().out
    for word in ("384,094,208 parameters", "weights", "gradients", "optimizer", "activations", "logits", "libraries",
                 "peak", "tokens/s", "days", "cost", "measured now"):  # fmt: skip
        assert word in text
    assert main([*flags, "--json", "--dtype", "float32", "--tokens", "1e9", "--price_per_hour", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["weights"] == 4 * 384_094_208
    assert found["days"] == pytest.approx(1e9 / found["tokens_per_second"] / 86400)
    assert found["cost"] == pytest.approx(48 * found["days"])


def test_estimate_of_a_gpu_says_that_its_utilisation_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    rates = []
    for flags in ([], ["--utilisation", "0.2"], ["--processes", "4", "--shards", "2"]):
        assert main(["estimate", "--device", "h100", "--json", *flags]) == 0
        rates.append(json.loads(capsys.readouterr().out)["tokens_per_second"])
    assert rates[0] == pytest.approx(2 * rates[1]) and rates[2] == pytest.approx(4 * rates[0])
    assert main(["estimate", "--device", "t4", "--model_config", "xl", "--batch_size", "64"]) == 0
    text = capsys.readouterr().out
    assert "assumed, not measured" in text and "does NOT fit" in text and "float16" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "h99"], "is not one of"),
        (["--device", "t4", "--dtype", "bfloat16"], "float16"),
        (["--utilisation", "0.3", "--device", "cpu"], "data sheets"),
        (["--processes", "4", "--shards", "3"], "does not divide"),
    ],
)
def test_estimate_refuses_what_cannot_be(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *flags]) in (1, 2)
    assert said in capsys.readouterr().err


def test_the_search_stops_at_the_first_number_that_does_not_fit() -> None:
    tried: list[int] = []

    def fits(rows: int) -> bool:
        tried.append(rows)
        return rows <= 4

    assert batch_size.largest_that_fits([1, 2, 4, 8, 16], fits) == 4 and tried == [1, 2, 4, 8]
    assert batch_size.largest_that_fits([8, 16], fits) == 0


def test_a_trial_leaves_weights_and_gradients_as_they_were_and_reports_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from minillm.families.autoregressive import Autoregressive

    model = random_model(WIDE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert batch_size.steps_fit(model, Autoregressive(), (2, 16), torch.float32, 0)
    monkeypatch.setattr(LanguageModel, "forward", _no_room)
    assert not batch_size.steps_fit(model, Autoregressive(), (2, 16), torch.float32, 0)
    assert equal(before, model.state_dict()) and all(p.grad is None for p in model.parameters())


def _no_room(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("no room")


def pretrain(data: Path, out: Path, *flags: str) -> int:
    files = ["--data_path", str(data / "pretrain.jsonl"), "--validation_data", str(data / "pretrain_val.jsonl")]
    return main(["pretrain", *files, "--out_dir", str(out), *TINY, "--max_steps", "2", *flags])


def test_batch_size_auto_keeps_the_rows_of_a_step_and_writes_what_it_found(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--batch_size", "auto", "--grad_accum_steps", "4", "--gradient_checkpointing")
    assert pretrain(demo_data, tmp_path, *flags) == 0
    assert "--batch_size auto: 16 of 32 rows at once" in capsys.readouterr().err
    written = json.loads((tmp_path / "pretrain_32" / "training_config.json").read_text())
    assert (written["batch_size"], written["grad_accum_steps"], written["micro_batch_size"]) == (8, 4, 16)
    assert written["gradient_checkpointing"] == "full"
    monkeypatch.setattr(batch_size, "available_memory", lambda: 300 * 2**20)
    assert pretrain(demo_data, tmp_path / "small", *flags) == 1
    assert "not even one row of 128 tokens fits" in capsys.readouterr().err
    assert pretrain(demo_data, tmp_path / "both", *flags, "--micro_batch_size", "2") == 2
    assert "leave --micro_batch_size out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_8_bit_moments_resumes_as_the_same_run(demo_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    flags = ("--optimizer", "adamw8bit", "--hidden_size", "64", "--max_steps", "4", "--save_every", "2")
    assert pretrain(demo_data, tmp_path / "one", *flags) == 0
    saved = tmp_path / "one" / "pretrain_64" / "step_000002.pt"
    assert pretrain(demo_data, tmp_path / "two", *flags, "--resume_from", str(saved)) == 0
    one, two = (load(tmp_path / name / "pretrain_64" / "last.pt") for name in ("one", "two"))
    for key in ("model_state_dict", "optimizer_state_dict"):
        assert equal(one[key], two[key])
