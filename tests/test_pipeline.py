"""What scripts/run.sh runs: decisions, data, commands and signals, with a stand-in for the stages."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minillm import commands, pipeline
from minillm.log import UserError
from minillm.pipeline import PipelineSettings, datasets, discovery, environment, estimate, stages
from minillm.pipeline.datasets import StageData
from minillm.pipeline.environment import flag_values, read_environment
from minillm.train import arithmetic

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = """
import json, os, pathlib, sys
command, arguments = sys.argv[1], sys.argv[2:]
values = {word[2:]: following for word, following in zip(arguments, [*arguments[1:], ""]) if word[:2] == "--"}
with open(os.environ["STAND_IN_LOG"], "a") as log:
    print(json.dumps([command, values, os.environ.get("MINILLM_PRETRAINED_PATH")]), file=log)
if os.environ.get("STAND_IN_FAILS") == command:
    sys.exit(7)
if os.environ.get("STAND_IN_STOPS") == command:
    sys.exit(143)
if command == "generate":
    print("answer to", values["prompt"])
elif command == "evaluate":
    measured = {"models": [{"perplexity": {"loss": 2.5, "perplexity": 12.18}, "accuracy": {"accuracy": 0.5}}]}
    pathlib.Path(values["output"]).write_text(json.dumps(measured))
else:
    stage = {"sft": "full_sft", "dpo": "rlhf"}.get(command, command)
    name = f"{stage}_{values['hidden_size']}" + ("_moe" if "use_moe" in values else "")
    folder = pathlib.Path(values["out_dir"]) / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text("step,train/loss,val/loss\\n0,,5.0\\n4,4.5,4.0\\n")
    folder.with_suffix(".pth").write_text(command)
    read = {"max_seq_len": 128, "seed": 42, "data_path": values["data_path"], "validation_data": ""}
    (folder / "training_config.json").write_text(json.dumps({**read, **values, "max_seq_len": 128}))
"""


class Runner:
    """Runs the pipeline in a folder of its own and tells which commands it gave."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.log = folder / "commands.jsonl"

    def __call__(self, *options: str, **variables: str) -> list[list]:
        for name, value in variables.items():
            self.monkeypatch.setenv(name, str(value))
        self.log.unlink(missing_ok=True)
        pipeline.run(PipelineSettings(**dict.fromkeys(options, True)))
        return self.commands()

    def commands(self) -> list[list]:
        """Without the evaluations of stages."""
        return [command for command in self.all_commands() if not self.evaluates_a_stage(command)]

    def all_commands(self) -> list[list]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def evaluates_a_stage(self, command: list) -> bool:
        return Path(command[1].get("output", "")).name == "evaluation.json"

    def trained(self) -> list[str]:
        return [name for name, _, _ in self.commands() if name in ("pretrain", "sft", "dpo")]


@pytest.fixture
def runner(tmp_path, monkeypatch) -> Runner:
    root = tmp_path / "repository"
    (root / "data" / "chinese").mkdir(parents=True)
    for name, _ in datasets.SHIPPED.values():
        shutil.copy(ROOT / "data" / "chinese" / name, root / "data" / "chinese" / name)
    known = [*environment.DATA_VARIABLES.values(), *environment.ARGUMENT_VARIABLES.values()]
    for name in [
        *known,
        "MINILLM_PRETRAINED_PATH",
        "USE_MOE",
        "ARCHITECTURE",
        "TF_DIR",
        "OUT_DIR",
        "DATA_DIR",
    ]:
        monkeypatch.delenv(name, raising=False)
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    for module in (stages, pipeline):
        monkeypatch.setattr(module, "PROGRAM", (sys.executable, str(script)))
    monkeypatch.setattr(environment, "repository_root", lambda: root)
    monkeypatch.setattr(arithmetic, "measure_speed", lambda *_, **__: 1e11)
    monkeypatch.setattr("minillm.data.demo.DEFAULT_SIZE", 20)
    monkeypatch.setattr("minillm.eval.report.draw_curves", lambda *_: False)
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "commands.jsonl"))
    monkeypatch.setenv("MODEL_HIDDEN_SIZE", "64")
    monkeypatch.setenv("MODEL_NUM_LAYERS", "2")
    monkeypatch.setenv("OPENBAYES_HOME", str(tmp_path / "no-cloud"))
    monkeypatch.setenv("OPENBAYES_INPUT", str(tmp_path / "no-input"))
    monkeypatch.chdir(tmp_path)
    return Runner(tmp_path, monkeypatch)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def conversation(question: str, answer: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns}


