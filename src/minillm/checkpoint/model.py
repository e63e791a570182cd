"""From a checkpoint file to a model that can be used, with its tokenizer and family: nothing has to be repeated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.checkpoint.adapter import with_adapters
from minillm.checkpoint.files import check_finite, extract_weights, read_tensors, save_tensors, sha256
from minillm.checkpoint.format import FORMAT_VERSION
from minillm.checkpoint.loader import config_of, family_of, load_weights
from minillm.log import UserError
from minillm.models.config import ModelConfig
from minillm.models.transformer import LanguageModel
from minillm.stages import STAGES

if TYPE_CHECKING:
    from minillm.text.tokenizer import Tokenizer


@dataclass
class OpenedCheckpoint:
    path: Path
    model: LanguageModel
    tokenizer: Tokenizer
    family: dict[str, Any]  # architecture and what else families.saved_family wants to know
    stage: str  # "" where the file does not tell
    step: int | None

    @property
    def architecture(self) -> str:
        return self.family["architecture"]

    @property
    def speaks_in_turns(self) -> bool:
        """It was trained on conversations."""
        return self.stage in STAGES and STAGES[self.stage].chats


def tokenizer_of(content: Any, path: Path, given: str = "") -> Tokenizer:
    """The tokenizer named by the user, else the checkpoint's own, else the one in the run folder beside flat
    weights, else the shipped one."""
    from minillm.text.tokenizer import Tokenizer

    if given:
        return Tokenizer.load(given)
    saved = content.get("tokenizer") if isinstance(content, dict) else None
    if isinstance(saved, dict) and "json" in saved:
        return Tokenizer(saved["json"], saved["chat_template"])
    for folder in (path.with_suffix(""), path.parent):
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.load(folder)
    return Tokenizer.load(None)


def open_checkpoint(checkpoint: str, *, tokenizer: str = "", adapters: Sequence[str] = ()) -> OpenedCheckpoint:
    """A full checkpoint or flat weights as a model on the CPU, in evaluation mode.

    Args:
        adapters: PATH or PATH:WEIGHT, merged into the weights; the last decides stage and chat template.

    Raises:
        UserError: a file is missing, damaged or unsafe, an adapter does not fit, or the tokenizer has another
            vocabulary size.
    """
    path = Path(checkpoint)
    content = read_tensors(path)
    weights = extract_weights(content, path)
    check_finite(weights, path)
    config = config_of(content, path)
    adapter = None
    if adapters:
        weights, adapter = with_adapters(weights, adapters, path)
        if not tokenizer and adapter.facts and (adapter.folder / "tokenizer.json").is_file():
            tokenizer = str(adapter.folder)
    text = tokenizer_of(content, path, tokenizer)
    if text.vocab_size != config.vocab_size:
        raise UserError(
            f"{path} has a vocabulary of {config.vocab_size}, the tokenizer {text.vocab_size}: "
            "give the one it was trained with (--tokenizer)"
        )
    model = LanguageModel(config)
    load_weights(model, weights, str(path), strict=True)
    full = isinstance(content, dict) and "model_state_dict" in content
    stage = (
        content.get("stage", "") if full else next((s for s in STAGES if re.search(rf"(^|_){s}(_|$)", path.stem)), "")
    )
    if adapter is not None:
        stage = adapter.facts.get("stage", stage)
    return OpenedCheckpoint(
        path=path,
        model=model.eval(),
        tokenizer=text,
        family=family_of(content, path),
        stage=stage,
        step=content.get("global_step") if full else None,
    )


def save_derived(
    target: Path,
    opened: OpenedCheckpoint,
    weights: dict[str, Any],
    config: ModelConfig,
    family: dict[str, Any],
    step: int | None,
) -> None:
    """A checkpoint made of another one's weights, which it names as its parent. There is no optimizer state in it."""
    save_tensors(
        target,
        {
            "format_version": FORMAT_VERSION,
            "architecture": family["architecture"],
            "family": family,
            "stage": opened.stage,
            "global_step": step,
            "model_state_dict": weights,
            "model_config": config.to_dict(),
            "tokenizer": {
                "json": opened.tokenizer.json_text,
                "chat_template": opened.tokenizer.chat_template,
                "fingerprint": opened.tokenizer.fingerprint,
            },
            "parent": {
                "path": str(opened.path), "sha256": sha256(opened.path), "stage": opened.stage, "step": opened.step,
            },
        },
    )  # fmt: skip
