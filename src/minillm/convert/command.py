"""minillm convert: two journeys under one name. Raw weights become a full checkpoint, or a checkpoint the beginning of
a model of another family."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from minillm.config import UsageError
from minillm.convert.family import ConvertSettings, convert_family
from minillm.convert.raw import RawSettings, convert_raw


@dataclass(frozen=True, kw_only=True)
class SharedSettings:
    """Both"""

    tokenizer: str = field(default="", metadata={"help": "tokenizer file or its folder (default: the input's own)"})


def run(raw: RawSettings, family: ConvertSettings, shared: SharedSettings) -> None:
    """Go the one that the flags belong to.

    Raises:
        UsageError: flags of both or of neither, or one is missing.
        UserError: the input cannot be converted.
    """
    of_raw, of_family = _given(raw), _given(family)
    if of_raw and of_family:
        raise UsageError(
            f"--{' --'.join(of_raw)} belong to raw weights (--input_dir, --output_dir), --{' --'.join(of_family)} to "
            "another family (--checkpoint, --to, --output): give those of one"
        )
    if not of_raw and not of_family:
        raise UsageError(
            "say what to convert: raw weights to a full checkpoint with --input_dir IN --output_dir OUT, or a "
            "checkpoint to another family with --checkpoint IN.pt --to diffusion --output OUT.pt"
        )
    needed = ("input_dir", "output_dir") if of_raw else ("checkpoint", "to", "output")
    missing = [name for name in needed if name not in (of_raw or of_family)]
    if missing:
        raise UsageError(f"--{missing[0]} is required, too, beside --{' --'.join(of_raw or of_family)}")
    if of_raw:
        convert_raw(raw, shared.tokenizer)
    else:
        convert_family(family, shared.tokenizer)


def _given(settings: Any) -> list[str]:
    """Names of the flags that differ from their defaults."""
    return [each.name for each in fields(settings) if getattr(settings, each.name) != each.default]