def rows_of(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def valid_weights(runner):
    """A function that writes weights of the configured model to a path."""
    import torch

    from minillm.models.transformer import LanguageModel

    def write(path: Path, damage=lambda weights: None) -> Path:
        config = discovery.model_config(read_environment(os.environ, smoke_test=False))
        weights = LanguageModel(config).state_dict()
        damage(weights)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(weights, path)
        return path

    return write


# --- which stages run, and from what ---


def test_each_stage_starts_from_the_checkpoint_of_the_one_before(runner, capsys):
    (runner.folder / "repository" / "out").mkdir()
    (runner.folder / "repository" / "out" / "pretrain_64.pth").write_text("of an earlier run")
    commands = runner()
    assert [name for name, _, _ in commands] == ["pretrain", "sft", "dpo", "generate", "generate", "generate"]
    pretrain, sft, dpo = (values for _, values, _ in commands[:3])
    out = runner.folder / "repository" / "out"
    assert "pretrained_path" not in pretrain
    assert sft["pretrained_path"] == str(out / "pretrain_64.pth")
    assert dpo["pretrained_path"] == str(out / "full_sft_64.pth")
    assert commands[3][1]["checkpoint"] == str(out / "rlhf_64.pth")
    printed = capsys.readouterr().out
    assert "starts from repository/out/pretrain_64.pth (of this run)" in printed
    assert "[estimate] Roughly" in printed and "[estimate] Estimated" in printed
    assert "5.0000 → 4.0000" in printed and (out / "report.md").is_file()


def test_the_printed_commands_can_be_typed(runner, capsys):
    runner()
    typed = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert len(typed) == 6  # three stages, each with its evaluation
    assert subprocess.run(typed[0], shell=True, cwd=runner.folder).returncode == 0
    first, again = runner.commands()[0][1], runner.commands()[-1][1]
    assert {name: os.path.abspath(value) for name, value in again.items()} == {
        name: os.path.abspath(value) for name, value in first.items()
    }


def test_without_options_an_earlier_pretrain_checkpoint_is_trained_anew(runner, valid_weights):
    valid_weights(runner.folder / "repository" / "out" / "pretrain_64.pth")
    runner()
    assert runner.trained() == ["pretrain", "sft", "dpo"]


def test_every_stage_is_evaluated_on_what_it_held_out_before_the_next_begins(runner):
    runner(PRETRAIN_ARGS="--validation_data own_val.jsonl", SFT_ARGS="--seed 7")
    commands = runner.all_commands()
    assert [name for name, _, _ in commands if name != "generate"] == [
        "pretrain", "evaluate", "sft", "evaluate", "dpo", "evaluate",
    ]  # fmt: skip
    pretrain, sft, dpo = (values for name, values, _ in commands if name == "evaluate")
    assert Path(pretrain["checkpoint"]).name == "pretrain_64.pth" and pretrain["data_path"] == "own_val.jsonl"
    assert Path(dpo["checkpoint"]).name == "rlhf_64.pth" and dpo["data_path"] == sft["data_path"]
    report = (runner.folder / "repository" / "out" / "report.md").read_text()
    assert "out/pretrain_64/evaluation.md" in report


def test_training_data_without_a_validation_file_is_evaluated_on_the_rows_held_out(runner, tmp_path):
    text = tmp_path / "own.jsonl"
    text.write_text('{"text": "one"}\n{"text": "two"}\n')
    runner(PRETRAIN_JSON=text, PRETRAIN_ARGS="--seed 7")
    values = next(values for name, values, _ in runner.all_commands() if name == "evaluate")
    assert (values["data_path"], values["held_out_seed"], values["max_seq_len"]) == (str(text), "7", "128")


def test_a_failed_evaluation_is_said_and_does_not_end_the_run(runner, capsys):
    runner.monkeypatch.setenv("STAND_IN_FAILS", "evaluate")
    runner()
    assert runner.trained() == ["pretrain", "sft", "dpo"]
    assert "The evaluation of pretrain failed with exit code 7" in capsys.readouterr().out


def test_skip_pretrain_takes_a_valid_checkpoint_evaluates_it_and_goes_on(runner, valid_weights, capsys):
    path = valid_weights(runner.folder / "repository" / "out" / "pretrain_64.pth")
    commands = runner("skip_pretrain")
    assert [name for name, _, _ in commands[:3]] == ["evaluate", "sft", "dpo"]
    assert commands[0][1]["checkpoint"] == commands[1][1]["pretrained_path"] == str(path)
    printed = capsys.readouterr().out
    for line in (
        "[stage] Found existing pretrain checkpoint: repository/out/pretrain_64.pth",
        "[stage] Checking checkpoint quality…",
        f"[stage] Checkpoint looks valid (size: {path.stat().st_size // 1024}KB)",
        "[stage] Skipping pretrain stage, will use existing checkpoint for SFT",
    ):
        assert line in printed.splitlines()
    assert "MINILLM_PRETRAINED_PATH: not set" in printed
    assert "pretrain (found)" in printed and "12.18" in printed


def test_skip_pretrain_looks_at_the_variable_then_the_cloud_then_out(runner, valid_weights, capsys):
    cloud, local = runner.folder / "home" / "out", runner.folder / "repository" / "out"
    runner.monkeypatch.setenv("OPENBAYES_HOME", str(runner.folder / "home"))
    write_rows(runner.folder / "home" / "sft_mini_512.jsonl", [conversation("Who are you?", "I am a model.")])
    local_weights, cloud_weights = (valid_weights(folder / "pretrain_64.pth") for folder in (local, cloud))
    named = valid_weights(runner.folder / "mine.pth")
    assert runner("skip_pretrain")[1][1]["pretrained_path"] == str(cloud_weights)
    assert runner("skip_pretrain", MINILLM_PRETRAINED_PATH="mine.pth")[1][1]["pretrained_path"] == str(named)
    cloud_weights.unlink()
    capsys.readouterr()
    found = runner("skip_pretrain", MINILLM_PRETRAINED_PATH="gone.pth")[1][1]["pretrained_path"]
    assert found == str(local_weights)
    printed = capsys.readouterr().out
    assert "gone.pth is not there" in printed and "home/out/pretrain_64.pth is not there" in printed


def test_skip_pretrain_without_a_checkpoint_trains(runner, capsys):
    runner("skip_pretrain")
    assert runner.trained() == ["pretrain", "sft", "dpo"]
    assert "[stage] No pretrain checkpoint found, will train from scratch" in capsys.readouterr().out


def _nan(weights):
    weights["model.norm.weight"][0] = float("nan")


def _other_shape(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()


@pytest.mark.parametrize("damage", [_nan, _other_shape, lambda weights: weights.pop("model.norm.weight")])
def test_weights_that_do_not_hold_what_they_must_are_trained_again(runner, valid_weights, capsys, damage):
    valid_weights(runner.folder / "repository" / "out" / "pretrain_64.pth", damage)
    runner("skip_pretrain")
    assert runner.trained() == ["pretrain", "sft", "dpo"]
    printed = capsys.readouterr().out
    assert "[stage] Checkpoint appears corrupted or too small, will retrain" in printed
    assert "model.norm.weight" in printed


def test_a_large_file_of_zeros_is_not_a_checkpoint_and_is_not_started_from(runner, capsys):
    (runner.folder / "zeros.pth").write_bytes(bytes(3_000_000))
    commands = runner("skip_pretrain", MINILLM_PRETRAINED_PATH="zeros.pth")
    assert commands[0][0] == "pretrain" and "pretrained_path" not in commands[0][1]
    assert "appears corrupted or too small" in capsys.readouterr().out


def test_force_wins_over_skip_and_over_the_variable(runner, valid_weights, capsys):
    valid_weights(runner.folder / "mine.pth")
    commands = runner("skip_pretrain", "force_pretrain", MINILLM_PRETRAINED_PATH="mine.pth")
    assert runner.trained() == ["pretrain", "sft", "dpo"]
    assert "pretrained_path" not in commands[0][1]
    assert {inherited for _, _, inherited in commands[:3]} == {None}
    assert "Checking checkpoint" not in capsys.readouterr().out


def test_pretraining_continues_from_the_variable_and_later_stages_do_not_see_it(runner, valid_weights):
    valid_weights(runner.folder / "mine.pth")
    commands = runner(MINILLM_PRETRAINED_PATH="mine.pth")
    assert commands[0][1]["pretrained_path"] == str(runner.folder / "mine.pth")
    assert commands[1][1]["pretrained_path"].endswith("out/pretrain_64.pth")
    assert {inherited for _, _, inherited in commands[:3]} == {None}


def test_a_variable_that_names_nothing_is_an_error_before_any_work(runner):
    with pytest.raises(UserError, match="gone.pth"):
        runner(MINILLM_PRETRAINED_PATH="gone.pth")
    assert runner.commands() == []


def test_a_failing_stage_ends_the_run_with_its_exit_code(runner, capsys):
    with pytest.raises(SystemExit) as ended:
        runner(STAND_IN_FAILS="sft")
    assert ended.value.code == 7
    assert runner.trained() == ["pretrain", "sft"]
    assert "sft failed with exit code 7" in capsys.readouterr().out


def test_a_stopped_stage_tells_the_command_that_goes_on(runner, capsys):
    with pytest.raises(SystemExit) as ended:
        runner(STAND_IN_STOPS="dpo", SFT_ARGS="--epochs 3")
    assert ended.value.code == 143
    hint = "SFT_ARGS='--epochs 3 --resume_from auto' DPO_ARGS='--resume_from auto' scripts/run.sh --skip-pretrain"
    assert hint in capsys.readouterr().out


def test_the_mixture_of_experts_has_names_of_its_own(runner):
    commands = runner(USE_MOE="1")
    assert "use_moe" in commands[0][1]
    assert commands[1][1]["pretrained_path"].endswith("pretrain_64_moe.pth")


# --- data ---


def test_demo_data_is_made_once_with_the_chinese_rows_mixed_in(runner, capsys):
    commands = runner()
    sft = commands[1][1]
    answers = [row["conversations"] for row in rows_of(sft["data_path"])]
    assert any("MiniLLM" in turns[-1]["content"] and turns[0]["content"] == "你是谁？" for turns in answers)
    assert sft["validation_data"].endswith("sft_val.jsonl")
    assert "[data] Generating demo data" in capsys.readouterr().out
    runner()
    printed = capsys.readouterr().out
    assert "Generating" not in printed
    assert "[data] full_sft: repository/data/processed/sft_with_chinese.jsonl, validation: " in printed


def test_demo_data_somebody_made_is_used_as_it_is_and_other_files_are_never_replaced(runner):
    from minillm.data.demo import generate_demo

    generate_demo(runner.folder / "own", size=30, seed=5)
    made = (runner.folder / "own" / "pretrain.jsonl").read_bytes()
    runner(DATA_DIR="own")
    assert (runner.folder / "own" / "pretrain.jsonl").read_bytes() == made

    mine = write_rows(runner.folder / "texts" / "pretrain.jsonl", [{"text": "mine"}])
    with pytest.raises(UserError, match="PRETRAIN_JSON"):
        runner(DATA_DIR="texts")
    assert rows_of(mine) == [{"text": "mine"}]


def test_generation_that_was_interrupted_is_done_again(runner, capsys):
    runner()
    folder = runner.folder / "repository" / "data" / "processed"
    (folder / "manifest.json").unlink()
    (folder / "dpo.jsonl").unlink()
    (folder / ".run_sh_demo").write_text("unfinished")
    capsys.readouterr()
    runner()
    assert "[data] Generating demo data" in capsys.readouterr().out and (folder / "dpo.jsonl").is_file()


def test_named_data_is_used_and_its_trainer_holds_out_the_validation(runner, capsys):
    mine = write_rows(runner.folder / "mine.jsonl", [{"text": f"Text number {n}."} for n in range(30)])
    commands = runner(PRETRAIN_JSON="mine.jsonl")
    assert commands[0][1]["data_path"] == str(mine) and "validation_data" not in commands[0][1]
    assert "[data] pretrain: mine.jsonl, validation: a part held out of it" in capsys.readouterr().out
    assert commands[1][1]["data_path"].endswith("sft_with_chinese.jsonl")


@pytest.mark.parametrize("variable", ["PRETRAIN_JSON", "SFT_JSON", "DPO_JSON"])
def test_a_missing_dataset_is_an_error_before_any_stage_runs(runner, variable):
    with pytest.raises(UserError) as error:
        runner(**{variable: "nowhere/data.jsonl"})
    assert "[data] Required dataset not found: nowhere/data.jsonl" in str(error.value)
    assert variable in str(error.value)
    assert runner.commands() == []


def test_pretraining_data_is_not_required_when_pretraining_is_skipped(runner, valid_weights):
    valid_weights(runner.folder / "repository" / "out" / "pretrain_64.pth")
    runner("skip_pretrain", PRETRAIN_JSON="nowhere.jsonl")
    assert runner.trained() == ["sft", "dpo"]


def test_only_the_smoke_test_says_that_its_samples_mean_nothing(runner, capsys):
    for options, expected in ((("smoke_test",), True), ((), False)):
        runner(*options)
        report = (runner.folder / "repository" / "out" / "report.md").read_text(encoding="utf-8")
        assert ("[stage] Four steps a stage teach nothing" in capsys.readouterr().out) is expected
        assert ("Four steps a stage teach nothing" in report) is expected


def test_the_smoke_test_is_small_and_on_the_cpu(runner):
    runner.monkeypatch.delenv("MODEL_HIDDEN_SIZE")
    runner.monkeypatch.delenv("MODEL_NUM_LAYERS")
    commands = runner("smoke_test")
    for (_, values, _), rows in zip(commands[:3], (20, 16, 8)):  # the test's demo has only 20 texts
        assert len(rows_of(values["data_path"])) == rows
        assert (values["max_steps"], values["eval_samples"], values["device"]) == ("4", "8", "cpu")
        assert values["hidden_size"] == "64" and "no_wandb" in values


def test_the_smoke_test_shortens_named_data_of_any_form(runner):
    texts = "".join(json.dumps({"text": f"Text number {n}."}) + "\n" for n in range(100))
    (runner.folder / "mine.jsonl.gz").write_bytes(gzip.compress(texts.encode()))
    alpaca = [{"instruction": f"Say {n}", "input": "", "output": f"I say {n}."} for n in range(40)]
    (runner.folder / "alpaca.json").write_text(json.dumps(alpaca))
    commands = runner("smoke_test", PRETRAIN_JSON="mine.jsonl.gz", SFT_JSON="alpaca.json", MODEL_HIDDEN_SIZE="128")
    assert [row["text"] for row in rows_of(commands[0][1]["data_path"])] == [f"Text number {n}." for n in range(64)]
    assert len(rows_of(commands[1][1]["data_path"])) == 16
    assert [values["max_seq_len"] for _, values, _ in commands[:3]] == ["128", "512", "128"]
    assert commands[0][1]["hidden_size"] == "128"


# --- cloud ---


def test_on_the_cloud_its_conversations_are_found_cleaned_and_used(runner, capfd):
    rows = [conversation(f"Question {n}?", f"The answer is {n}.") for n in range(5)]
    write_rows(runner.folder / "input" / "sft_mini_512.jsonl", [*rows, rows[0], conversation("Why?", " ")])
    (runner.folder / "home").mkdir()
    commands = runner(OPENBAYES_HOME="home", OPENBAYES_INPUT="input")
    cleaned = runner.folder / "repository" / "data" / "final" / "sft_high_quality.jsonl"
    assert commands[1][1]["data_path"] == str(cleaned) and len(rows_of(cleaned)) == 5
    assert commands[0][1]["tensorboard_dir"] == str(runner.folder / "home" / "tf_dir")
    printed = capfd.readouterr().out
    assert "[cloud] " in printed and "Processing complete: kept 5, removed 2" in printed
    assert "final/sft_mini_512.cleaned.jsonl: not there" in printed


def test_on_the_cloud_cleaned_conversations_come_first(runner):
    (runner.folder / "home").mkdir()
    write_rows(runner.folder / "input" / "sft_mini_512.jsonl", [conversation("Raw?", "This is the raw one.")])
    write_rows(
        runner.folder / "home" / "final" / "sft_mini_512.cleaned.jsonl",
        [conversation("Clean?", "This is clean.")],
    )
    commands = runner(OPENBAYES_HOME="home", OPENBAYES_INPUT="input")
    assert rows_of(commands[1][1]["data_path"])[0]["conversations"][0]["content"] == "Clean?"


def test_on_the_cloud_a_missing_dataset_says_what_to_set_and_the_smoke_test_goes_on(runner, capsys):
    (runner.folder / "input").mkdir()
    with pytest.raises(UserError, match=r"\[data\] Required dataset not found: .*input/sft_mini_512.jsonl") as error:
        runner(OPENBAYES_INPUT="input")
    assert "SFT_JSON" in str(error.value)
    runner("smoke_test")
    assert "[data] Required dataset not found:" in capsys.readouterr().out
    assert runner.trained() == ["pretrain", "sft", "dpo"]


# --- settings and estimates ---


def test_a_users_flag_replaces_the_default_in_either_spelling(runner):
    commands = runner(PRETRAIN_ARGS="--max-steps=3 --batch-size 5", SFT_ARGS="--save_interval 9")
    pretrain = commands[0][1]
    assert "batch_size" not in pretrain and pretrain["batch-size"] == "5"
    assert commands[1][1]["save_interval"] == "9"


def test_a_recipe_is_not_overridden_by_the_pipelines_defaults(runner):
    values = runner(PRETRAIN_ARGS="--config mine.yaml")[0][1]
    assert "epochs" not in values and "batch_size" not in values and values["hidden_size"] == "64"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("MODEL_HIDDEN_SIZE", "big", "whole number"),
        ("MODEL_NUM_LAYERS", "0", "at least 1"),
        ("USE_MOE", "maybe", "1 or 0"),
        ("ARCHITECTURE", "rnn", "knows ar"),
        ("SFT_ARGS", "--name 'open", "SFT_ARGS"),
        ("DPO_ARGS", "--hidden-size 8", "MODEL_HIDDEN_SIZE"),
        ("PRETRAIN_ARGS", "--output-dir x", "OUT_DIR"),
        ("PRETRAIN_ARGS", "--model-size small", "MODEL_NUM_LAYERS"),
    ],
)
def test_impossible_settings_are_refused_with_the_name_of_the_variable(runner, name, value, says):
    with pytest.raises(UserError, match=says) as error:
        runner(**{name: value})
    assert name in str(error.value)
    assert runner.commands() == []


