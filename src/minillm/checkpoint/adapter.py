"""Adapters on disk, in peft's form: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.atomic import write_text
from minillm.checkpoint.files import check_finite, read_tensors, save_safetensors
from minillm.log import UserError, info, warn
from minillm.models.lora import LoraConfig, Pair, folded

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before every name in peft's files
# What peft can do and we cannot: these must be as in a plain adapter.
PLAIN: dict[str, Any] = {
    "use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "bias": "none", "rank_pattern": {},
    "alpha_pattern": {}, "modules_to_save": None, "target_parameters": None,
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """One that was read from a folder."""

    folder: Path
    pairs: dict[str, Pair]  # by layer
    scale: float
    facts: dict[str, str]  # base_sha256, stage: what we wrote beside it; {} where another program did


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values: which weights these are, whatever file they are in."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(weights[key].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_adapter(
    folder: Path, pairs: Mapping[str, Pair], config: LoraConfig, *, base: str, facts: dict[str, str], causal: bool
) -> None:
    """Write both files; each appears whole.

    Args:
        base: where the weights are that it lies on, for people.
    """
    tensors = {}
    for path, pair in pairs.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = pair.a.float().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = pair.b.float().contiguous()
    save_safetensors(folder / WEIGHTS, tensors, facts)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(config.targets),
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        **PLAIN,
    }
    write_text(folder / CONFIG, json.dumps(values, indent=2) + "\n")


def read_adapter(path: Path) -> Adapter:
    """An adapter that we or peft wrote.

    Raises:
        UserError: the folder or a file of it is missing or damaged, or it is not a plain LoRA adapter.
    """
    from safetensors import safe_open

    folder = path.parent if path.name in (WEIGHTS, CONFIG) else path
    if not (folder / CONFIG).is_file():
        raise UserError(f"there is no adapter in {folder}: {CONFIG} and {WEIGHTS} are expected")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, rank, alpha = config["peft_type"], int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is not the configuration of a LoRA adapter ({error})") from None
    if rank < 1 or not math.isfinite(alpha):
        raise UserError(f"{folder / CONFIG}: r is {rank} and lora_alpha {alpha}, there is no such adapter")
    if kind != "LORA":
        raise UserError(f"{folder / CONFIG}: peft_type is {kind!r}, only 'LORA' can be used")
    for name, plain in PLAIN.items():
        if config.get(name) and config[name] != plain:
            raise UserError(f"{folder / CONFIG}: {name} is {config[name]!r}; only plain LoRA can be used")
    tensors = read_tensors(folder / WEIGHTS)
    check_finite(tensors, folder / WEIGHTS)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, _, which = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not layer or which not in ("A", "B") or value.ndim != 2 or value.shape["AB".index(which)] != rank:
            raise UserError(f"{folder / WEIGHTS}: {key} is not a matrix of rank {rank} beside a linear layer")
        parts.setdefault(layer, {})[which] = value
    for layer, part in parts.items():
        if len(part) < 2:
            raise UserError(f"{folder / WEIGHTS}: of {layer} one of the matrices A and B is missing")
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        facts = file.metadata() or {}
    pairs = {layer: Pair(part["A"], part["B"]) for layer, part in parts.items()}
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapter(folder, pairs, scale, {name: value for name, value in facts.items() if name != "format"})


def weighted_paths(texts: Sequence[str]) -> list[tuple[Path, float]]:
    """(path, weight) of each PATH or PATH:WEIGHT; without a number the weight is 1."""
    found = []
    for text in texts:
        path, _, number = text.rpartition(":")
        try:
            weight = float(number) if path and not Path(text).exists() else None
        except ValueError:
            weight = None
        if weight is not None and not math.isfinite(weight):
            raise UserError(f"--adapter {text}: {number} is no weight, give a finite number")
        found.append((Path(text), 1.0) if weight is None else (Path(path), weight))
    return found


def with_adapters(weights: dict[str, Tensor], texts: Sequence[str], source: Path) -> tuple[dict[str, Tensor], Adapter]:
    """A state dict with these adapters (PATH or PATH:WEIGHT, at least one) merged into it, and the last of them.

    Raises:
        UserError: an adapter cannot be read or does not fit the weights.
    """
    own = fingerprint(weights)
    for path, weight in weighted_paths(texts):
        adapter = read_adapter(path)
        if adapter.facts.get("base_sha256", own) != own:
            warn(f"{adapter.folder} was trained beside other weights than those of {source}")
        try:
            weights = folded(weights, adapter.pairs, adapter.scale * weight)
        except ValueError as error:
            raise UserError(f"{adapter.folder} does not fit {source}: {error}") from None
        info(f"[checkpoint] {adapter.folder} is merged into it{f' with weight {weight:g}' if weight != 1 else ''}")
    return weights, adapter
