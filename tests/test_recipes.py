"""Every recipe is short, holds only flags its command knows, and describes a model that can be built."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from minillm.cli import COMMANDS, _load
from minillm.config import UsageError, parse
from minillm.models.config import PRESETS, ModelSettings, build_model_config, size_name

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
MOST_LINES = 30


def command_of(recipe: Path) -> str:
    """A recipe with a command's name is for it, the others are for pretraining."""
    return recipe.stem if recipe.stem in COMMANDS else "pretrain"


def settings_of(recipe: Path, *flags: str) -> dict[type, object]:
    classes = [_load(reference) for reference in COMMANDS[command_of(recipe)].settings]
    parsed = parse("minillm", "", classes, ["--config", str(recipe), *flags])
    return dict(zip(classes, parsed))


def model_settings(recipe: Path, *flags: str) -> ModelSettings:
    settings = settings_of(recipe, *flags)[ModelSettings]
    assert isinstance(settings, ModelSettings)
    return settings


def test_there_is_a_recipe_for_every_preset_and_for_the_tuning_stages() -> None:
    assert {recipe.stem for recipe in RECIPES} >= {*PRESETS, "sft", "dpo", "lora"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
class TestEveryRecipe:
    def test_is_at_most_thirty_lines(self, recipe: Path) -> None:
        assert len(recipe.read_text(encoding="utf-8").splitlines()) <= MOST_LINES

    def test_loads_and_describes_a_model(self, recipe: Path) -> None:
        config = build_model_config(model_settings(recipe), vocab_size=6400, max_seq_len=0, causal=True)
        assert config.hidden_size == config.num_attention_heads * config.head_dim

    def test_names_its_own_command(self, recipe: Path) -> None:
        text = recipe.read_text(encoding="utf-8")
        assert f"minillm {command_of(recipe)} --config recipes/{recipe.name}" in text


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_recipe_trains_that_preset(name: str) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.stem == name)
    config = build_model_config(model_settings(recipe), vocab_size=6400, max_seq_len=0, causal=True)
    assert size_name(config) == name


def test_flags_win_over_a_recipe() -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.stem == "small")
    assert asdict(model_settings(recipe, "--num-hidden-layers", "3"))["num_hidden_layers"] == 3


def test_a_misspelt_key_is_an_error_that_names_the_right_one(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("batchsize: 4\n", encoding="utf-8")
    with pytest.raises(UsageError, match="batch_size"):
        settings_of(recipe)