def test_defaults_lie_in_the_repository_and_given_paths_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = {"OPENBAYES_HOME": "no", "OPENBAYES_INPUT": "no"}
    settings = read_environment({**empty, "TF_DIR": "logs", "SFT_JSON": ""}, smoke_test=False)
    assert (settings.hidden_size, settings.num_layers, settings.use_moe) == (512, 8, False)
    assert settings.out_dir == ROOT / "out" and settings.data_dir == ROOT / "data" / "processed"
    assert settings.tensorboard_dir == tmp_path / "logs" and settings.datasets["full_sft"] is None


def test_flags_are_read_in_every_spelling():
    words = ("--max-steps", "3", "--compile", "--lr=1", "--output-dir", "x", "--seed", "-1")
    expected = {"max_steps": "3", "compile": "", "lr": "1", "out_dir": "x", "seed": "-1"}
    assert flag_values(words) == expected


def test_the_estimate_follows_tokens_epochs_and_steps(tmp_path, runner):
    from minillm.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load()
    text = "The old clock in the hall struck seven. " * 5
    small = write_rows(tmp_path / "small.jsonl", [{"text": text}] * 100)
    large = write_rows(tmp_path / "large.jsonl", [{"text": text}] * 5000)
    tokens, read = estimate.count_tokens(small, "pretrain", tokenizer)
    assert tokens == read == 100 * (len(tokenizer.encode(text)) + 1)
    assert estimate.count_tokens(large, "pretrain", tokenizer)[0] == pytest.approx(50 * tokens, rel=0.02)

    assert estimate.trained_tokens(tokens, {"epochs": "2"}) == 2 * tokens
    steps = {"max_steps": "3", "batch_size": "4", "grad_accum_steps": "2", "max_seq_len": "10", "epochs": "2"}
    assert estimate.trained_tokens(10_000, steps) == 240

    config = discovery.model_config(read_environment(os.environ, smoke_test=False))
    files = {"pretrain": StageData(small, None, is_demo=False)}
    slow, fast = (
        estimate.estimate_stages(files, {"pretrain": {}}, config, tokenizer, {"pretrain": speed})[0]
        for speed in (1e8, 1e9)
    )
    adamw = {"pretrain": {"optimizer": "adamw"}}
    with_adamw = estimate.estimate_stages(files, adamw, config, tokenizer, {"pretrain": 1e8})
    assert with_adamw[0].seconds < slow.seconds
    extra = slow.seconds - estimate.SECONDS_AROUND
    assert extra == pytest.approx(10 * (fast.seconds - estimate.SECONDS_AROUND))
    assert estimate.compare([slow], {"pretrain": 65.0}).endswith("→ 1m 05s)")


