"""From a checkpoint file to a model that can be used, with its tokenizer and family: nothing has to be repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.checkpoint.adapter import with_adapters
from minillm.checkpoint.files import check_finite, check_fits, extract_weights, save_tensors, sha256
from minillm.checkpoint.folders import IMPORTED, checkpoint_path, read_checkpoint
from minillm.checkpoint.format import FORMAT_VERSION
from minillm.checkpoint.loader import config_of, family_of, load_weights
from minillm.log import UserError
from minillm.models.config import ModelConfig
from minillm.models.device import choose_device
from minillm.models.transformer import LanguageModel
from minillm.stages import STAGES, stage_in_name
from minillm.text.chat import TEMPLATES

if TYPE_CHECKING:
    from minillm.text.tokenizer import Tokenizer

FACTS = ("parent", "imported", "best_validation_loss", "data_state", "training_stats")


@dataclass
class OpenedCheckpoint:
    path: Path
    model: LanguageModel
    tokenizer: Tokenizer
    family: dict[str, Any]  # architecture and what else families.saved_family wants to know
    stage: str  # "" where the file does not tell
    step: int | None
    facts: dict[str, Any] = field(default_factory=dict)  # what a full checkpoint says of itself besides: FACTS

    @property
    def architecture(self) -> str:
        return self.family["architecture"]

    @property
    def speaks_in_turns(self) -> bool:
        """It was trained on conversations: by a stage of ours, or imported with a chat template of its own."""
        if self.stage == IMPORTED:
            return self.tokenizer.chat_template not in TEMPLATES.values()
        return self.stage in STAGES and STAGES[self.stage].chats


def tokenizer_of(content: Any, path: Path, given: str = "") -> Tokenizer:
    """The tokenizer named by the user, else the checkpoint's own, else the one in the run folder beside flat
    weights, else the shipped one.

    Raises:
        UserError: the checkpoint's own is damaged, or the one named by the user has other tokens.
    """
    from minillm.text.tokenizer import Tokenizer

    saved = content.get("tokenizer") if isinstance(content, dict) else None
    own = saved_tokenizer(saved, path) if isinstance(saved, dict) and "json" in saved else None
    if given:
        named = Tokenizer.load(given)
        if own is not None and not named.same_tokens(own):
            raise UserError(f"{given} has other tokens than the tokenizer {path} was trained with: leave it out")
        return named
    if own is not None:
        return own
    for folder in (path.with_suffix(""), path.parent):
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.load(folder)
    return Tokenizer.load(None)


def saved_tokenizer(saved: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer in a checkpoint.

    Raises:
        UserError: it is none, or another one than the fingerprint beside it says.
    """
    from minillm.text.tokenizer import Tokenizer

    text, template = saved["json"], saved.get("chat_template")
    if not isinstance(text, str) or not isinstance(template, str):
        raise UserError(f"{path}: its tokenizer has no text for json and chat_template")
    try:
        own = Tokenizer.from_dict(saved)
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception for what it cannot read
        raise UserError(f"{path}: its tokenizer cannot be used ({error})") from None
    if saved.get("fingerprint", own.fingerprint) != own.fingerprint:
        raise UserError(f"{path}: its tokenizer does not match the fingerprint that was recorded with it")
    return own


def open_checkpoint(
    checkpoint: str, *, tokenizer: str = "", adapters: Sequence[str] = (), device: str = "cpu"
) -> OpenedCheckpoint:
    """A full checkpoint, flat weights, a run folder or a Hugging Face folder as a model in evaluation mode, its weights
    frozen.

    Args:
        device: as --device names it.
        adapters: PATH or PATH:WEIGHT, merged into the weights; the last decides stage and chat template.

    Raises:
        UserError: a file is missing, damaged or unsafe, an adapter does not fit, the tokenizer has another
            vocabulary size, or there is no such device.
    """
    place = choose_device(device)
    path = checkpoint_path(checkpoint)
    content = read_checkpoint(path)
    weights = extract_weights(content, path)
    check_finite(weights, path)
    config = config_of(content, path)
    check_fits(weights, config, path)
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
    stage = str(content.get("stage") or "") if full else stage_in_name(path.stem)
    if adapter is not None:
        stage = adapter.facts.get("stage", stage)
    return OpenedCheckpoint(
        path=path,
        model=model.to(place).eval().requires_grad_(False),
        tokenizer=text,
        family=family_of(content, path),
        stage=stage,
        step=content.get("global_step") if full else None,
        facts={key: content[key] for key in FACTS if full and content.get(key) is not None},
    )


def save_derived(
    target: Path,
    opened: OpenedCheckpoint,
    weights: dict[str, Any],
    config: ModelConfig,
    family: dict[str, Any],
    step: int | None,
    extra: dict[str, Any] | None = None,
) -> None:
    """A checkpoint made of another one's weights, which it names as its parent. There is no optimizer state in it.

    Args:
        extra: further keys.
    """
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
            "tokenizer": opened.tokenizer.to_dict(),
            "parent": {
                "path": str(opened.path), "sha256": sha256(opened.path), "stage": opened.stage, "step": opened.step,
            },
            **(extra or {}),
        },
    )  # fmt: skip
