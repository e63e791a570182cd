"""Every command with --device does there what it does on the CPU, and leaves no tensor on the wrong side. The device is
a pretended one (pretend_device.py): what a true GPU computes is not tested here."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration
from training import ROOT, TINY, environment, load

from minillm.cli import main
from minillm.families.settings import ARCHITECTURES

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no devices made in Python",
)
pytestmark = pytest.mark.usefixtures("plain_products")  # which the pretended device has
FEW = ("--max_seq_len", "64", "--max_steps", "2", "--eval_every", "2", "--num_hidden_layers", "1",
       "--warmup_steps", "0")  # fmt: skip
WRITE = ("--max_new_tokens", "6", "--seed", "3")
PAIRS = {"dpo", "reward"}
ANSWERS = {"grpo": ("--num_generations", "2"), "ppo": (), "spo": ("--architecture", "diffusion")}


def on_the_device(*commands: list[str]) -> None:
    program = [sys.executable, str(ROOT / "tests/pretend_device.py")]
    words = [[*words, "--device", "pretend"] for words in commands]
    done = subprocess.run(
        program, input=json.dumps(words), env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


def on_the_cpu(*commands: list[str]) -> None:
    for words in commands:
        assert main([*words, "--device", "cpu"]) == 0


def training(command: str, data: Path, out: Path, *flags: str) -> list[str]:
    name = "dpo" if command in PAIRS else "pretrain" if command == "pretrain" else "sft"
    if command in ANSWERS:
        name, flags = "questions", ("--max_completion_length", "6", "--reward", "length:0-4", *ANSWERS[command], *flags)
    at = TINY.index("--device")
    return [
        command, "--data_path", str(data / f"{name}.jsonl"), "--validation_data", str(data / f"{name}_val.jsonl"),
        "--out_dir", str(out), *TINY[:at], *TINY[at + 2 :], *FEW, *flags,
    ]  # fmt: skip


def losses(log: Path) -> list[float]:
    """Of every part, and rewards."""
    with log.open(encoding="utf-8") as lines:
        rows = [row.items() for row in csv.DictReader(lines)]
    found = [float(value or "nan") for row in rows for key, value in row if "loss" in key or "reward" in key]
    assert found
    return found


def assert_same_runs(here: Path, there: Path, number: int) -> None:
    """All runs in both folders logged the same losses and ended with the same weights."""
    runs = sorted(path.parent.name for path in here.glob("*/metrics.csv"))
    assert len(runs) == number
    for name in runs:
        one, two = (losses(out / name / "metrics.csv") for out in (here, there))
        assert one == pytest.approx(two, rel=1e-5, abs=1e-6, nan_ok=True), name
        first, second = (load(out / name / "last.pt")["model_state_dict"] for out in (here, there))
        torch.testing.assert_close(second, first, rtol=0, atol=1e-4)


def evaluation(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())["models"][0]
    return {name: found[name] for name in ("perplexity", "accuracy", "generation")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_family_trains_writes_and_is_evaluated_there_as_here(
    architecture: str, demo_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    on_the_cpu(training("pretrain", demo_data, here, "--architecture", architecture))
    weights = str(here / f"{'' if architecture == 'ar' else architecture + '_'}pretrain_32.pth")
    asked = ["evaluate", "--checkpoint", weights, "--data_path", str(demo_data / "pretrain_val.jsonl"), *WRITE,
             "--eval_samples", "4", "--noise_samples", "2", "--max_seq_len", "64", "--num_samples", "2",
             "--metrics", "perplexity,accuracy,generation"]  # fmt: skip
    on_the_cpu([*asked, "--output", str(here / "evaluation.json")])
    on_the_device(
        training("pretrain", demo_data, there, "--architecture", architecture),
        [*asked, "--output", str(there / "evaluation.json")],
        ["generate", "--checkpoint", weights, "--prompt", "Once", "Mia has", *WRITE],
    )
    assert_same_runs(here, there, 1)
    one, two = (evaluation(out / "evaluation.json") for out in (here, there))
    assert one["generation"]["texts"] == two["generation"]["texts"]
    assert one["perplexity"]["loss"] == pytest.approx(two["perplexity"]["loss"], rel=1e-5)
    assert one["accuracy"] == two["accuracy"]


@pytest.mark.slow
def test_all_stages_train_there_as_here(demo_data: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    start = str(here / "full_sft_32.pth")
    data = shutil.copytree(demo_data, tmp_path / "data")
    for name in ("questions", "questions_val"):
        rows = [json.dumps({"prompt": f"{n} + {n}?", "answer": str(2 * n)}) for n in range(12)]
        (data / f"{name}.jsonl").write_text("\n".join(rows))
    for out, follow in ((here, on_the_cpu), (there, on_the_device)):
        follow(
            *(training(command, data, out) for command in ("sft", "dpo", "reward", *ANSWERS)),
            [*training("distill", data, out / "taught"), "--teacher", start],
            [*training("lora", data, out / "adapted"), "--pretrained_path", start],
            [
                "evaluate-instructions",
                "--checkpoint",
                start,
                "--data_path",
                str(data / "sft_val.jsonl"),
                "--num_samples",
                "3",
                "--max_new_tokens",
                "6",
            ],
        )
    for part, number in (("", 6), ("taught", 1), ("adapted", 1)):
        assert_same_runs(here / part, there / part, number)