def test_each_stage_is_estimated_at_the_speed_of_its_own_dtype_and_device(runner, monkeypatch):
    asked = []

    def measure(hidden_size: int, **how: object) -> float:
        asked.append(how)
        return 1e11 * len(asked)

    monkeypatch.setattr(arithmetic, "measure_speed", measure)
    config = discovery.model_config(read_environment(os.environ, smoke_test=False))
    flags = {"pretrain": {"dtype": "float32"}, "full_sft": {"device": "cpu"}, "rlhf": {"dtype": "float32"}}
    assert estimate.stage_speeds(flags, config) == {"pretrain": 1e11, "full_sft": 2e11, "rlhf": 1e11}
    assert [(how["on_cpu"], how["dtype_name"]) for how in asked] == [(False, "float32"), (True, "auto")]
    assert estimate.stage_speeds({"pretrain": {"dtype": "float23"}}, config)  # training itself names the mistake


def test_the_estimate_of_preference_tuning_counts_the_padding(tmp_path):
    from minillm.text.tokenizer import Tokenizer

    def side(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]

    tokenizer = Tokenizer.load()
    short, long = (sum(len(tokenizer.encode(turn["content"])) + 5 for turn in side(a)) for a in ("No.", "No. " * 50))
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"chosen": side("No."), "rejected": side("No. " * 50)}] * 10)
    assert estimate.count_tokens(pairs, "rlhf", tokenizer) == (10 * (short + long), 20 * long)


