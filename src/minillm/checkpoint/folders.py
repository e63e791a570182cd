"""Folders in place of a checkpoint file: a run folder of ours, or a model as Hugging Face's libraries write it, which
is imported where it lies. What comes out is what a full checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.checkpoint.files import check_finite, check_fits, read_tensors, sha256
from minillm.checkpoint.format import FORMAT_VERSION
from minillm.checkpoint.safety import member
from minillm.checkpoint.sharded import best_sharded, is_sharded, peek_sharded, read_sharded, sharded_checkpoints
from minillm.log import UserError, info
from minillm.models.config import ModelConfig
from minillm.models.dialects import CLASSES, config_from, weights_from
from minillm.stages import STAGES
from minillm.text.imported import import_tokenizer, read_json

RUN_FILES = ("best_model.pt", "last.pt")
SINGLE, SHARDED = ("model.safetensors", "pytorch_model.bin"), ".index.json"
CONFIG = "config.json"
IMPORTED = "imported"  # the stage of a model that no stage of ours has trained


def checkpoint_path(path: str | Path) -> Path:
    """The file (or the folder of a model or of a sharded checkpoint) that a path means: of a run folder its best
    checkpoint, else its last.

    Raises:
        UserError: a folder that is neither.
    """
    path = Path(path)
    if not path.is_dir() or is_sharded(path):
        return path
    files = [path / name for name in RUN_FILES if (path / name).is_file()]
    for chosen in filter(None, [best_sharded(path), *files, *sharded_checkpoints(path)]):
        info(f"[checkpoint] {path} is a run folder: its {chosen.name} is taken")
        return chosen
    if (path / CONFIG).is_file() and _weights_file(path) is not None:
        return path
    raise UserError(
        f"{path} is a folder with neither a checkpoint of ours ({', '.join(RUN_FILES)}) nor a model of Hugging Face's "
        f"({CONFIG} with {' or '.join(SINGLE)}, or the index of its shards)"
    )


def read_checkpoint(path: Path) -> Any:
    """What `read_tensors` gives for a file; what a sharded checkpoint was written from; a Hugging Face folder as the
    full checkpoint it is imported as."""
    if is_sharded(path):
        return read_sharded(path)
    return read_model_folder(path) if path.is_dir() else read_tensors(path)


def saved_architecture(path: Path) -> str | None:
    """The family that a Hugging Face folder or a sharded checkpoint says it is of; None where `path` is a file."""
    if not path.is_dir():
        return None
    if is_sharded(path):
        return str(peek_sharded(path).get("architecture"))
    family = read_json(path / CONFIG).get("minillm_family")
    return str(family.get("architecture")) if isinstance(family, dict) else "ar"


def read_model_folder(folder: Path, tokenizer: Path | None = None) -> dict[str, Any]:
    """A Hugging Face folder as a full checkpoint of ours: weights in float32, configuration, tokenizer. What was done
    for it stands under `imported`; optimizer state and losses are not known, and not there.

    Args:
        tokenizer: the folder it is in, where that is another one.

    Raises:
        UserError: a file is missing or damaged, or something of the model is not known here.
    """
    hf, config, weights = read_model(folder)
    generation = read_json(folder / "generation_config.json")
    known = {key: value for key, value in generation.items() if key.endswith("_token_id") and value is not None}
    found = import_tokenizer(tokenizer or folder, config.vocab_size, {**hf, **known})
    if tokenizer is not None and found is None:
        raise UserError(f"{tokenizer} has no tokenizer: tokenizer.json is expected")
    if found is not None:
        weights = with_rows(weights, found.rows)
        config = ModelConfig.from_dict({**config.to_dict(), "vocab_size": found.rows})
    said = found.said if found is not None else ("it has no tokenizer: give one with --tokenizer",)
    for line in said:
        info(f"[import] {folder.name}: {line}")
    family = hf.get("minillm_family")
    family = family if isinstance(family, dict) else {"architecture": "ar"}
    return {
        "format_version": FORMAT_VERSION,
        "architecture": family.get("architecture"),
        "family": family,
        "stage": hf["minillm_stage"] if hf.get("minillm_stage") in STAGES else IMPORTED,
        "global_step": None,
        "model_state_dict": weights,
        "model_config": config.to_dict(),
        **({"tokenizer": found.tokenizer.to_dict()} if found is not None else {}),
        "imported": {"path": str(folder), "model_type": str(hf.get("model_type")), "said": list(said)},
        "parent": {"path": str(folder), "sha256": sha256(folder), "stage": None, "step": None},
    }


def read_model(folder: Path) -> tuple[dict[str, Any], ModelConfig, dict[str, Tensor]]:
    """config.json, what it means, and the weights under our names in float32, checked against each other.

    Raises:
        UserError: as `read_model_folder` does.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}: it is no model folder of Hugging Face's")
    hf = read_json(folder / CONFIG)
    raw = read_weights(folder)
    try:
        own = hf.get("minillm")  # an export of ours says everything
        config = ModelConfig.from_dict(own) if isinstance(own, dict) else config_from(hf)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    kind = str(hf.get("model_type"))
    weights = weights_from(raw, kind, config) if kind in CLASSES else raw
    rows = weights.get("model.embed_tokens.weight")
    if isinstance(hf.get("minillm"), dict) and rows is not None and len(rows) != config.vocab_size:
        # another program gave it more rows since, and said so in its own field only
        config = ModelConfig.from_dict({**config.to_dict(), "vocab_size": int(hf.get("vocab_size", len(rows)))})
    for key, value in weights.items():
        if not value.is_floating_point() or value.element_size() < 2:
            kind_of = str(value.dtype).removeprefix("torch.")
            raise UserError(f"{folder}: {key} is {kind_of}: quantised weights cannot be trained; take the full ones")
    weights = {key: value.float() for key, value in weights.items()}
    check_finite(weights, folder)
    check_fits(weights, config, folder)
    return hf, config, weights


