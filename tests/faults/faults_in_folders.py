"""Folders whose index leads elsewhere, and full checkpoints that a run cannot go on from."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from parts import HUGE, SHARD, Sound, folder_fault, resumed, write_index, written

# --- folders as Hugging Face's libraries write them ---


def change_index(place: Path, name: str) -> None:
    """Let the index name this file in place of the first shard."""
    saved = json.loads((place / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(place, {key: name if shard == SHARD else shard for key, shard in saved.items()})


@folder_fault("only names of files in")
def an_index_that_leads_upwards(sound: Sound, place: Path) -> None:
    os.replace(place / SHARD, place.parent / SHARD)
    change_index(place, f"../{SHARD}")


@folder_fault("only names of files in")
def an_index_that_names_a_place_on_the_disk(sound: Sound, place: Path) -> None:
    os.replace(place / SHARD, place.parent / SHARD)
    change_index(place, str((place.parent / SHARD).resolve()))


@folder_fault("symbolic link out of its folder")
def a_shard_that_is_a_link_outwards(sound: Sound, place: Path) -> None:
    os.replace(place / SHARD, place.parent / SHARD)
    (place / SHARD).symlink_to(place.parent / SHARD)


@folder_fault("a shard is missing")
def a_missing_shard(sound: Sound, place: Path) -> None:
    (place / SHARD).unlink()


@folder_fault("index.json is not")
def an_index_that_is_no_json(sound: Sound, place: Path) -> None:
    (place / "model.safetensors.index.json").write_text("{")


@folder_fault("no weight_map")
def an_index_without_a_map(sound: Sound, place: Path) -> None:
    (place / "model.safetensors.index.json").write_text("{}")


@folder_fault("cannot be read")
def a_shard_that_is_cut_short(sound: Sound, place: Path) -> None:
    written(place / SHARD, (place / SHARD).read_bytes()[:-9])


@folder_fault("config.json")
def a_model_configuration_that_is_no_json(sound: Sound, place: Path) -> None:
    (place / "config.json").write_text("no json")


@folder_fault("num_hidden_layers")
def a_model_configuration_of_a_million_million_layers(sound: Sound, place: Path) -> None:
    values = json.loads((place / "config.json").read_text())
    del values["minillm"]
    (place / "config.json").write_text(json.dumps({**values, "num_hidden_layers": HUGE}))


@folder_fault("config.json: a value is not of its kind")
def a_model_configuration_of_wrong_types(sound: Sound, place: Path) -> None:
    values = json.loads((place / "config.json").read_text())
    del values["minillm"]
    (place / "config.json").write_text(json.dumps({**values, "hidden_size": {"x": 1}}))


# --- full checkpoints that a run cannot go on from ---


def without(content: dict[str, Any], key: str, inner: str = "") -> dict[str, Any]:
    if not inner:
        return {name: value for name, value in content.items() if name != key}
    return {**content, key: {name: value for name, value in content[key].items() if name != inner}}


for key in ("stage", "architecture", "optimizer_state_dict", "train_config", "rng_state", "method_state", "data_state"):
    resumed(f"no_{key}", f"{key} is missing", functools.partial(lambda key, sound: without(sound.content(), key), key))
for key, inner in (("progress", "step"), ("model_info", "model_name"), ("tokenizer", "chat_template")):
    resumed(
        f"no_{inner}_in_{key}", f"{key} has no {inner}|no text for json and chat_template",
        functools.partial(lambda key, inner, sound: without(sound.content(), key, inner), key, inner),
    )  # fmt: skip
resumed("a_log_that_is_text", "training_log is a str", lambda sound: sound.content(training_log="many steps"))
resumed(
    "an_optimizer_with_nan", "optimizer_state_dict.* has NaN",
    lambda sound: sound.content(optimizer_state_dict={"adamw": {"state": {0: torch.full((2,), torch.nan)}}}),
)  # fmt: skip
resumed(
    "a_generator_of_another_kind", "no generator can have its rng_state",
    lambda sound: sound.content(rng_state={"torch": torch.zeros(3), "python": [3, [1], None]}),
)  # fmt: skip
resumed(
    "a_step_that_is_text", "step in progress is 'many'",
    lambda sound: sound.content(progress={**sound.content()["progress"], "step": "many"}),
)  # fmt: skip
resumed(
    "a_weight_that_is_a_number", "'model.norm.weight' in model_state_dict is no tensor|missing model.norm.weight",
    lambda sound: sound.with_weights(model__norm__weight=1.5),
)  # fmt: skip
resumed("a_log_of_numbers", "training_log holds something else", lambda sound: sound.content(training_log=[1, 2]))