def test_the_parameter_count_is_the_models(runner):
    from minillm.models.transformer import LanguageModel

    config = discovery.model_config(read_environment(os.environ, smoke_test=False))
    matrices = sum(p.numel() for p in LanguageModel(config).parameters() if p.dim() > 1)
    assert arithmetic.active_parameters(config) == matrices


def test_what_is_no_matrix_product_limits_fast_processors():
    # Measured with two threads: (products alone, training) in GFLOP/s, of which the estimate may miss a fifth.
    for products, training in ((203, 152), (2200, 404)):
        assert arithmetic.reached_speed(products * 1e9, threads=2) == pytest.approx(training * 1e9, rel=0.2)
    assert arithmetic.reached_speed(4e14, threads=0) < 4e14


def test_the_probe_measures_a_possible_speed():
    assert 1e8 < arithmetic.measure_speed(128, on_cpu=True, seconds=0.05) < 1e15


# --- signals ---

SLEEPER = """
import pathlib, signal, sys, time
def stop(number, frame):
    with open(sys.argv[1], "a") as log: log.write(f"got {number}\\n")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)
open(sys.argv[1], "a").write("ready\\n")
time.sleep(30)
"""
PARENT = """
import sys
from minillm.commands import run_command
sys.exit(run_command([sys.executable, *sys.argv[1:]]))
"""


