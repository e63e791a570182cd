"""minillm checkpoint tag: give a checkpoint a name that stays. A tag is a folder beside the runs (out/v1) with a second
name (hard link) of the file: later runs, pruning and retraining do not touch it, and every command takes its path."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from minillm.atomic import write_atomic, write_text
from minillm.log import UserError, info


@dataclass(frozen=True)
class TagSettings:
    """Name a checkpoint"""

    checkpoint: str = field(metadata={"help": "a full checkpoint, or a run folder (its best)", "positional": True})
    name: str = field(default="", metadata={"help": "of the tag (default: the next free version: v1, v2, ...)"})


def run(settings: TagSettings) -> None:
    """Link the checkpoint as OUT/NAME/RUN.pt, where OUT is the folder that the run folder is in.

    Raises:
        UserError: the checkpoint is damaged or has no run folder, or the name is taken.
    """
    from minillm.checkpoint.files import check_finite, extract_weights, hash_file, sha256
    from minillm.checkpoint.folders import checkpoint_path, read_checkpoint
    from minillm.checkpoint.sharded import is_sharded
    from minillm.manage.catalog import TAG_FILE, read_tag

    source = checkpoint_path(settings.checkpoint)
    if is_sharded(source):
        raise UserError(f"{source} is a folder, a tag is a file: `minillm checkpoint consolidate {source}` makes one")
    content = read_checkpoint(source)
    if source.suffix != ".pt" or not isinstance(content, dict) or "model_state_dict" not in content:
        raise UserError(f"{source} is not a full checkpoint (.pt): weights alone do not say what they are")
    check_finite(extract_weights(content, source), source)
    folder = source.resolve().parent
    if (folder / TAG_FILE).is_file():
        raise UserError(f"{source} is a tag already; tag the run's own checkpoint")
    out = source.parent.parent if source.parent.name not in ("", "..") else Path(os.path.relpath(folder.parent))
    name = settings.name or next_name(out, folder.name.removesuffix(".previous"))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name.endswith(".previous"):
        raise UserError(f"--name {name!r}: letters, digits, dots, hyphens and underscores make a tag's name")
    place = out / name
    if place.exists() and not (place / TAG_FILE).is_file():
        raise UserError(f"{place} exists and is not a tag: choose another --name")
    target = place / f"{folder.name.removesuffix('.previous')}.pt"
    kept = read_tag(place / TAG_FILE) if place.exists() else {}
    digest = sha256(source)
    if target.name in kept:
        if kept[target.name]["sha256"] == digest:
            info(f"[tag] {target} is this checkpoint already")
            return
        raise UserError(f"{target} is another checkpoint already: choose another --name, or delete {place}")
    write_atomic(target, lambda temporary: _link(source, temporary))
    write_text(hash_file(target), f"{digest}  {target.name}\n")
    kept[target.name] = {
        "source": str(source), "sha256": digest, "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip
    write_text(place / TAG_FILE, json.dumps(kept, indent=2) + "\n")
    info(f"[tag] {source} stays as {target}")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # no links on this file system
        shutil.copyfile(source, target)


def next_name(out: Path, run: str) -> str:
    """The version after the highest tag that keeps something of this run."""
    from minillm.manage.catalog import TAG_FILE

    taken = [int(path.name[1:]) for path in out.glob("v*") if path.name[1:].isdigit()]
    own = [number for number in taken if (out / f"v{number}" / f"{run}.pt").is_file()]
    free = max(own, default=0) + 1
    while (out / f"v{free}").exists() and not (out / f"v{free}" / TAG_FILE).is_file():
        free += 1
    return f"v{free}"
