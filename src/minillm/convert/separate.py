"""A LoRA adapter on its own, in peft's form: `minillm export --adapter_only`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.log import UserError

if TYPE_CHECKING:
    from minillm.checkpoint.model import OpenedCheckpoint
    from minillm.convert.export import ExportSettings

MARK = {"exported_by": "minillm"}  # in the metadata of the weights


def is_ours(folder: Path) -> bool:
    """An adapter that was exported into this folder."""
    from safetensors import SafetensorError, safe_open

    from minillm.checkpoint.adapter import WEIGHTS

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return MARK.items() <= (file.metadata() or {}).items()
    except (OSError, SafetensorError):
        return False


def write_adapter(opened: OpenedCheckpoint, settings: ExportSettings, beside: Path) -> None:
    """The adapter, the tokenizer it was trained with, and a card. `opened` is what it lies on.

    Raises:
        UserError: it cannot be read, has a weight, or its layers have other names in transformers.
    """
    from minillm.checkpoint.adapter import read_adapter, save_adapter, weighted_paths
    from minillm.checkpoint.files import hash_file
    from minillm.convert.card import write_card
    from minillm.models.lora import LoraConfig

    ((path, weight),) = weighted_paths(settings.adapter)
    if weight != 1.0:
        raise UserError(f"--adapter {settings.adapter[0]}: an adapter on its own has no weight; leave out the number")
    config = opened.model.config
    if config.model_type == "gpt2" or config.use_moe:
        name = "GPT-2" if config.model_type == "gpt2" else "experts"
        if opened.architecture == "ar":
            raise UserError(
                f"{name}: transformers keeps these layers in other tensors than MiniLLM, so an adapter cannot be "
                "laid on them there; leave out --adapter_only, and it is merged"
            )
    adapter = read_adapter(path)
    rank = next(iter(adapter.pairs.values())).a.shape[0]
    targets = tuple(sorted({layer.rpartition(".")[2] for layer in adapter.pairs}))
    beside.mkdir()
    save_adapter(
        beside,
        adapter.pairs,
        LoraConfig(rank, adapter.scale * rank, targets),
        base=settings.base,
        facts={**adapter.facts, **MARK},
        causal=opened.architecture == "ar",
    )
    for file in list(beside.iterdir()):
        hash_file(file).unlink(missing_ok=True)
    merged = _merged(settings)
    merged.tokenizer.save(beside)
    write_card(_described(merged, path), settings, beside, checked="")


def check_adapter(opened: OpenedCheckpoint, settings: ExportSettings, beside: Path) -> str:
    """The adapter on the exported base, in peft, against the checkpoint with the adapter merged into it here."""
    from minillm.checkpoint.adapter import weighted_paths
    from minillm.convert.card import write_card
    from minillm.convert.huggingface import auto_class, write_model
    from minillm.convert.parity import compare, expectations
    from minillm.convert.transformers_runtime import TransformersRuntime

    base = beside.with_name("base")
    write_model(opened, base)
    merged = _merged(settings)
    said = compare(expectations(merged), TransformersRuntime(beside, auto_class(opened), base=base))
    write_card(_described(merged, weighted_paths(settings.adapter)[0][0]), settings, beside, checked=said)
    return said


def _merged(settings: ExportSettings) -> OpenedCheckpoint:
    """The checkpoint with the adapter in it, and with the tokenizer and chat template it was trained with."""
    from minillm.checkpoint.model import open_checkpoint

    return open_checkpoint(settings.checkpoint, tokenizer=settings.tokenizer, adapters=settings.adapter)


def _described(merged: OpenedCheckpoint, path: Path) -> OpenedCheckpoint:
    """For the card: what the base says of its own training is not said of the adapter."""
    return replace(merged, path=path, step=None, facts={})
