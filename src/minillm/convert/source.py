"""What there is to convert: bare weights in a folder or a file, from one file or several, and what describes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minillm.checkpoint.files import check_finite, extract_weights, read_tensors
from minillm.checkpoint.folders import SHARDED, SINGLE, read_weights
from minillm.checkpoint.sharded import is_sharded
from minillm.log import UserError
from minillm.text.imported import read_json

# In this order: what is looked for in a folder. An index names the files that the weights are spread over.
NAMES = tuple(name + end for name in SINGLE for end in ("", SHARDED))
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


@dataclass
class Source:
    """Weights that were read."""

    path: Path  # what the user named
    files: list[Path]
    weights: dict[str, Tensor]
    config: dict[str, Any] | None  # of the file itself, else of config.json
    config_name: str
    step: int | None  # where another program's checkpoint says it
    prefixes: list[str]

    @property
    def folders(self) -> tuple[Path, Path]:
        """Where things beside the weights may be: the run folder of our flat weights, and the folder they lie in."""
        return self.files[0].with_suffix(""), self.files[0].parent

    @property
    def name(self) -> str:
        """The input's name for the card and the run's name."""
        return self.path.resolve().name if self.path.is_dir() else self.path.stem


def _file(path: Path) -> Path:
    """The file with the weights, or the index of their shards."""
    if is_sharded(path):
        raise UserError(f"{path} is a sharded checkpoint of ours: use it as it is (--checkpoint, --pretrained_path)")
    if path.is_dir():
        found = [path / name for name in NAMES if (path / name).is_file()]
        others = sorted(each for each in path.iterdir() if each.suffix in SUFFIXES and each.name not in NAMES)
        if not found and len(others) > 1:
            names = ", ".join(each.name for each in others[:4])
            raise UserError(f"{path} has several files with weights ({names}): name one of them as --input_dir")
        if not found and not others:
            raise UserError(f"{path} has no weights: {', '.join(SINGLE)} or a {', '.join(SUFFIXES[1:])} file")
        path = (found or others)[0]
    return path


def read_source(path: Path) -> Source:
    """The weights without the prefixes of wrappers, and what there is about them.

    Raises:
        UserError: there are no weights, or several, or they are damaged, or they are a full checkpoint already.
    """
    file = _file(path)
    if file.name.endswith(SHARDED):
        names = read_json(file).get("weight_map", {})
        content: Any = read_weights(file.parent)
        files = sorted({file.parent / str(name) for name in names.values()})
    else:
        content, files = read_tensors(file), [file]
    if isinstance(content, dict) and "format_version" in content:
        raise UserError(f"{file} is a full checkpoint of MiniLLM already: every command takes it as it is")
    weights = extract_weights(content, file)
    check_finite(weights, file)
    for key, value in weights.items():
        if value.ndim == 2 and (not value.is_floating_point() or value.element_size() < 2):
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(f"{file}: {key} is {kind}: quantised weights cannot be converted; take the full ones")
    names = _keys(content)
    prefixes = [prefix for prefix in ("module.", "_orig_mod.") if any(prefix in name for name in names)]
    config, name = _config(content, file)
    names_of_steps = ["iter_num", "global_step"]
    if _of(content, "world_size") is None:  # MiniMind's "step" counts the batches of an epoch
        names_of_steps.append("step")
    told = [_of(content, key) for key in names_of_steps]
    step = next((each for each in told if isinstance(each, int) and not isinstance(each, bool)), None)
    return Source(path, files, weights, config, name, step, prefixes)


def _of(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, dict) else None


def _keys(content: Any) -> list[str]:
    """Names of tensors, also one level down."""
    if not isinstance(content, dict):
        return []
    inner = [str(key) for value in content.values() if isinstance(value, dict) for key in value]
    return [*map(str, content), *inner]


def _config(content: Any, file: Path) -> tuple[dict[str, Any] | None, str]:
    """What says how the model is built, and where that was found: in the file, else in a config.json."""
    for key in ("model_args", "model_config", "config"):
        values = _of(content, key)
        # nanoGPT's "config" has the settings of the training, its "model_args" the sizes
        if isinstance(values, dict) and {"vocab_size", "n_layer", "dim", "hidden_size"} & set(values):
            return values, f"{key} in {file.name}"
    for beside in (file.with_suffix("") / "config.json", file.parent / "config.json"):
        if beside.is_file():
            return read_json(beside), beside.name
    return None, ""
