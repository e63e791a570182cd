"""Device and number format: found out, never a crash."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config
from training import TINY

from minillm.cli import main as minillm
from minillm.data.batches import Batch
from minillm.families.autoregressive import Autoregressive
from minillm.log import UserError
from minillm.methods.likelihood import Likelihood
from minillm.models.allocator import keep_freed_memory
from minillm.models.device import choose_device
from minillm.models.transformer import LanguageModel
from minillm.train import optim
from minillm.train.precision import (
    autocast,
    choose_compile,
    choose_dtype,
    gemm_flops,
    memory_mb,
)

CPU = torch.device("cpu")


def test_auto_takes_what_there_is() -> None:
    device = choose_device("auto")
    torch.ones(1, device=device)
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert device == CPU


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cpu:x"])
def test_a_device_that_is_not_there_is_named_with_a_way_out(name: str) -> None:
    with pytest.raises(UserError) as error:
        choose_device(name)
    assert f"--device {name} cannot be used here (" in str(error.value)
    assert "--device auto takes what there is" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "expected"),
    [(True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)],
)
def test_dtype_auto_on_a_cpu_is_bfloat16_only_where_the_hardware_multiplies_it(
    amx: bool, avx512_bf16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    assert choose_dtype("auto", CPU) == expected


@pytest.mark.parametrize("flags", [(), ("--use_moe",)], ids=["dense", "experts"])
@pytest.mark.parametrize(("multiplies", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_training_takes_the_dtype_that_suits_the_machine(
    flags: tuple[str, ...],
    multiplies: bool,
    dtype: str,
    demo_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: multiplies, raising=False)
    of_muon: list[torch.dtype] = []

    def orthogonalise(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        of_muon.append(dtype)
        return matrices

    monkeypatch.setattr(optim, "orthogonalise", orthogonalise)
    data = ["--data_path", str(demo_data / "pretrain.jsonl"), "--out_dir", str(tmp_path)]
    wanted = ["--max_steps", "1", "--dtype", "auto", *flags]  # the last --dtype counts
    assert minillm(["pretrain", *data, *TINY, *wanted]) == 0
    config = next(tmp_path.glob("*/training_config.json")).read_text(encoding="utf-8")
    assert json.loads(config)["dtype"] == dtype and set(of_muon) == {getattr(torch, dtype)}


def test_dtype_auto_is_float32_where_torch_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert choose_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_is_asked_for_is_taken(name: str) -> None:
    assert choose_dtype(name, CPU) == getattr(torch, name)


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_a_bfloat16_step_is_a_float32_step_within_two_percent(use_moe: bool) -> None:
    config = tiny_config(vocab_size=100, hidden_size=32, head_dim=8, intermediate_size=64, use_moe=use_moe)
    generator = np.random.default_rng(0)
    segments = np.zeros((2, 24), np.int32)
    segments[:, 10:], segments[:, 20:] = 1, -1
    positions = np.tile(np.concatenate([np.arange(10), np.arange(10), np.zeros(4, np.int64)]), (2, 1)).astype(np.int64)
    batch = Batch(generator.integers(0, 100, (2, 24)), segments >= 0, positions, segments, np.arange(2))
    method = Likelihood(Autoregressive(), 0)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = LanguageModel(config).train()
        model.init_weights(0)
        part = method.prepare(model, batch, CPU, 0, 0)
        with autocast(CPU, dtype):
            loss = method.loss(model, part.data).loss / part.count
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.ndim == 1)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results[dtype] = loss.item(), gradient
    (exact, exact_gradient), (rounded, rounded_gradient) = results.values()
    assert rounded == pytest.approx(exact, rel=0.02)
    assert torch.cosine_similarity(exact_gradient, rounded_gradient, dim=0) > 0.98


def test_compiling_follows_the_length_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_compile("on", device=CPU, dtype=torch.bfloat16, flops=0.0)
    assert not choose_compile("off", device=CPU, dtype=torch.bfloat16, flops=1e30)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/compiler")
    assert choose_compile("auto", device=CPU, dtype=torch.bfloat16, flops=1e18) and not choose_compile(
        "auto", device=CPU, dtype=torch.bfloat16, flops=1e10
    )
    assert not choose_compile("auto", device=CPU, dtype=torch.float32, flops=1e18)  # it would gain nothing
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not choose_compile("auto", device=CPU, dtype=torch.bfloat16, flops=1e18)  # it could not


def test_the_machine_is_measured_plausibly() -> None:
    assert 1e8 < gemm_flops(CPU, torch.float32) < 1e16
    held = torch.ones(30 << 20)  # 120 MiB
    assert memory_mb(CPU) > held.numel() * 4 / 2**20
    keep_freed_memory()  # never fails, whatever the C library
    assert float(torch.ones(1000).sum()) == 1000
