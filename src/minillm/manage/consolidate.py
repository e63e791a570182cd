"""minillm checkpoint consolidate: a sharded checkpoint as one file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minillm.log import UserError, info


@dataclass(frozen=True)
class ConsolidateSettings:
    """Make one file of a sharded checkpoint"""

    checkpoint: str = field(
        metadata={"help": "a folder step_N.sharded, or a run folder (the last one saved)", "positional": True}
    )
    output: str = field(
        default="",
        metadata={"help": "a full checkpoint (.pt) or flat weights (.pth) (default: step_N.pt beside the folder)"},
    )


def run(settings: ConsolidateSettings) -> None:
    """Write the file. The folder stays.

    Raises:
        UserError: it is no sharded checkpoint, or damaged, or the output is no .pt or .pth, or exists as a folder.
    """
    from minillm.checkpoint.files import extract_weights, save_tensors
    from minillm.checkpoint.sharded import is_sharded, read_sharded, sharded_checkpoints, step_of

    source = Path(settings.checkpoint)
    if not is_sharded(source):
        found = sharded_checkpoints(source) if source.is_dir() else []
        if not found:
            raise UserError(f"{source} is neither a sharded checkpoint (a folder step_N.sharded) nor a run with one")
        source = found[0]
    output = Path(settings.output or source.parent / f"step_{step_of(source):06d}.pt")
    if output.suffix not in (".pt", ".pth") or output.is_dir():
        raise UserError(f"--output {output}: name a file that ends in .pt (full checkpoint) or .pth (weights alone)")
    content = read_sharded(source)
    save_tensors(output, extract_weights(content, source) if output.suffix == ".pth" else content)
    kind = "weights alone" if output.suffix == ".pth" else "full checkpoint"
    info(f"[consolidate] {output}: {kind} of {source}, step {content.get('global_step')}")
