"""What is known of a checkpoint without reading its tensors, and the checkpoints under a folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from minillm.checkpoint.compressed import SUFFIXES, read_header
from minillm.checkpoint.files import hash_file, peek, read_tensors
from minillm.checkpoint.folders import read_model_folder
from minillm.checkpoint.loader import REST_KEY, config_beside
from minillm.checkpoint.sharded import is_sharded, peek_sharded
from minillm.log import UserError
from minillm.stages import stage_in_name

ENDINGS = (".pt", ".pth", ".safetensors", *(".pt" + suffix for suffix in SUFFIXES))
TAG_FILE = "tag.json"  # in the folder of a tag, beside the checkpoints it keeps


@dataclass
class Entry:
    """One checkpoint file; what is unknown is None."""

    path: str
    size: int  # bytes on disk
    date: str  # of the last change, UTC
    also: list[str] = field(default_factory=list)  # other names of the same bytes (hard links)
    kind: str = ""  # full, sharded, weights, safetensors, zst, delta
    stage: str | None = None
    family: str | None = None
    step: int | None = None
    validation_loss: float | None = None  # the last that was measured up to this step
    parent: dict[str, Any] | None = None
    run_name: str | None = None
    version: int | None = None  # of the run in its folder
    format_version: int | None = None
    sha256: str | None = None  # as recorded beside it
    tags: list[str] = field(default_factory=list)
    problem: str | None = None  # why it cannot be read

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_name_version(name: str | None) -> int | None:
    """The version number at the end of a run's name."""
    found = re.search(r"-v(\d+)$", name or "")
    return int(found[1]) if found else None


def facts(content: Any) -> dict[str, Any]:
    """What a full checkpoint says about itself, as the fields of an Entry. Nothing is taken for granted."""

    def get(key: str, kind: type) -> Any:
        value = content.get(key)
        return value if isinstance(value, kind) and not isinstance(value, bool) else None

    losses = [
        row["val/loss"]
        for row in get("validation_log", list) or []
        if isinstance(row, dict) and isinstance(row.get("val/loss"), float)
    ]
    run_name = (get("model_info", dict) or {}).get("model_name")
    run_name = run_name if isinstance(run_name, str) else None
    return {
        "stage": get("stage", str),
        "family": get("architecture", str),
        "step": get("global_step", int),
        "validation_loss": losses[-1] if losses else get("best_val_loss", float),
        "parent": get("parent", dict),
        "run_name": run_name,
        "version": (get("train_config", dict) or {}).get("version", run_name_version(run_name)),
        "format_version": get("format_version", int),
    }


def recorded_hash(path: Path) -> str | None:
    """The SHA-256 that stands beside a file; nothing is computed."""
    beside = hash_file(path)
    words = beside.read_text(encoding="utf-8", errors="replace").split() if beside.is_file() else []
    return words[0] if words else None


def describe(path: Path) -> Entry:
    """The entry of one file. What cannot be read has a `problem`."""
    status = path.stat()
    date = datetime.fromtimestamp(status.st_mtime, timezone.utc).strftime("%Y-%m-%d %H:%M")
    if path.is_dir():  # a sharded checkpoint, or a model folder
        size = sum(each.stat().st_size for each in path.iterdir() if each.is_file())
        entry = Entry(str(path), size, date, kind="sharded" if is_sharded(path) else "folder")
        if entry.kind == "folder":
            return entry
    else:
        entry = Entry(str(path), status.st_size, date, sha256=recorded_hash(path))
    try:
        for name, value in _read(path, entry).items():
            setattr(entry, name, value)
    except (UserError, OSError) as error:
        entry.problem = str(error)
    return entry


