"""Settings from flags and YAML: spellings, precedence, and mistakes that are explained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from minillm.config import UsageError, parse
from minillm.methods.settings import PreferenceSettings
from minillm.models.config import ModelSettings
from minillm.train.settings import DataSettings, OptimSettings, RunSettings, TrackSettings

ALL = (ModelSettings, DataSettings, RunSettings, OptimSettings, TrackSettings, PreferenceSettings)


def read(*argv: str) -> dict[str, Any]:
    """Every setting by name."""
    return {k: v for settings in parse("minillm dpo", "", ALL, argv) for k, v in vars(settings).items()}


@pytest.mark.parametrize("flag", ["--max_steps", "--max-steps"])
def test_hyphens_and_underscores_are_one(flag: str) -> None:
    assert read(flag, "7")["max_steps"] == read(f"{flag}=7")["max_steps"] == 7


def test_hyphens_in_values_stay() -> None:
    assert read("--data-path=my-data/a-b.jsonl")["data_path"] == ("my-data/a-b.jsonl",)
    assert read("--out_dir", "my-out")["out_dir"] == "my-out"


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--output-dir", "x"], "out_dir", "x"),
        (["--accumulation_steps", "4"], "grad_accum_steps", 4),
        (["--model-size", "small"], "model_config", "small"),
        (["--save_interval", "9"], "save_every", 9),
        (["--use_moe"], "use_moe", True),
        (["--use_moe", "1"], "use_moe", True),
        (["--use_moe=false"], "use_moe", False),
        (["--use-moe", "no"], "use_moe", False),
        (["--compile"], "compile", "on"),
        (["--compile", "off"], "compile", "off"),
        (["--no-wandb"], "no_wandb", True),
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--max_steps", "1e3"], "max_steps", 1000),
        (["--epochs", "0.5"], "epochs", 0.5),
        (["--warmup_steps", "-1"], "warmup_steps", -1),
    ],
)
def test_flags_as_they_are_documented(argv: list[str], name: str, value: Any) -> None:
    assert read(*argv)[name] == value


def test_every_documented_flag_exists() -> None:
    documented = (
        "pretrained_path load_from_remote resume_from hidden_size num_hidden_layers use_moe model_config data_path "
        "validation_data out_dir epochs max_steps batch_size grad_accum_steps learning_rate warmup_steps optimizer "
        "dtype device compile num_workers max_seq_len eval_every save_every log_every keep_last "
        "early_stopping_patience seed no_wandb wandb_project wandb_run_name tensorboard_dir"
    )
    assert set(documented.split()) <= set(read())


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_recipe_holds_flags_and_flags_win(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        "learning-rate: 1e-3\nhidden_size: 128\nuse_moe: yes\noutput-dir: here\nepochs: 2\nseed:\ncompile: off\n",
    )
    values = read("--config", path, "--hidden_size", "256")
    assert (values["learning_rate"], values["hidden_size"], values["use_moe"]) == (1e-3, 256, True)
    assert (values["out_dir"], values["epochs"], values["seed"], values["compile"]) == ("here", 2.0, 42, "off")
    assert read("--output_dir", "there", "--config", path)["out_dir"] == "there"


def test_an_empty_recipe_changes_nothing(tmp_path: Path) -> None:
    assert read("--config", recipe(tmp_path, "# nothing yet\n")) == read()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden_size: 3", "recipe.yaml: unknown setting 'hiden_size'. Did you mean hidden_size"),
        ("batch_size: none", "--batch_size: 'none' is not a whole number"),
        ("- 1\n- 2", "must hold `flag: value` lines, not a list"),
        ("a: [1", "is not valid YAML"),
        ("dtype: float8", "--dtype: 'float8' is not one of"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match="(?s).*") as error:
        read("--config", recipe(tmp_path, text))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--hiden_size", "64"], "unknown argument --hiden_size. Did you mean --hidden_size?"),
        (["--learning-rat=1"], "Did you mean --learning_rate?"),
        (["--max_ste", "3"], "unknown argument --max_ste. Did you mean --max_steps?"),  # never guessed silently
        (["stray"], "unknown argument stray"),
        (["--batch_size", "0"], "--batch_size is 0: it must be at least 1"),
        (["--batch_size", "2.5"], "'2.5' is not a whole number"),
        (["--batch_size", "inf"], "'inf' is not a whole number"),
        (["--batch_size"], "expected one argument"),
        (["--epochs", "0"], "--epochs is 0.0: it must be greater than 0"),
        (["--epochs", "nan"], "give a finite number"),
        (["--learning_rate", "fast"], "--learning_rate: 'fast' is not a number"),
        (["--learning_rate", "-1"], "it must be at least 0"),
        (["--final_lr_ratio", "1.5"], "it must be at most 1"),
        (["--optimizer", "moun"], "'moun' is not one of adamw, muon, adamw8bit. Did you mean 'muon'?"),
        (["--model_config", "smal"], "Did you mean 'small'?"),
        (["--use_moe", "maybe"], "'maybe' is neither true nor false"),
        (["--config", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["--beta", "-0.1"], "it must be at least 0"),
    ],
)
def test_mistakes_are_explained(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        read(*argv)
    assert message in str(error.value)


@dataclass(frozen=True)
class Odd:
    """Settings with what the training ones lack"""

    source: str = field(metadata={"help": "what to read", "positional": True})
    target: str = field(metadata={"help": "what to write"})
    words: tuple[str, ...] = field(default=(), metadata={"help": "100 % optional"})


def test_required_positional_and_several_values() -> None:
    (odd,) = parse("odd", "", [Odd], ["in", "--target", "out", "--words", "a b", "c"])
    assert odd == Odd("in", "out", ("a b", "c"))
    with pytest.raises(UsageError, match="--target is required: what to write"):
        parse("odd", "", [Odd], ["in"])
    with pytest.raises(UsageError, match="source"):
        parse("odd", "", [Odd], ["--target", "out"])


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in read())
    with pytest.raises(SystemExit):
        parse("odd", "", [Odd], ["-h"])
    assert "100 % optional" in capsys.readouterr().out
