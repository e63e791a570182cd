"""minillm compare: budgets mean what they say, FLOPs are counted, runs go on, and one page tells all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from nursery import Nursery

from minillm.commands import run_command
from minillm.compare import CompareSettings, arena, page
from minillm.compare.arena import Arm, compare
from minillm.compare.budget import COUNTED_ROWS, flops_per_step, read_budget
from minillm.config import UsageError, parse
from minillm.models.config import ModelConfig, ModelSettings, build_model_config
from minillm.text.tokenizer import Tokenizer

SIZES = ("--hidden_size", "32", "--num_hidden_layers", "2", "--max_seq_len", "32")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("tokens:600k", 146),
        ("tokens:1e6", 244),
        ("tokens:1.5m", 366),
        ("flops:1e12", 500),
        ("steps:7", 7),
        ("tokens:5", 1),
    ],
)
def test_a_budget_is_as_many_whole_steps_as_it_pays_for(text: str, steps: int) -> None:
    assert read_budget(text).steps(tokens_per_step=4096, flops_per_step=2e9) == steps


@pytest.mark.parametrize(
    "text", ["", "600k", "tokens", "tokens:", "tokens:-5", "tokens:0", "hours:3", "tokens:1x", "tokens:."]
)
def test_what_is_no_budget_is_said(text: str) -> None:
    with pytest.raises(UsageError, match="--budget"):
        read_budget(text)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"architectures": "ar,lstm"}, "lstm"),
        ({"architectures": "ar,ar"}, "once"),
        ({"seeds": "1,x"}, "--seeds"),
        ({"seeds": "1,1"}, "--seeds"),
        ({"data_path": "here.jsonl"}, "give both"),
        ({"budget": "time:3"}, "--budget"),
    ],
)
def test_impossible_settings_are_refused_before_anything_happens(flags: dict[str, str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        CompareSettings(**flags)


def config_of(*flags: str) -> ModelConfig:
    (settings,) = parse("", "", [ModelSettings], [*SIZES[:4], *flags])
    return build_model_config(settings, vocab_size=Tokenizer.load().vocab_size, max_seq_len=32, causal=True)


def linear_flops(config: ModelConfig) -> int:
    """6 FLOPs a token for every weight of a layer's products."""
    width, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    attention = 2 * width * heads * config.head_dim
    return 6 * config.num_hidden_layers * (attention + 3 * width * config.intermediate_size)


@pytest.mark.usefixtures("plain_products")  # what their blocks leave out is not in the formula
def test_the_flops_of_ar_are_those_of_the_formula() -> None:
    config, rows, length = config_of(), 10, 32
    found = flops_per_step(arena.parsed([*SIZES, "--architecture", "ar"]), rows=rows, total_steps=100)
    tokens = rows * length
    head = 6 * config.vocab_size * config.hidden_size * rows * (length - 1)  # the last position predicts nothing
    pairs = rows * config.num_attention_heads * length * (length + 1) // 2
    attention = 7 * 2 * pairs * config.head_dim * config.num_hidden_layers  # two products forward, five backward
    assert found == linear_flops(config) * tokens + head + attention


def test_first_passes_and_predictions_of_hidden_tokens_only_are_counted() -> None:
    def flops(*flags: str) -> float:
        return flops_per_step(arena.parsed([*SIZES, *flags]), rows=COUNTED_ROWS, total_steps=100)

    ar, diffusion = flops("--architecture", "ar"), flops("--architecture", "diffusion")
    alone = flops("--architecture", "sdd", "--belief_share", "0")
    twice = flops("--architecture", "sdd", "--belief_share", "1")
    body = linear_flops(config_of()) * COUNTED_ROWS * 32
    assert body < diffusion < ar  # about half of the positions are hidden, so half of the logits are taken
    assert alone >= diffusion and twice > alone + body / 3  # a first pass forward is a third of forward and backward
    assert flops("--architecture", "sdd", "--denoiser", "bilateral") > twice


@pytest.fixture(scope="module")
def arena_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arena")


