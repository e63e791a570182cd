"""A teacher from disk: a checkpoint of ours of any size, or a folder that transformers loads. It is not copied into
the run's folder, since it may be large: the run keeps its hash, and a resumed run must find the same.

B batch, L length, D' hidden_size of the teacher, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.checkpoint.files import sha256
from minillm.checkpoint.model import open_checkpoint
from minillm.checkpoint.sharded import is_sharded
from minillm.families.base import Family
from minillm.log import UserError, info, warn
from minillm.methods.distill import ModelTeacher, Part, Teacher
from minillm.models.attention import segment_mask
from minillm.models.divergence import States
from minillm.models.transformer import count_parameters
from minillm.text.tokenizer import TOKENIZER_FILE, Tokenizer

PROBE = 8  # tokens for which a foreign model's logits are compared with its head's


def open_teacher(path: str, *, family: Family, tokenizer: Tokenizer, max_seq_len: int, device: torch.device) -> Teacher:
    """The teacher, frozen, on the device.

    Raises:
        UserError: it cannot be read, or is of another family or tokenizer than the student, or has fewer positions
            than the rows.
    """
    place = Path(path)
    if place.is_dir() and not is_sharded(place):
        return _foreign(place, family, tokenizer, max_seq_len, device)
    opened = open_checkpoint(path)
    if opened.architecture != family.name:
        raise UserError(
            f"--teacher {path} is a model of architecture {opened.architecture}, the student of {family.name}: they "
            "cannot read the same view. Give a teacher of the student's family"
        )
    if opened.tokenizer.fingerprint != tokenizer.fingerprint:
        if opened.tokenizer.json_text != tokenizer.json_text:
            raise UserError(
                f"--teacher {path} has another tokenizer than the student (fingerprints "
                f"{opened.tokenizer.fingerprint[:12]} and {tokenizer.fingerprint[:12]}): their distributions are over "
                "different tokens. Give a teacher that was trained with the student's tokenizer"
            )
        warn(f"--teacher {path} was trained with another chat template than the student's: it may know less here")
    _check_positions(path, opened.model.config.max_position_embeddings, max_seq_len)
    info(f"[distill] teacher {path}: {count_parameters(opened.model):,} parameters")
    return ModelTeacher(opened.model.to(device), sha256(place))


def check_unchanged(teacher: Teacher, path: str, resumed: dict[str, Any] | None) -> None:
    """Raises UserError where a resumed run began with another teacher."""
    if resumed is None:
        return
    before = resumed["method_state"]["frozen_sha256"].get("teacher")
    if before != teacher.sha256:
        raise UserError(
            f"--teacher {path} is not the one this run began with (SHA-256 {teacher.sha256[:12]}, was "
            f"{str(before)[:12]}): it cannot be resumed. Put the old file back, or start anew without --resume_from"
        )


def _check_positions(path: str, positions: int, max_seq_len: int) -> None:
    if positions < max_seq_len:
        raise UserError(f"--teacher {path} has {positions} positions, fewer than --max_seq_len {max_seq_len}")


class ForeignTeacher:
    """A causal language model of transformers."""

    def __init__(self, model: Any, vocabulary: int, sha256: str) -> None:
        self.model, self.sha256 = model, sha256
        self.base, self.head = model.base_model, model.get_output_embeddings().weight[:vocabulary]

    @torch.no_grad()
    def about(self, part: Part) -> States:
        view = part.view
        mask = view.mask
        if mask is None and view.segments is not None:
            mask = segment_mask(view.segments, causal=True)
        hidden = self.hidden(view.inputs, view.positions, mask)  # type: ignore[arg-type]
        return States(hidden[view.weights != 0], self.head)

    def hidden(self, tokens: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """[B, L, D'] of token ids [B, L]; mask: bool [B, 1, L, L], who may look at whom."""
        added = None
        if mask is not None:
            lowest = torch.finfo(self.model.dtype).min
            added = torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device).masked_fill(~mask, lowest)
        return self.base(
            input_ids=tokens, position_ids=positions, attention_mask=added, use_cache=False
        ).last_hidden_state


def _foreign(
    folder: Path, family: Family, tokenizer: Tokenizer, max_seq_len: int, device: torch.device
) -> ForeignTeacher:
    if family.name != "ar":
        raise UserError(
            f"--teacher {folder}, a folder for transformers, holds an ar model; the student is {family.name}"
        )
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise UserError(f"--teacher {folder} is read by transformers: pip install transformers") from error
    _check_vocabulary(folder, tokenizer)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True, trust_remote_code=False,
            use_safetensors=True,
        )  # fmt: skip
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--teacher {folder} cannot be loaded by transformers: {reason}") from error
    _check_positions(str(folder), getattr(config, "max_position_embeddings", max_seq_len), max_seq_len)
    teacher = ForeignTeacher(model.requires_grad_(False).eval(), tokenizer.vocab_size, _folder_sha256(folder))
    _check_head(teacher, folder)
    model.to(device)
    teacher.head = teacher.head.to(device)
    info(f"[distill] teacher {folder}: {config.model_type}, {count_parameters(model):,} parameters")
    return teacher


def _check_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    import tokenizers

    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise UserError(f"--teacher {folder} has no {TOKENIZER_FILE}: its vocabulary cannot be compared")
    theirs = tokenizers.Tokenizer.from_file(str(file)).get_vocab()
    ours = tokenizers.Tokenizer.from_str(tokenizer.json_text).get_vocab()
    if theirs != ours:
        raise UserError(
            f"--teacher {folder} has another vocabulary than the student ({len(theirs):,} tokens, the student's "
            f"{len(ours):,}): white-box distillation needs the same. Train the student with this folder's tokenizer "
            "(--tokenizer), or learn from texts that the teacher writes (minillm data prepare-reasoning)"
        )


@torch.no_grad()
def _check_head(teacher: ForeignTeacher, folder: Path) -> None:
    """The loss takes logits from hidden states and head; some models do more to them (a bias, a soft cap)."""
    tokens = torch.arange(PROBE)[None] % len(teacher.head)
    wanted = teacher.model(input_ids=tokens, use_cache=False).logits[..., : len(teacher.head)]
    if not torch.allclose(teacher.hidden(tokens, None, None) @ teacher.head.T, wanted, atol=1e-3, rtol=1e-3):
        raise UserError(f"--teacher {folder}: logits of this kind of model are more than hidden states times a head")


def _folder_sha256(folder: Path) -> str:
    """Of the configuration and the weights."""
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    listed = {file.name: sha256(file) for file in files if file.is_file()}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
