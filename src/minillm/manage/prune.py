"""minillm checkpoint prune: delete the checkpoints of runs that nobody needs any more."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.log import UserError, format_size, info, warn

if TYPE_CHECKING:
    from minillm.manage.catalog import Entry


@dataclass(frozen=True)
class PruneSettings:
    """Delete old checkpoints of a run"""

    folder: str = field(metadata={"help": "a run folder, or a folder of run folders", "positional": True})
    keep: int = field(default=2, metadata={"help": "the newest so many stay", "min": 1})
    yes: bool = field(default=False, metadata={"help": "delete; without it nothing is, unless a terminal says so"})


def run(settings: PruneSettings) -> None:
    """Say what would be deleted and how much that frees, and delete it where that was agreed to.

    Raises:
        UserError: there is no such folder.
    """
    from minillm.checkpoint.files import remove
    from minillm.checkpoint.sharded import remove_sharded

    folder = Path(settings.folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    runs = sorted({path.parent for pattern in ("step_*.pt*", "step_*.sharded") for path in folder.rglob(pattern)})
    unneeded = [entry for each in runs for entry in superfluous(each, settings.keep)]
    if not unneeded:
        info(f"[prune] nothing to delete in {folder}: the newest {settings.keep}, the best and what is tagged stay")
        return
    for entry in unneeded:
        print(f"{entry.path}  step {entry.step}  {format_size(entry.size)}")
    freed = sum(entry.size for entry in unneeded)
    print(f"{len(unneeded)} checkpoints, {freed:,} bytes ({format_size(freed)})")
    if not settings.yes:
        if not sys.stdin.isatty():
            info("[prune] nothing was deleted: give --yes")
            return
        if input("Delete them? [y/N] ").strip().lower() not in ("y", "yes"):
            info("[prune] nothing was deleted")
            return
    for entry in unneeded:
        (remove_sharded if entry.kind == "sharded" else remove)(Path(entry.path))
    info(f"[prune] {len(unneeded)} checkpoints deleted")


def superfluous(folder: Path, keep: int) -> list[Entry]:
    """The numbered checkpoints of a run folder that may go: not among the newest `keep`, no other name of the best or
    the last one, not tagged, and something that can be read stays."""
    from minillm.checkpoint.compressed import SUFFIXES
    from minillm.checkpoint.folders import RUN_FILES
    from minillm.checkpoint.sharded import SUFFIX as SHARDED
    from minillm.checkpoint.sharded import best_sharded, sharded_checkpoints
    from minillm.manage.catalog import describe, step_number, tags

    files = (path for path in folder.glob("step_*.pt*") if step_number(path) >= 0)
    numbered = sorted((*files, *sharded_checkpoints(folder)), key=step_number)
    endings = (".pt", SHARDED, *SUFFIXES)
    entries = {path: describe(path) for path in numbered if path.suffix in endings and not path.is_symlink()}
    good = [path for path, entry in entries.items() if entry.problem is None]
    for entry in entries.values():
        if entry.problem is not None:
            warn(f"{entry.problem}; it is neither counted nor deleted")
    tagged = tags(folder)
    needed = [folder / name for name in RUN_FILES if (folder / name).is_file()]
    needed += filter(None, [best_sharded(folder)])
    if not any(_is_good(path) for path in [*reversed(good[-keep:]), *needed]):
        warn(f"none of the checkpoints of {folder} that would stay can be verified: nothing of it is deleted")
        return []
    return [
        entries[path]
        for path in good[:-keep]
        if entries[path].sha256 not in tagged and not any(path.samefile(other) for other in needed)
    ]


def _is_good(path: Path) -> bool:
    from minillm.checkpoint.files import read_tensors
    from minillm.checkpoint.sharded import is_sharded, verify_sharded

    try:
        (verify_sharded if is_sharded(path) else read_tensors)(path)
    except UserError as error:
        warn(str(error))
        return False
    return True
