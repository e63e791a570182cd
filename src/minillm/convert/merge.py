"""minillm merge: a checkpoint with an adapter merged into it, as a checkpoint that needs no adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minillm.log import info


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Merge adapters into a checkpoint"""

    checkpoint: str = field(metadata={"help": "the weights the adapter was trained beside (.pt, .pth)"})
    adapter: tuple[str, ...] = field(
        metadata={"help": "folders that training or peft wrote, with a weight as in a:0.7 b:0.3 where they are mixed"}
    )
    output: str = field(metadata={"help": "file to write (.pt)"})
    tokenizer: str = field(default="", metadata={"help": "tokenizer.json or its folder (default: the checkpoint's)"})


def run(settings: MergeSettings) -> None:
    """Write the merged checkpoint: every command takes it.

    Raises:
        UserError: a file cannot be used, or an adapter does not fit the checkpoint.
    """
    from minillm.checkpoint.model import open_checkpoint, save_derived

    opened = open_checkpoint(settings.checkpoint, tokenizer=settings.tokenizer, adapters=settings.adapter)
    save_derived(
        Path(settings.output), opened, opened.model.state_dict(), opened.model.config, opened.family, opened.step
    )
    info(f"[merge] {settings.output}: {settings.checkpoint} with {' '.join(settings.adapter)} merged into it")
