"""minillm checkpoint verify: whether files are what they were, safe, finite, and in agreement with themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm.log import UserError


@dataclass(frozen=True)
class VerifySettings:
    """Verify checkpoints"""

    paths: tuple[str, ...] = field(
        default=("out",), metadata={"help": "files, or folders with all that is below them", "positional": True}
    )


def run(settings: VerifySettings) -> None:
    """One line for each file on stdout.

    Raises:
        UserError: at least one fails, or there is nothing to verify.
    """
    from minillm.checkpoint.sharded import is_sharded
    from minillm.manage.catalog import checkpoint_files

    files: list[Path] = []
    for text in settings.paths:
        path = Path(text)
        if not path.exists():
            raise UserError(f"there is no file or folder {path}")
        files += checkpoint_files(path) if path.is_dir() and not is_sharded(path) else [path]
    if not files:
        raise UserError(f"there are no checkpoints in {', '.join(settings.paths)}")
    failed = 0
    checked: dict[tuple[int, int], str] = {}  # names of one file are read once
    for path in files:
        try:
            check_link(path, [Path(text) for text in settings.paths])
            status = path.stat()
            twin = checked.get((status.st_dev, status.st_ino))
            said = check(path) if twin is None else check_twin(path, twin)
            checked.setdefault((status.st_dev, status.st_ino), str(path))
            print(f"ok      {path}: {said}", flush=True)
        except (UserError, OSError) as error:
            failed += 1
            text = str(error)
            print(f"FAILED  {text if str(path) in text else f'{path}: {text}'}", flush=True)
    if failed:
        raise UserError(f"{failed} of {len(files)} files failed")


def check_link(path: Path, roots: list[Path]) -> None:
    """A file that was found below a folder lies below it. Raises UserError for a link out of it."""
    inside = any(path.resolve().is_relative_to(root.resolve()) for root in roots if root.is_dir())
    if path.is_symlink() and not inside and path not in roots:
        raise UserError(f"{path} is a symbolic link out of the folder, to {path.resolve()}")


def check_twin(path: Path, twin: str) -> str:
    """Another name of a file that was read: its own recorded hash has to match, too."""
    from minillm.checkpoint.files import verify_hash

    recorded = verify_hash(path)
    return f"same file as {twin}" + ("" if recorded else ", no recorded hash")


def check(path: Path) -> str:
    """What was found to be right.

    Raises:
        UserError: what is wrong.
    """
    from minillm.checkpoint.files import check_finite, check_fits, extract_weights, hash_file, read_tensors
    from minillm.checkpoint.loader import config_of, family_of
    from minillm.checkpoint.model import saved_tokenizer
    from minillm.checkpoint.safety import tensors_in
    from minillm.checkpoint.sharded import is_sharded, read_sharded

    if path.name == "model.safetensors" and (path.parent / "config.json").is_file():
        return _check_model_folder(path)
    sharded = is_sharded(path)
    content = read_sharded(path) if sharded else read_tensors(path)
    right = ["hash" if sharded or hash_file(path).is_file() else "no recorded hash", "opens without code"]
    check_finite(tensors_in(content), path)
    full = isinstance(content, dict) and "model_state_dict" in content
    weights = extract_weights(content, path) if full or _is_state_dict(content) else {}
    right.append("finite")
    if not full and ("model.embed_tokens.weight" not in weights or re.search(r"-\d+-of-\d+\.", path.name)):
        return ", ".join([*right, f"{len(tensors_in(content))} tensors, not a whole model of ours"])
    config = config_of(content, path)
    check_fits(weights, config, path)
    right.append("shapes")
    family_of(content, path)
    if full:
        _check_agreement(content, path)
        if isinstance(content.get("tokenizer"), dict):
            own = saved_tokenizer(content["tokenizer"], path)
            _check_tokenizer(own, config.vocab_size, path)
            right.append("tokenizer")
    return ", ".join(right)


def _check_model_folder(path: Path) -> str:
    """The weights of a model as transformers writes it, whose own configuration says how they are shaped."""
    from minillm.checkpoint.files import check_finite, read_tensors
    from minillm.checkpoint.folders import read_model
    from minillm.text.imported import read_json

    right = "no recorded hash, opens without code, finite"
    if "quantization_config" in read_json(path.parent / "config.json"):
        check_finite(read_tensors(path), path)
        return f"{right}, quantised: shapes are not compared"
    read_model(path.parent)
    return f"{right}, shapes"


def _is_state_dict(content: Any) -> bool:
    import torch

    inner = [content, *content.values()] if isinstance(content, dict) else []
    return any(isinstance(each, dict) and any(isinstance(v, torch.Tensor) for v in each.values()) for each in inner)


def _check_agreement(content: dict[str, Any], path: Path) -> None:
    """Keys that hold the same hold the same, and one that a run can go on from is whole."""
    from minillm.checkpoint.format import check_full

    if "progress" in content:
        check_full(content, path)
    for key, twin in (("config", "model_config"), ("training_config", "train_config"), ("step", "global_step")):
        if key in content and twin in content and content[key] != content[twin]:
            raise UserError(f"{path}: {key} and {twin} must hold the same, and they differ")


def _check_tokenizer(own: Any, vocab_size: int, path: Path) -> None:
    from minillm.text.tokenizer import Tokenizer

    if own.vocab_size != vocab_size:
        raise UserError(f"{path}: its tokenizer has {own.vocab_size} entries, its model {vocab_size}")
    beside = path.parent / "tokenizer.json"
    if beside.is_file() and not Tokenizer.load(path.parent).same_tokens(own):
        raise UserError(f"{path}: the tokenizer in it is another one than {beside}")
