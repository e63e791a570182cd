"""Several processes: the same run on any shape, checkpoints that go on in any other, one process that writes.

Many runs are made by processes that start once (scripts/same_run.py): importing torch takes longer than they do.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nursery import Nursery
from tiny import tiny_config
from training import ROOT, load

from minillm.cli import main
from minillm.log import UserError
from minillm.models.experts import SparseMoe
from minillm.train.parallel import choose_shards

LIMIT = 1e-5
STEPS = 4
SIZES = ("--hidden_size", "32", "--num_hidden_layers", "2", "--max_seq_len", "64", "--dtype", "float32", "--device",
         "cpu", "--no_wandb", "--eval_samples", "6", "--log_every", "1", "--save_every", "2", "--eval_every", "2",
         "--warmup_steps", "1", "--micro_batch_size", "2")  # fmt: skip
REPLICAS, SHARDS = ("--shards", "1"), ("--shards", "2")
EXPERTS = ("--use_moe", "--num_experts", "6")


def _scripts() -> Any:
    spec = importlib.util.spec_from_file_location("same_run", ROOT / "scripts" / "same_run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


same_run = _scripts()


class Case:
    """One training command; on two processes with half the batches a step, so that both make the same steps."""

    def __init__(self, command: str, *flags: str, data: str = "pretrain", steps: int = STEPS, batches: int = 2) -> None:
        self.command, self.flags, self.data, self.steps, self.batches = command, flags, data, steps, batches

    def words(self, world: Path, out: Path, processes: int, *more: str) -> list[str]:
        data = ["--data_path", str(world / f"{self.data}.jsonl"), "--validation_data",
                str(world / f"{self.data}_val.jsonl")]  # fmt: skip
        flags = [flag.replace("WORLD", str(world)) for flag in self.flags]
        return [self.command, *data, "--out_dir", str(out), *SIZES, "--batch_size", "2", "--grad_accum_steps",
                str(self.batches // processes), "--max_steps", str(self.steps), *flags, *more]  # fmt: skip


RL = ("--max_completion_length", "6", "--learning_rate", "1e-3", "--reward", "number", "length:0-4=0.5", "--beta",
      "0.1", "--steps_per_generation", "2")  # fmt: skip
QUICK = {
    "ar": Case("pretrain", "--ema", "0.9"),
    "experts": Case("pretrain", *EXPERTS, "--optimizer", "adamw"),
    "diffusion": Case("pretrain", "--architecture", "diffusion"),
    "sdd": Case("pretrain", "--architecture", "sdd"),
    "dpo": Case("dpo", "--pretrained_path", "WORLD/ar.pth", data="dpo"),
    "grpo": Case("grpo", *RL, "--num_generations", "2", "--pretrained_path", "WORLD/ar.pth", data="prompts"),
}
MORE = {
    "streaming": Case("pretrain", "--streaming"),
    "sft": Case("sft", data="sft"),
    "reason": Case("reason", data="sft"),
    "lora": Case("lora", "--pretrained_path", "WORLD/ar.pth", data="sft"),
    "lora dpo": Case("dpo", "--pretrained_path", "WORLD/ar.pth", "--lora_rank", "4", data="dpo"),
    "simpo": Case("dpo", "--loss", "simpo", "--pretrained_path", "WORLD/ar.pth", data="dpo"),
    "precomputed": Case("dpo", "--pretrained_path", "WORLD/ar.pth", "--precompute_reference", "on", data="dpo"),
    "kto": Case("dpo", "--loss", "kto", "--pretrained_path", "WORLD/ar.pth", data="kto"),
    "sdd dpo": Case("dpo", "--architecture", "sdd", data="dpo"),
    "reward": Case("reward", "--pretrained_path", "WORLD/ar.pth", data="dpo"),
    "distill": Case("distill", "--teacher", "WORLD/ar.pth", data="sft"),
    "cached teacher": Case("distill", "--teacher", "WORLD/ar.pth", "--cache_teacher", "4", data="sft"),
    "ppo": Case("ppo", *RL, "--pretrained_path", "WORLD/ar.pth", data="prompts"),
    "spo": Case("spo", *RL, "--pretrained_path", "WORLD/ar.pth", data="prompts"),
    "diffusion grpo": Case("grpo", *RL, "--num_generations", "2", "--architecture", "diffusion", data="prompts"),
    "sdd ppo": Case("ppo", *RL, "--architecture", "sdd", data="prompts"),
    "lora grpo": Case(
        "grpo", *RL, "--num_generations", "2", "--lora_rank", "4", "--pretrained_path", "WORLD/ar.pth", data="prompts"
    ),  # fmt: skip
}


@pytest.fixture(scope="module")
def world(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of every form, and a model to begin with."""
    folder = tmp_path_factory.mktemp("world")
    for file in demo_data.glob("*.jsonl"):
        shutil.copy(file, folder)
    for name, numbers in (("prompts", range(6)), ("prompts_val", range(6, 10))):  # fewer than a rollout has
        rows = [{"prompt": f"{n} + {n}?", "answer": str(2 * n)} for n in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("kto", "kto_val"):
        rows = [{"prompt": f"{n} + {n}?", "completion": str(2 * n + n % 2), "label": n % 2 == 0} for n in range(24)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path_factory.mktemp("begin")
    assert main(Case("pretrain", steps=2).words(folder, out, 1)) == 0
    shutil.copy(out / "pretrain_32.pth", folder / "ar.pth")
    shutil.copy(out / "pretrain_32" / "tokenizer.json", folder / "tokenizer.json")
    return folder


LAYOUTS = {"replicas": REPLICAS, "shards": SHARDS}


def make(
    cases: dict[str, Case], world: Path, place: Path, then: Sequence[Sequence[str]] = ()
) -> Callable[[str, str], Path]:
    """Run the cases on one process and in each layout of two; where the run of a (case, layout) is. `then`: what the
    two processes do afterwards."""
    for name, case in cases.items():
        assert main(case.words(world, place / name / "one", 1)) == 0, name
    words = [
        cases[name].words(world, place / name / layout, 2, *LAYOUTS[layout]) for name in cases for layout in LAYOUTS
    ]
    same_run.run_together([*words, *then], 2, timeout=500)
    return lambda name, layout: place / name / layout


@pytest.fixture(scope="module", autouse=True)
def processes_come_from_the_nursery(nursery: Nursery) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(same_run, "sys", SimpleNamespace(executable=str(nursery.python)))
        yield


@pytest.fixture(scope="module")
def quick(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    place = tmp_path_factory.mktemp("quick")
    then = [
        resumed(place / "ar" / "one", world, place / "one, then shards", 2, *SHARDS),
        resumed(place / "ar" / "shards", world, place / "shards, then replicas", 2, *REPLICAS),
    ]
    return make(QUICK, world, place, then)


def resumed(begun: Path, world: Path, out: Path, processes: int, *layout: str) -> list[str]:
    """The second half of a run, elsewhere and in another shape."""
    name = "step_000002.sharded" if begun.name == "shards" else "step_000002.pt"
    return QUICK["ar"].words(world, out, processes, "--resume_from", str(begun / "pretrain_32" / name), *layout)


@pytest.fixture(scope="module")
def more(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    return make(MORE, world, tmp_path_factory.mktemp("more"))


def assert_same(one: Path, other: Path) -> None:
    """Loss, gradient norm and validation of every step."""
    rows, others = same_run.read_log(one), same_run.read_log(other)
    assert len(rows) == STEPS
    names = {name for row in rows for name in row if name.split("/")[-1] in ("loss", "grad_norm", "reward")} - {"loss"}
    assert "train/grad_norm" in names
    for name in names:
        assert same_run.largest_difference(name, rows, others) <= LIMIT, name
    first, second = (
        set(next(each.glob("*/metrics.csv")).read_text().splitlines()[0].split(",")) for each in (one, other)
    )
    assert first ^ second <= {"train/checkpoint_stall"}  # a resumed run may have no save between two logged rows
    validation = [load(next(each.glob("*/last.pt")))["validation_log"] for each in (one, other)]
    for row, other_row in zip(*validation, strict=True):
        assert row == pytest.approx(other_row, rel=LIMIT)


@pytest.mark.parametrize("layout", ["replicas", "shards"])
@pytest.mark.parametrize("name", QUICK)
def test_two_processes_make_the_run_of_one(name: str, layout: str, quick: Callable[[str, str], Path]) -> None:
    assert_same(quick(name, "one"), quick(name, layout))


def test_a_checkpoint_of_one_shape_goes_on_in_any_other(
    world: Path, quick: Callable[[str, str], Path], tmp_path: Path
) -> None:
    place = quick("ar", "one").parent.parent
    ends = [place / "one, then shards", place / "shards, then replicas"]
    for begun in LAYOUTS:
        ends.append(tmp_path / f"{begun}, then one")
        assert main(resumed(quick("ar", begun), world, ends[-1], 1)) == 0
    for end in ends:
        assert_same(quick("ar", "one"), end)


def test_other_processes_write_nothing_and_say_nothing(quick: Callable[[str, str], Path]) -> None:
    alone, together = (quick("dpo", layout) for layout in ("one", "replicas"))
    assert sorted(path.name for path in together.rglob("*")) == sorted(path.name for path in alone.rglob("*"))
    rows = (together / "rlhf_32" / "metrics.csv").read_text().splitlines()
    assert len(rows) == len((alone / "rlhf_32" / "metrics.csv").read_text().splitlines())


def test_shards_must_divide_the_processes() -> None:
    model = torch.nn.Linear(2, 2)
    assert choose_shards(0, model, torch.device("cpu")) == choose_shards(1, model, torch.device("cpu")) == 1
    with pytest.raises(UserError, match="--shards 2 does not divide the 1 process of this run: give one of 1, or 0"):
        choose_shards(2, model, torch.device("cpu"))


def test_an_expert_without_tokens_has_a_gradient_of_zeros() -> None:
    """Else processes would disagree about which gradients there are to be added up."""
    experts = SparseMoe(tiny_config(use_moe=True, num_experts=8))
    experts(torch.randn(1, 1, 16))[0].sum().backward()
    gradients = [expert.down_proj.weight.grad for expert in experts.experts]
    assert all(gradient is not None for gradient in gradients)
    assert sum(bool((gradient == 0).all()) for gradient in gradients if gradient is not None) == 6


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["replicas", "shards"])
@pytest.mark.parametrize("name", MORE)
def test_two_processes_make_the_run_of_one_in_every_stage(
    name: str, layout: str, more: Callable[[str, str], Path]
) -> None:
    assert_same(more(name, "one"), more(name, layout))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["replicas", "shards"])
def test_a_signal_to_one_process_stops_all_at_one_step(layout: str, world: Path, tmp_path: Path) -> None:
    port = same_run.free_port()
    words = Case("pretrain", steps=5000).words(world, tmp_path, 2, *LAYOUTS[layout], "--save_every", "20")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "minillm", *words], env=same_run.environment(rank, 2, port),
            stderr=subprocess.PIPE, text=True,
        ) for rank in range(2)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("*/step_*")):
            assert time.monotonic() < deadline and all(process.poll() is None for process in started)
            time.sleep(0.05)
        started[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [143, 143], said
    found = re.findall(r"stopped at step (\d+)", said[0])
    content = load(tmp_path / "pretrain_32" / "last.pt")
    assert found == [str(content["global_step"])] and content["training_log"][-1]["step"] == content["global_step"]
    assert not said[1]
