"""The benchmarks run; what they measure is another matter (docs/performance.md)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "peers", "time_to_loss", "data", "lora_cost", "rollouts", "rl", "learning")
TINY = ["--seq", "32", "--batch", "2", "--steps", "1", "--warmup", "1"]

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_benchmark(script):
    done = call(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "--results" in done.stdout


def test_a_mistyped_flag_is_refused_with_a_suggestion():
    done = call("peers", "--round", "2")
    assert done.returncode == 2
    assert "--rounds" in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_preset_is_refused_by_name(tmp_path):
    done = call("train", "--presets", "smal", "--results", str(tmp_path))
    assert done.returncode == 1
    assert "'smal'" in done.stderr and "small" in done.stderr


def test_training_and_held_out_text_are_given_together(tmp_path):
    done = call("time_to_loss", "--data", "some.txt", "--results", str(tmp_path))
    assert done.returncode == 1
    assert "--validation" in done.stderr


@pytest.mark.slow
def test_train_measures_dense_and_experts(tmp_path):
    done = call("train", "--presets", "small", "--eager", *TINY, "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "train.json").read_text())["results"]
    assert [result["kind"] for result in results] == ["dense", "moe"]
    for result in results:
        assert result["peak_mb"] > result["libraries_mb"] > 0
        assert 0 < result["utilisation"] < 2
    assert "| small" in (tmp_path / "train.md").read_text()


@pytest.mark.slow
@needs_transformers
def test_peers_compares_both_sides_in_one_run(tmp_path):
    done = call("peers", "--rounds", "2", "--eager_only", *TINY, "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "peers.json").read_text())
    assert set(result["sides"]) == {"ours eager", "peer eager", "ours eager auto"}
    assert len({side["parameters"] for side in result["sides"].values()}) == 1
    assert len(result["ratios"]["eager"]) == 2


@pytest.mark.slow
@needs_transformers
def test_time_to_loss_trains_both_sides_on_the_same_text(tmp_path):
    words = "the cat sat on the mat and looked at the moon "
    for name, count in (("train", 400), ("held_out", 40)):
        lines = "".join(json.dumps({"text": words * (1 + n % 3)}) + "\n" for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    arguments = [
        "--data", str(tmp_path / "train.jsonl"), "--validation", str(tmp_path / "held_out.jsonl"),
        "--hidden_size", "32", "--num_hidden_layers", "1", "--seq", "32", "--eval_rows", "4", "--eval_every", "2",
        "--peer_steps", "4", "--peer_batch_tokens", "64", "--our_steps", "8", "--our_batch_tokens", "32",
        "--results", str(tmp_path),
    ]  # fmt: skip
    done = call("time_to_loss", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "time_to_loss.json").read_text())
    ours, theirs = result["ours"]["points"], result["peer"]["points"]
    assert [point[0] for point in ours] == [0, 4, 8]
    assert [point[0] for point in theirs] == [0, 2, 4]
    assert ours[0][2] == pytest.approx(theirs[0][2], rel=0.05)  # both start at the loss of a uniform guess
    done = call("time_to_loss", *arguments, "--sweep", "1e-3,1e-2", "--target", "1.0")
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "sweep.json").read_text())["curves"]) == 2


@pytest.mark.slow
def test_data_compares_both_engines_and_measures_memory(tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the cat sat on the mat. " * 50}) + "\n")
    arguments = ["--data", str(tmp_path / "text.jsonl"), "--size_mb", "1", "--memory_mb", "2", "--vocab_size", "300"]
    done = call("data", *arguments, "--rounds", "1", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "data.json").read_text())
    assert result["identical"] and result["tokens_per_second"] > 0 and result["memory"]["peak_mb"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "data.md", "text.jsonl"]


@pytest.mark.slow
def test_lora_takes_less_memory_than_full_fine_tuning(tmp_path):
    done = call("lora_cost", "--steps", "1", "--seq", "32", "--batch", "2", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    cost = json.loads((tmp_path / "lora_cost.json").read_text())["cost"]
    assert 0 < cost["adapter"] < 0.05 * cost["parameters"]
    assert cost["peak_mb"]["lora"] < cost["peak_mb"]["full"]