@pytest.fixture(scope="module")
def settings(arena_folder: Path) -> CompareSettings:
    from minillm.data.demo import generate_demo

    generate_demo(arena_folder / "demo", size=30)
    return CompareSettings(
        data_path=str(arena_folder / "demo/pretrain.jsonl"),
        validation_data=str(arena_folder / "demo/pretrain_val.jsonl"),
        budget="steps:3", hidden_size=32, num_hidden_layers=1, max_seq_len=32, batch_size=4, eval_samples=4,
        num_samples=2, max_new_tokens=8, train_args="--eval_every 2 --save_every 2", out_dir=str(arena_folder / "out"),
    )  # fmt: skip


ARMS = [Arm("ar", ("--architecture", "ar")), Arm("diffusion", ("--architecture", "diffusion"))]


@pytest.fixture(scope="module")
def finished(settings: CompareSettings, nursery: Nursery) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "run_command", lambda command: run_command([str(nursery.python), *command[1:]]))
        return compare(settings, ARMS)


def test_one_page_shows_what_was_spent_the_results_and_texts(finished: Path) -> None:
    text = finished.read_text()
    headings = ("What was spent", "Perplexity", "Generation", "Speed", "Texts of ar", "Texts of diffusion")
    parts = [f"## {heading}" for heading in headings]
    for part in ("# The arena: ar, diffusion", *parts, "minillm compare --data_path", "![charts](compare.png)"):
        assert part in text, part
    assert finished.with_suffix(".png").is_file()


def test_all_runs_have_equal_steps_and_a_judge_that_began_elsewhere(finished: Path) -> None:
    result = json.loads(finished.with_suffix(".json").read_text())
    assert {run["steps"] for run in [*result["runs"], result["judge"]]} == {3}
    assert {run["tokens"] for run in result["runs"]} == {3 * 4 * 32}
    assert result["judge"]["seed"] not in {run["seed"] for run in result["runs"]}
    assert all(run["flops"] > 0 and run["seconds"] > 0 and len(run["curve"]) >= 2 for run in result["runs"])
    labels = [model["checkpoint"]["label"] for model in result["evaluation"]["models"]]
    assert labels == ["ar", "diffusion"]
    assert [m["perplexity"]["likelihood"] for m in result["evaluation"]["models"]] == ["exact", "upper_bound"]


@pytest.mark.usefixtures("finished")
def test_complete_runs_are_not_trained_again_and_a_stopped_one_goes_on(
    settings: CompareSettings, arena_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(arena, "run_command", lambda command: started.append(list(command)) or 0)
    folder = arena_folder / "out/runs/ar_42"
    first = arena.train(settings, ARMS[0], 42, folder)
    assert not started and first.steps == 3
    memory = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**memory, "complete": False}))
    assert arena.train(settings, ARMS[0], 42, folder) == first
    assert started[-1][-2:] == ["--resume_from", "auto"]
    arena.train(replace(settings, batch_size=8), ARMS[0], 42, folder)
    assert "--resume_from" not in started[-1]  # another run in this place


def test_a_run_that_fails_ends_the_comparison_with_its_exit_code(
    settings: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arena, "run_command", lambda command: 143)
    with pytest.raises(SystemExit) as stopped:
        arena.train(settings, ARMS[0], 42, tmp_path / "run")
    assert stopped.value.code == 143 and "goes on from there" in capsys.readouterr().out


def test_several_seeds_are_a_mean_with_its_range(finished: Path) -> None:
    result = json.loads(finished.with_suffix(".json").read_text())
    model = result["evaluation"]["models"][0]
    other = json.loads(json.dumps(model))
    model["perplexity"]["bits_per_byte"], other["perplexity"]["bits_per_byte"] = 2.0, 3.0
    result["evaluation"]["models"] = [model, other]
    result["runs"] = [result["runs"][0], {**result["runs"][0], "seed": 7}]
    text = page.markdown(result, "")
    assert "## Over the seeds" in text and "2.5000 (2.0000 to 3.0000)" in text