def with_rows(weights: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The weights with so many rows in the embedding and an untied head; new ones are the mean of the others."""
    result = dict(weights)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        matrix = result.get(key)
        if matrix is not None and len(matrix) < rows:
            result[key] = torch.cat((matrix, matrix.mean(0, keepdim=True).expand(rows - len(matrix), -1)))
    return result


def _weights_file(folder: Path) -> Path | None:
    """The weights, or the index of their shards: safetensors before pickles."""
    for name in SINGLE:
        for file in (folder / name, folder / (name + SHARDED)):
            if file.is_file():
                return file
    return None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model, from one file or from shards."""
    file = _weights_file(folder)
    if file is None:
        raise UserError(f"{folder} has no weights: {' or '.join(SINGLE)}, or the index of their shards")
    if not file.name.endswith(SHARDED):
        return _tensors(member(folder, file.name, folder))
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file} is no index of shards: it has no weight_map")
    shards = {name: member(folder, name, file) for name in weight_map.values()}
    for name, shard in shards.items():
        if not shard.is_file():
            raise UserError(f"{file} names {name}, which is not in the folder: a shard is missing")
    weights: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, shard in sorted(shards.items()):
        for key, value in _tensors(shard).items():
            if key in weights:
                raise UserError(f"{key} stands in two shards, {origin[key]} and {name}: which one counts?")
            weights[key], origin[key] = value, name
    for key, name in weight_map.items():
        if key not in weights:
            raise UserError(f"{file} says that {key} is in {name}, and it is not there")
        if origin[key] != name:
            raise UserError(f"{file} says that {key} is in {name}, and it is in {origin[key]}")
    return weights


def _tensors(file: Path) -> dict[str, Tensor]:
    content = read_tensors(file)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file} holds no weights")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{file}: {key!r} is no tensor under a name; a model's weights are expected and nothing else"
            )
    return content
