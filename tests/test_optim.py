"""Muon is torch's Muon, the schedule is the drawn one, clipping is torch's."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from minillm.log import UserError
from minillm.models.config import ModelConfig
from minillm.models.transformer import LanguageModel
from minillm.train import optim
from minillm.train.arithmetic import muon_flops
from minillm.train.job import resolve_optim
from minillm.train.optim import Muon, Optimizers, build_optimizers, clip_gradients, learning_rate, orthogonalise
from minillm.train.settings import OptimSettings

SHAPES = [(8, 8), (8, 12), (6, 30), (30, 6), (8, 12)]  # square, wide, wide enough for the Gram form, tall, a repeat


def matrices(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def run_muon(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for parameter, grad in zip(parameters, matrices(100 + step)):
            parameter.grad = grad
        optimizer.step()


def moved_by_torch(steps: int) -> list[torch.Tensor]:
    parameters = [torch.nn.Parameter(value) for value in matrices(0)]
    theirs = torch.optim.Muon(
        parameters, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    run_muon(theirs, parameters, steps)
    return [parameter.detach() for parameter in parameters]


def moved_by_us(steps: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    parameters = [torch.nn.Parameter(value) for value in matrices(0)]
    run_muon(Muon(parameters, lr=0.02, weight_decay=0.1, momentum=0.95, dtype=dtype), parameters, steps)
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [1, 4])
def test_muon_is_torchs_muon_up_to_its_bfloat16(steps: int, dtype: torch.dtype) -> None:
    for start, ours, theirs in zip(matrices(0), moved_by_us(steps, dtype), moved_by_torch(steps)):
        difference = (ours - theirs).norm() / (theirs - start).norm()
        assert difference < 0.03


@pytest.mark.parametrize("steps", [1, 4])
def test_muon_is_torchs_muon_exactly_where_torch_iterates_in_float32(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    for ours, theirs in zip(moved_by_us(steps), moved_by_torch(steps)):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 6, 40), (3, 40, 6)], ids=["wide", "tall"])
def test_the_gram_form_is_the_plain_form(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    by_gram = orthogonalise(values, torch.float32)
    monkeypatch.setattr(optim, "_newton_schulz_by_gram", lambda x, steps: optim._newton_schulz(x))
    torch.testing.assert_close(by_gram, orthogonalise(values, torch.float32), atol=1e-4, rtol=1e-3)
    singular = torch.linalg.svdvals(by_gram)
    assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3


def falling(decay: str) -> torch.Tensor:
    """[1, 96, 384] float64 with singular values that fall as those of real updates do."""
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.linalg.qr(torch.randn(rows, 96, dtype=torch.float64, generator=generator))[0] for rows in (96, 384)
    )
    place = torch.arange(1, 97, dtype=torch.float64)
    values = {"1/i": 1 / place, "1/i^2": place**-2, "eight": (place <= 8) + 1e-9}[decay]
    return (left * values @ right.T)[None]


@pytest.mark.parametrize("decay", ["1/i", "1/i^2", "eight"])
def test_in_bfloat16_the_gram_form_is_as_near_to_the_truth_as_the_plain_form(
    decay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = falling(decay)
    truth = optim._newton_schulz(values / values.norm())

    def wrong() -> float:
        found = orthogonalise(values, torch.bfloat16).double()
        return float((found - truth).norm() / truth.norm())

    by_gram, largest = wrong(), float(torch.linalg.svdvals(orthogonalise(values, torch.bfloat16).double()).max())
    monkeypatch.setitem(optim.GRAM_STEPS, torch.bfloat16, (5,))
    never_anew = wrong()
    monkeypatch.setattr(optim, "_newton_schulz_by_gram", lambda x, steps: optim._newton_schulz(x))
    plain = wrong()
    assert largest < 1.25 and by_gram < plain + 0.03 < never_anew


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_muon_iterates_in_bfloat16_where_the_run_does(dtype: torch.dtype) -> None:
    built = build_optimizers(LanguageModel(MOE), OptimSettings(optimizer="muon", learning_rate=1e-3), dtype=dtype)
    muon = built.by_name["muon"]
    assert isinstance(muon, Muon) and muon.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [48, 64, 256])
def test_the_arithmetic_of_muon_is_counted(columns: int, dtype: torch.dtype) -> None:
    config = tiny_config(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_hidden_layers=1)
    config = replace(config, intermediate_size=columns)
    shapes = [tuple(p.shape) for name, p in LanguageModel(config).named_parameters() if name.endswith("proj.weight")]
    with FlopCounterMode(display=False) as counter:
        for shape in shapes:
            orthogonalise(torch.randn(1, *shape), dtype)
    assert counter.get_total_flops() == muon_flops(config, str(dtype).removeprefix("torch."))


def test_a_gradient_of_zero_moves_nothing_but_the_decay() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.zeros(4, 4)
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), 0.95))


MOE = tiny_config(use_moe=True, num_hidden_layers=1, num_experts=2, num_experts_per_tok=1, tie_word_embeddings=False)


def groups_of(model: LanguageModel, optimizer: str) -> dict[str, tuple[str, float]]:
    """parameter name -> (optimizer, weight decay)"""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    built = build_optimizers(model, OptimSettings(optimizer=optimizer, learning_rate=1e-3, weight_decay=0.1))
    return {
        names[id(parameter)]: (type(each).__name__, group["weight_decay"])
        for each in built.optimizers
        for group in each.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("config", [MOE, replace(MOE, use_moe=False, tie_word_embeddings=True)], ids=["moe", "dense"])
def test_muon_takes_the_matrices_inside_the_layers_and_adamw_the_rest(config: ModelConfig) -> None:
    model = LanguageModel(config)
    groups = groups_of(model, "muon")
    assert set(groups) == {name for name, _ in model.named_parameters()}
    for name, group in groups.items():
        if name.endswith("norm.weight"):
            assert group == ("AdamW", 0.0), name
        elif name.startswith(("model.embed_tokens", "lm_head")) or name.endswith("mlp.gate.weight"):
            assert group == ("AdamW", 0.1), name
        else:
            assert group == ("Muon", 0.1), name
    assert {group[0] for group in groups_of(model, "adamw").values()} == {"AdamW"}


def test_optimizer_state_survives_saving() -> None:
    def step(model: LanguageModel, built: Optimizers) -> None:
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        for optimizer in built.optimizers:
            optimizer.step()

    settings = OptimSettings(optimizer="muon", learning_rate=1e-2)
    model = LanguageModel(MOE)
    built = build_optimizers(model, settings)
    step(model, built)
    saved = copy.deepcopy((model.state_dict(), built.state_dict()))
    step(model, built)
    resumed = LanguageModel(MOE)
    resumed.load_state_dict(saved[0])
    again = build_optimizers(resumed, settings)
    again.load_state_dict(saved[1])
    step(resumed, again)
    assert set(saved[1]) == {"muon", "adamw"}
    for ours, straight in zip(resumed.parameters(), model.parameters()):
        assert torch.equal(ours, straight)
    with pytest.raises(UserError, match="no state of the optimizer muon, but of adamw: "):
        build_optimizers(resumed, settings).load_state_dict({"adamw": saved[1]["adamw"]})


def test_the_schedule_by_hand() -> None:
    values = [learning_rate(s, total=12, warmup=4, peak=1.0, final_ratio=0.2) for s in range(14)]
    assert values[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert values[8] == pytest.approx(0.6)  # halfway down from 1.0 to 0.2
    assert values[6] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert values[12] == values[13] == pytest.approx(0.2)
    assert learning_rate(0, total=1, warmup=0, peak=3e-4, final_ratio=0.0) == pytest.approx(3e-4)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_clipping_is_torchs(limit: float) -> None:
    ours, theirs = ([torch.nn.Parameter(value) for value in matrices(0)] for _ in range(2))
    for parameters in (ours, theirs):
        for parameter, grad in zip(parameters, matrices(1)):
            parameter.grad = grad
    norm = clip_gradients(ours, limit)
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit or 1e9)
    torch.testing.assert_close(norm, expected)
    for mine, reference in zip(ours, theirs):
        torch.testing.assert_close(mine.grad, reference.grad)


def test_parameters_without_gradient_are_left_out() -> None:
    used, unused = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    used.grad = torch.full((2, 2), 2.0)
    assert float(clip_gradients([used, unused], 1.0)) == pytest.approx(4.0)
    Muon([used, unused], lr=0.1).step()
    assert unused.eq(1).all() and not used.eq(1).any()


@pytest.mark.parametrize(
    "stage, given, lora, optimizer, rate",
    [
        ("pretrain", {}, False, "muon", 2e-3),
        ("full_sft", {}, False, "muon", 1e-3),
        ("full_sft", {"optimizer": "adamw"}, False, "adamw", 3e-4),
        ("full_sft", {"optimizer": "adamw8bit"}, False, "adamw8bit", 3e-4),
        ("full_sft", {"learning_rate": 7e-4}, False, "muon", 7e-4),
        ("full_sft", {}, True, "adamw", 3e-3),
        ("lora", {}, True, "adamw", 3e-3),
        ("rlhf", {}, False, "adamw", 5e-6),
    ],
)
def test_the_default_rate_is_the_optimizers(stage, given, lora, optimizer, rate, capsys):
    chosen = resolve_optim(stage, OptimSettings(**given), lora=lora)
    assert (chosen.optimizer, chosen.learning_rate) == (optimizer, rate)
    assert capsys.readouterr().err == ""  # nobody asked for Muon, so nobody is told that an adapter has none
