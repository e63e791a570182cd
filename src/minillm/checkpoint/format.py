"""A full checkpoint: one dict of tensors and plain containers, readable with torch.load(weights_only=True)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.log import UserError
from minillm.models.config import ModelConfig

FORMAT_VERSION = 1
# What a run needs to go on, and the kind of each. Files of the first release have all of them.
RESUMED: dict[str, type] = {
    "stage": str, "architecture": str, "model_state_dict": dict, "model_config": dict, "optimizer_state_dict": dict,
    "scaler_state_dict": dict, "train_config": dict, "progress": dict, "training_log": list, "validation_log": list,
    "model_info": dict, "data_state": dict, "rng_state": dict, "method_state": dict, "tokenizer": dict,
}  # fmt: skip
INSIDE = {
    "progress": ("step", "epoch", "tokens_seen", "best_value", "elapsed"), "model_info": ("model_name",),
    "method_state": ("name", "metrics"), "rng_state": ("torch", "python"), "tokenizer": ("json", "chat_template"),
}  # fmt: skip


def rng_state() -> dict[str, Any]:
    """State of every generator a run may draw from."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(_python_state(state))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _python_state(state: dict[str, Any]) -> tuple[Any, ...]:
    version, internal, gauss = state["python"]
    return version, tuple(internal), gauss


def check_full(content: Any, path: Path) -> None:
    """Everything that a run needs to go on is in it.

    Raises:
        UserError: names the first key that is missing or of another kind.
    """
    if not isinstance(content, dict) or "progress" not in content:
        raise UserError(f"{path} is not a full checkpoint: it has weights only. Start from it with --pretrained_path")
    for key, kind in RESUMED.items():
        if not isinstance(content.get(key), kind):
            found = (
                f"is a {type(content[key]).__name__}, expected a {kind.__name__}" if key in content else "is missing"
            )
            raise UserError(f"{path} is not a whole checkpoint: {key} {found}")
        if key.endswith("_log") and not all(isinstance(row, dict) for row in content[key]):
            raise UserError(f"{path} is not a whole checkpoint: {key} holds something else than logged steps")
        for inner in INSIDE.get(key, ()):
            if inner not in content[key]:
                raise UserError(f"{path} is not a whole checkpoint: {key} has no {inner}")
    for key, value in content["model_state_dict"].items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path} is not a whole checkpoint: {key!r} in model_state_dict is no tensor under a name")
    try:
        torch.Generator().set_state(content["rng_state"]["torch"])
        random.Random().setstate(_python_state(content["rng_state"]))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a whole checkpoint: no generator can have its rng_state ({error})") from None
    for name in ("step", "tokens_seen"):
        value = content["progress"][name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UserError(f"{path} is not a whole checkpoint: {name} in progress is {value!r}, no number of them")


def build_checkpoint(
    *,
    architecture: str,
    stage: str,
    model_state: dict[str, Tensor],
    model_config: ModelConfig,
    optimizer_state: dict[str, Any],
    scheduler_state: dict[str, Any],
    scaler_state: dict[str, Any],
    train_config: dict[str, Any],
    progress: dict[str, Any],
    model_name: str,
    parameters: int,
    parent: dict[str, Any] | None,
    tokenizer: dict[str, Any],
    data_state: dict[str, Any],
    method_state: dict[str, Any],
    family: dict[str, Any],
    ema_state: dict[str, Tensor] | None,
    adapter: dict[str, Any] | None,
) -> dict[str, Any]:
    """Every key of the documented format. Where older tools read another spelling, both are there and equal.

    Args:
        progress: `TrainState.to_dict()`: step, epoch, tokens_seen, best_value, logs, counts, times.
    """
    config = model_config.to_dict()
    best = progress["best_value"] if progress.get("best_metric", "loss") == "loss" else None
    return {
        "format_version": FORMAT_VERSION,
        "architecture": architecture,
        "stage": stage,
        "global_step": progress["step"],
        "step": progress["step"],
        "epoch": progress["epoch"],
        "model_state_dict": model_state,
        "model_config": config,
        "config": config,
        "optimizer_state_dict": optimizer_state,
        "scheduler_state_dict": scheduler_state,
        "scaler_state_dict": scaler_state,
        "train_config": train_config,
        "training_config": train_config,
        "best_loss": best,
        "best_val_loss": best if progress["best_is_validation"] else None,
        "best_validation_loss": best if progress["best_is_validation"] else None,
        "training_log": progress["training_log"],
        "validation_log": progress["validation_log"],
        "model_info": {
            "model_name": model_name,
            "parameters": parameters,
            "vocab_size": model_config.vocab_size,
            "n_layer": model_config.num_hidden_layers,
            "n_head": model_config.num_attention_heads,
            "n_embd": model_config.hidden_size,
            "max_position_embeddings": model_config.max_position_embeddings,
        },
        "training_stats": {
            "total_time": progress["elapsed"],
            "average_step_time": progress["elapsed"] / max(1, progress["step"]),
            "no_improvement_count": progress["no_improvement_count"],
            "tokens_seen": progress["tokens_seen"],
            "skipped_steps": progress["skipped_steps"],
        },
        "data_state": data_state,
        "rng_state": rng_state(),
        "method_state": method_state,
        "family": family,
        **({"ema_state_dict": ema_state} if ema_state is not None else {}),
        **({"adapter": adapter} if adapter is not None else {}),
        "progress": {key: value for key, value in progress.items() if not key.endswith("_log")},
        "parent": parent,
        "tokenizer": tokenizer,
    }
