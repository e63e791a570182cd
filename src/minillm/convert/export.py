"""minillm export: a checkpoint as something other programs run. The artefact is written beside, checked by its own
runtime (`parity.py`), and only then takes the output's place."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from minillm.atomic import put_in_place
from minillm.log import UserError, info, warn


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Export a checkpoint to other programs"""

    checkpoint: str = field(metadata={"help": "full checkpoint (.pt) or flat weights (.pth)"})
    adapter: tuple[str, ...] = field(
        default=(), metadata={"help": "LoRA adapters to merge into it: folders, with a weight as in a:0.7 b:0.3"}
    )
    output: str = field(
        metadata={"help": "folder (or .gguf file) to write; it must not exist, be empty or be an earlier export"}
    )
    format: str = field(
        default="huggingface",
        metadata={"help": "a folder for transformers, or a file for llama.cpp", "choices": ("huggingface", "gguf")},
    )
    gguf_type: str = field(
        default="",
        metadata={
            "help": "gguf: 32 or 16 bits a number, or 8 with a scale for 32 (default f16)",
            "choices": ("", "f32", "f16", "q8_0"),
        },
    )
    adapter_only: bool = field(
        default=False, metadata={"help": "huggingface: the adapter alone, in peft's form, not merged"}
    )
    base: str = field(
        default="",
        metadata={"help": "with --adapter_only: where the exported base lies, as peft should find it"},
    )
    quantize: str = field(
        default="",
        metadata={"help": "huggingface: weights in 8 or 4 bits, by torchao", "choices": ("", "int8", "int4")},
    )
    validation_data: str = field(
        default="", metadata={"help": "text or conversations (JSONL) on which --quantize measures what is lost"}
    )
    no_check: bool = field(
        default=False, metadata={"help": "do not load the result with its own runtime and compare what it writes"}
    )
    tokenizer: str = field(default="", metadata={"help": "tokenizer.json or its folder (default: the checkpoint's)"})


def run(settings: ExportSettings) -> None:
    """Write beside, check, rename.

    Each format is a module with the same five functions:
    `require(settings)` (UserError where the runtime of the check is missing or flags do not fit the format),
    `may_replace(path)` (is what stands there an earlier export of ours?),
    `write(opened, settings, beside)` (the artefact, at that path: a file or a folder),
    `check(opened, settings, beside)` (a sentence about what was compared, or UserError; it may note it in the card),
    `usage(opened, settings)` (how it is loaded).

    Raises:
        UserError: the output exists and is not an earlier export, the checkpoint cannot be exported so, or the
            artefact does not do in its own runtime what the checkpoint does here. The output's place is then as it was.
    """
    from minillm.checkpoint.model import open_checkpoint

    form: Any = import_module(f"minillm.convert.{settings.format}")
    output = Path(os.path.abspath(settings.output))
    if output.exists() and not form.may_replace(output):
        raise UserError(f"{settings.output} exists and is not an earlier export: choose another --output")
    form.require(settings)
    merged = () if settings.adapter_only else settings.adapter
    opened = open_checkpoint(settings.checkpoint, tokenizer=settings.tokenizer, adapters=merged)
    # in a folder of its own: what loads it may put files beside it, and remembers it by its name
    folder = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    beside = folder / output.name
    try:
        form.write(opened, settings, beside)
        if settings.no_check:
            warn(f"{settings.output} is not checked (--no_check): nobody has loaded it and compared what it writes")
        else:
            info(f"[export] checked: {form.check(opened, settings, beside)}")
        put_in_place(beside, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    info(f"[export] {settings.checkpoint} -> {settings.output}: {form.usage(opened, settings)}")
