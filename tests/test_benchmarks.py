"""The benchmarks run; what they measure is another matter (docs/performance.md)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillm.train.precision import choose_dtype

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("speed", "time_to_loss", "data", "lora_cost", "rollouts", "rl", "learning", "gpu", "gemm", "memory")

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
    done = call("speed", "--round", "2")
    assert done.returncode == 2
    assert "--rounds" in done.stderr and "Traceback" not in done.stderr


def refusal(tmp_path, *arguments: str) -> str:
    done = call("speed", "--results", str(tmp_path), *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
    return done.stderr


def test_an_unknown_part_preset_or_family_is_refused_by_name(tmp_path):
    assert "'sfd'" in (said := refusal(tmp_path, "--parts", "sfd")) and "sft" in said
    assert "'smal'" in (said := refusal(tmp_path, "--parts", "training", "--presets", "smal")) and "small" in said
    assert "'ra'" in (said := refusal(tmp_path, "--parts", "training", "--families", "ra")) and "diffusion" in said


def test_a_checkout_without_the_peers_code_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_DIR", "nowhere")
    said = refusal(tmp_path, "--parts", "training", "--quick")
    assert "NANOGPT_DIR is 'nowhere'" in said and "model.py" in said and "first step" not in said


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder's modules as its programs import them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_exponent_of_a_power_law_is_found(benchmarks):
    from speed_parts.growth import exponent

    assert exponent((2, 4, 8, 32), [3 * size**1.7 for size in (2, 4, 8, 32)]) == pytest.approx(1.7)
    assert exponent((1, 2), [5.0, 5.0]) == 0.0


def test_sides_take_turns_and_every_other_round_goes_backwards(benchmarks):
    from speed_parts.base import in_turns, ratios

    called: list[str] = []

    def side(name: str) -> float:
        called.append(name)
        return float(len(called))

    values = in_turns({name: lambda name=name: side(name) for name in "abc"}, 3, "")
    assert "".join(called) == "abccbaabc"
    assert values == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}
    assert ratios(values, "c", "a") == [3, 4 / 6, 9 / 7]


def test_a_picture_shows_the_least_and_the_most_that_were_measured(benchmarks):
    from matplotlib import pyplot
    from speed_parts.base import bars_panel

    from minillm.eval.charts import _draw_panel

    _, axis = pyplot.subplots()
    _draw_panel(axis, bars_panel("tokens/s", {"ours": [1200.0, 1630.0, 1700.0], "once": [3.0]}))
    (line,) = (each for each in axis.collections if len(each.get_segments()) == 1)
    pyplot.close("all")
    assert sorted(x for x, _ in line.get_segments()[0]) == [1200.0, 1700.0]


def test_every_command_has_its_start_up_measured_or_needs_a_network_or_processes(benchmarks):
    from speed_parts.startup import ARGUMENTS

    from minillm.cli import COMMANDS

    assert not set(ARGUMENTS) - set(COMMANDS)
    assert set(COMMANDS) - set(ARGUMENTS) == {"push", "pull", "data prepare-reasoning", "checkpoint consolidate"}


def test_training_and_held_out_text_are_given_together(tmp_path):
    done = call("time_to_loss", "--data", "some.txt", "--results", str(tmp_path))
    assert done.returncode == 1
    assert "--validation" in done.stderr


def quick(part: str, folder: Path, *arguments: str) -> dict:
    """What a quick run of a part leaves behind."""
    done = call("speed", "--parts", part, "--quick", "--results", str(folder), *arguments)
    assert done.returncode == 0, done.stderr
    assert "# " in (folder / f"speed-{part}.md").read_text()
    if importlib.util.find_spec("matplotlib"):
        assert (folder / f"speed-{part}.png").stat().st_size > 0
    return json.loads((folder / f"speed-{part}.json").read_text())


@pytest.mark.slow
@needs_transformers
def test_training_compares_sides_of_one_size(tmp_path):
    result = quick("training", tmp_path, "--kinds", "dense,moe", "--modes", "eager")
    assert [cell["kind"] for cell in result["results"]] == ["dense", "moe"]
    for cell in result["results"]:
        sides = cell["sides"]
        found = choose_dtype("auto", torch.device("cpu"))
        assert ("ours, --dtype auto" in sides) == (found != torch.float32)  # float32 is measured anyway
        assert {"ours", "transformers"} <= set(sides)
        assert len({side["parameters"] for side in sides.values()}) == 1
        assert all(side["peak_mb"] > side["libraries_mb"] > 0 for side in sides.values())
        assert sides["ours"]["ratio"]["transformers"][0] > 0


@pytest.mark.slow
def test_training_measures_families_that_transformers_does_not_have(tmp_path):
    result = quick("training", tmp_path, "--families", "diffusion,sdd", "--modes", "eager")
    assert [(cell["family"], list(cell["sides"])) for cell in result["results"]] == [
        ("diffusion", ["ours"]),
        ("sdd", ["ours"]),
    ]


@pytest.mark.slow
@needs_transformers
def test_all_sides_write_the_same_texts(tmp_path):
    result = quick("generation", tmp_path)
    assert set(result["autoregressive"]["same_tokens"].values()) == {1.0}
    assert result["diffusion"]["same_tokens"] == 1.0
    assert len(result["diffusion"]["rates"]) == 5


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_sft_counts_trained_tokens_of_all_sides(tmp_path):
    result = quick("sft", tmp_path)
    assert set(result["rates"]) == {"ours", "TRL", "TRL, packing"}
    assert all(0 < share[0] < 1 for share in result["trained_share"].values())


@pytest.mark.slow
def test_checkpoints_are_saved_in_every_way(tmp_path):
    result = quick("checkpoints", tmp_path)
    assert set(result["turns"]) == {"ours", "torch.save", "DCP save", "DCP async_save"}
    assert all(turn["complete"] >= turn["call"] > 0 for turns in result["turns"].values() for turn in turns)


@pytest.mark.slow
def test_startup_and_growth_are_measured(tmp_path):
    result = quick("startup", tmp_path)
    assert set(result["first_line_seconds"]) == {"pretrain", "generate", "checkpoint list"}
    result = quick("growth", tmp_path)
    assert set(result["seq"]["exponents"]) == {"seconds", "seconds, largest", "memory", "memory, largest"}


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


@pytest.mark.slow
def test_gpu_runs_on_a_cpu_from_its_script_and_says_that_smoke_is_no_measurement(tmp_path):
    arguments = ["--device", "cpu", "--smoke", "--results", str(tmp_path)]
    done = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
        capture_output=True, text=True, timeout=280, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    for family in ("ar", "diffusion", "sdd"):
        assert found["device"][family]["loss"] < 1e-6 and found["device"][family]["gradient"] < 1e-5
    assert 0 < found["device"]["attention"]["causal"] < 1e-5  # two kernels: close, not equal
    ours = found["results"][0]
    assert ours["side"] == "ours" and len(ours["tokens_per_second"]) == 3 and ours["mfu"] > 0
    page = (tmp_path / "gpu.md").read_text()
    assert "the numbers mean nothing" in page and "| small, 0 M" in page


@pytest.mark.slow
def test_gpu_stops_when_its_time_is_over(tmp_path):
    done = call("gpu", "--device", "cpu", "--smoke", "--minutes", "0.5", "--spent", "20", "--results", str(tmp_path))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [result["error"] for result in found["results"]] == ["no time was left"] * 2, done.stderr[-2000:]


@pytest.mark.slow
def test_gemm_measures_every_product_of_a_layer_by_every_library(tmp_path):
    arguments = ["--presets", "small", "--rows", "64", "--rounds", "1", "--no_inductor", "--results", str(tmp_path)]
    done = call("gemm", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "gemm_1.json").read_text())["results"]
    assert len(results) == 18 and {"mkl", "onednn", "openblas"} <= set(results[0]["seconds"])