def start_sleeper(folder: Path) -> tuple[subprocess.Popen, Path]:
    script, log = folder / "sleeper.py", folder / "log"
    script.write_text(SLEEPER)
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(script), str(log)], env=variables, stdout=subprocess.DEVNULL
    )
    wait_for(log, "ready")
    return parent, log


def wait_for(log: Path, text: str) -> None:
    for _ in range(200):
        if log.exists() and text in log.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{text!r} never came")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_stage_once_and_its_exit_code_comes_back(tmp_path, number, code):
    parent, log = start_sleeper(tmp_path)
    parent.send_signal(number)
    assert parent.wait(10) == code
    assert log.read_text() == f"ready\ngot {int(number)}\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent is gone")
def test_a_stage_stops_when_the_pipeline_is_killed(tmp_path):
    parent, log = start_sleeper(tmp_path)
    parent.kill()
    parent.wait(10)
    wait_for(log, f"got {int(signal.SIGTERM)}")


def test_a_stage_that_dies_of_a_signal_is_counted_as_a_shell_does():
    suicide = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert commands.run_command([sys.executable, "-c", suicide]) == 137


def test_a_model_of_the_users_own_data_is_asked_the_users_own_questions(tmp_path: Path) -> None:
    from minillm.pipeline.datasets import StageData, sample_prompts

    file = tmp_path / "mine.jsonl"
    long = "why " * 100
    questions = ["What is a mill?", long, "Where is the sea?", "Who sings?", "Is it late?"]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "Yes."}]} for q in questions]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    prompts = sample_prompts(StageData(file, None, is_demo=False))
    assert prompts == [("mine.jsonl:1", questions[0]), ("mine.jsonl:3", questions[2]), ("mine.jsonl:4", questions[3])]
    assert sample_prompts(StageData(file, None, is_demo=True)) == []