def _read(path: Path, entry: Entry) -> dict[str, Any]:
    if entry.kind == "sharded":
        return facts(peek_sharded(path))
    if path.suffix in SUFFIXES:
        entry.kind = path.suffix[1:]
        header = read_header(path)
        summary = header.get("summary")
        known = {name: value for name, value in (summary or {}).items() if hasattr(entry, name)}
        return {**known, "sha256": header.get("sha256")}
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        entry.kind = "safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys())
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read as a checkpoint ({error})") from None
        return _of_weights(path, keys)
    content = peek(path)
    entry.kind = "full" if isinstance(content, dict) and "model_state_dict" in content else "weights"
    return facts(content) if entry.kind == "full" else _of_weights(path, set(content))


def _of_weights(path: Path, keys: set[Any]) -> dict[str, Any]:
    """Weights do not say where they are from; their name and what lies beside them may."""
    stage = stage_in_name(path.stem) or None
    family = (config_beside(path, "minillm_family") or {}).get("architecture", "sdd" if REST_KEY in keys else None)
    training = path.with_suffix("") / "training_config.json"
    known: Any = {}
    if training.is_file():
        try:
            known = json.loads(training.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{training} is not valid JSON") from None
    run_name = known.get("run_name") if isinstance(known, dict) else None
    version = known.get("version", run_name_version(run_name)) if isinstance(known, dict) else None
    return {"stage": stage, "family": family, "run_name": run_name, "version": version}


def checkpoint_files(folder: Path) -> Iterator[Path]:
    """Every checkpoint file or sharded checkpoint below a folder, in order. Links to folders are not followed."""
    for current, folders, files in os.walk(folder):
        shards = sorted(name for name in folders if is_sharded(Path(current) / name))
        yield from (Path(current) / name for name in shards)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in shards)
        for name in sorted(files):
            if name.endswith(ENDINGS) and not name.startswith("."):
                yield Path(current) / name


def find(folder: Path) -> list[Entry]:
    """The checkpoints below a folder, each once however many names it has, with the tags that keep them.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    first: dict[tuple[int, int], Entry] = {}
    # A file is called by its name in its run; names that tags gave it come after.
    for path in sorted(checkpoint_files(folder), key=lambda path: (path.parent / TAG_FILE).is_file()):
        status = path.stat() if path.exists() else None
        if status is None:  # a link that leads nowhere
            continue
        known = first.get((status.st_dev, status.st_ino))
        if known is not None:
            known.also.append(str(path))
        else:
            first[status.st_dev, status.st_ino] = describe(path)
    kept = tags(folder)
    for entry in first.values():
        entry.tags = sorted(kept.get(entry.sha256 or "", []))
    return list(first.values())


def tags(folder: Path) -> dict[str, list[str]]:
    """The names of the tags in `folder`, and beside it, by the SHA-256 of what they keep.

    Raises:
        UserError: the file of a tag is damaged.
    """
    found: dict[str, list[str]] = {}
    for path in sorted({*folder.rglob(TAG_FILE), *folder.parent.glob(f"*/{TAG_FILE}")}):
        for saved in read_tag(path).values():
            found.setdefault(saved["sha256"], []).append(path.parent.name)
    return found


def read_tag(path: Path) -> dict[str, dict[str, str]]:
    """The checkpoints that a tag keeps, by the names of their files.

    Raises:
        UserError: the file is damaged.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(kept, dict) or not all(isinstance(item["sha256"], str) for item in kept.values()):
            raise ValueError("it names no checkpoints")
        return kept
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not the file of a tag ({error})") from None


def step_number(path: Path) -> int:
    """step_000500.pt, step_000500.sharded -> 500; -1 for other names."""
    found = re.match(r"step_(\d+)\.(pt|sharded)", path.name)
    return int(found[1]) if found else -1


def content_of(path: Path) -> Any:
    """What is in a checkpoint or a Hugging Face folder; where it can be, with the tensors left on disk.

    Raises:
        UserError: it cannot be read.
    """
    if is_sharded(path):
        return peek_sharded(path)
    if path.is_dir():
        return read_model_folder(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    return read_tensors(path) if path.suffix in (*SUFFIXES, ".safetensors") else peek(path)
