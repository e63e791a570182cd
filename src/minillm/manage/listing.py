"""minillm checkpoint list: what there is under a folder; minillm checkpoint show: everything about one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.log import UserError, format_size

if TYPE_CHECKING:
    from minillm.manage.catalog import Entry


@dataclass(frozen=True)
class ListSettings:
    """List the checkpoints under a folder"""

    folder: str = field(default="out", metadata={"help": "where to look", "positional": True})
    json: bool = field(default=False, metadata={"help": "as JSON, with every field"})


@dataclass(frozen=True)
class ShowSettings:
    """Show everything about a checkpoint"""

    checkpoint: str = field(metadata={"help": "a file, or a run folder (its best)", "positional": True})
    json: bool = field(default=False, metadata={"help": "as JSON"})


def run_list(settings: ListSettings) -> None:
    """Print a line for each checkpoint; of those that are one file under several names, one line.

    Raises:
        UserError: there is no such folder.
    """
    from minillm.manage.catalog import find

    entries = find(Path(settings.folder))
    if settings.json:
        print(json.dumps([entry.to_dict() for entry in entries], indent=2, ensure_ascii=False, default=str))
        return
    if not entries:
        print(f"no checkpoints in {settings.folder}")
        return
    print("\n".join(table(entries)))
    total = sum(entry.size for entry in entries)
    print(f"\n{len(entries)} files, {format_size(total)} (names of one file counted once)")


def table(entries: Iterable[Entry]) -> list[str]:
    """Lines of at most about 100 columns: a heading for each run, then its files."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(_heading(entry), []).append(entry)
    lines: list[str] = []
    for (folder, *about), members in groups.items():
        if lines:
            lines.append("")
        lines.append(f"{folder}: {', '.join(filter(None, about))}" if any(about) else folder)
        rows = [_row(entry) for entry in members]
        for (names, *cells), entry in zip(rows, members):
            first, *more = names
            step, loss, size, date, notes = cells
            lines.append(f"  {first:<34} {step:>9}  {loss:>11}  {size:>8}  {date}  {notes}".rstrip())
            lines += [f"  = {name}" for name in more]
            if entry.problem:
                lines.append(f"    cannot be used: {entry.problem}")
    return lines


def _heading(entry: Entry) -> tuple[str, ...]:
    from minillm.manage.catalog import run_name_version

    parent = entry.parent or {}
    origin = ""
    if entry.parent:
        step = f" step {parent['step']}" if parent.get("step") is not None else ""
        origin = f"from {parent.get('path')}{step}"
    elif entry.kind in ("full", "sharded"):
        origin = "from random weights"
    return (
        str(Path(entry.path).parent), entry.stage or "", entry.family or "", entry.run_name or "",
        "" if entry.version in (None, run_name_version(entry.run_name)) else f"version {entry.version}", origin,
    )  # fmt: skip


def _row(entry: Entry) -> tuple[Any, ...]:
    folder = Path(entry.path).parent
    also = [str(Path(name).name if Path(name).parent == folder else name) for name in entry.also]
    loss = f"loss {entry.validation_loss:.4f}" if isinstance(entry.validation_loss, float) else ""
    kind = {"full": "", "weights": "weights", "safetensors": "weights", "zst": "compressed"}.get(entry.kind, entry.kind)
    notes = ", ".join(filter(None, [kind, " ".join(f"@{tag}" for tag in entry.tags)]))
    step = "" if entry.step is None else f"step {entry.step}"
    return [Path(entry.path).name, *also], step, loss, format_size(entry.size), entry.date, notes


def run_show(settings: ShowSettings) -> None:
    """Print every field: tensors by shape and type, logs by their number and last entry, and the chain of parents.

    Raises:
        UserError: it cannot be read.
    """
    from minillm.checkpoint.folders import checkpoint_path
    from minillm.manage.catalog import content_of, describe

    path = checkpoint_path(settings.checkpoint)
    content = content_of(path)
    fields = shortened(content)
    chain = lineage(content, path)
    entry = describe(path)
    if settings.json:
        file = {
            name: value for name, value in entry.to_dict().items() if name in ("path", "kind", "size", "date", "sha256")
        }
        print(json.dumps({"file": file, "lineage": chain, "content": fields}, indent=2, ensure_ascii=False))
        return
    recorded = "of each file in SHA256SUMS" if entry.kind == "sharded" else entry.sha256 or "not recorded"
    print(f"{path}: {format_size(entry.size)}, {entry.date}, sha256 {recorded}")
    for line in people(fields):
        print(line)
    print("lineage:")
    for number, link in enumerate(chain):
        print(f"{'  ' * (number + 1)}{_link_text(link)}")


def shortened(value: Any, name: str = "") -> Any:
    """The same containers with tensors as shape and type, logs as their number and last entry, and long texts cut: a
    value that JSON can hold."""
    import torch

    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, dict):
        return {str(key): shortened(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        items = list(value)
        if name.endswith("_log") or (len(items) > 16 and all(isinstance(item, dict) for item in items)):
            return {"entries": len(items), "last": shortened(items[-1]) if items else None}
        if len(items) > 16:
            return f"{len(items)} values"
        return [shortened(item) for item in items]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str) and len(value) > 400:
        return f"{len(value):,} characters: {' '.join(value[:60].split())}..."
    return value if isinstance(value, str | int | float | bool | None) else str(value)


SAME = {"config": "model_config", "training_config": "train_config", "step": "global_step"}  # older spellings


def people(fields: Any, indent: int = 0) -> list[str]:
    """Nested dictionaries as indented lines; what stands there twice is shown once."""
    if not isinstance(fields, dict):
        return ["  " * indent + str(fields)]
    lines = []
    for key, value in fields.items():
        if key in SAME and indent == 0 and fields.get(SAME[key]) == value:
            lines.append(f"{key}: as {SAME[key]}")
        elif isinstance(value, dict) and value:
            lines.append("  " * indent + f"{key}:")
            numbered = len(value) > 4 and all(name.isdigit() for name in value)  # one for each parameter
            lines += people({"0": value["0"]} if numbered and "0" in value else value, indent + 1)
            lines += ["  " * indent + f"  ... {len(value)} such entries"] if numbered else []
        else:
            lines.append("  " * indent + f"{key}: {'none' if value is None or value == {} else value}")
    return lines


def lineage(content: Any, path: Path) -> list[dict[str, Any]]:
    """The parents of a checkpoint, the nearest first, as far as their files are found. Each has path, stage, step and
    sha256 as its child recorded them, and `found`: "yes", "no", or "changed" where the file is another one by now."""
    from minillm.checkpoint.compressed import find_parent, original_sha256
    from minillm.manage.catalog import content_of, describe

    chain: list[dict[str, Any]] = []
    seen: set[str] = set()
    while isinstance(content, dict) and isinstance(content.get("parent"), dict):
        parent = content["parent"]
        link = {key: parent.get(key) for key in ("path", "stage", "step", "sha256")}
        chain.append(link)
        found = find_parent(parent, path)
        if found is None or str(parent.get("sha256")) in seen:
            link["found"] = "no"
            break
        seen.add(str(parent.get("sha256")))
        link["stage"] = link["stage"] or describe(found).stage  # flat weights: their name tells
        link["found"] = "yes" if original_sha256(found) == parent.get("sha256") else "changed"
        if link["found"] == "changed":
            break
        path = found
        if path.is_dir():  # imported: that is where it is from
            break
        try:
            content = content_of(path)
        except UserError as error:
            link["found"] = f"unreadable: {error}"
            break
        if isinstance(content, dict) and "model_state_dict" not in content:
            content = _full_twin(path)
    return chain


def _full_twin(path: Path) -> Any:
    """Flat weights do not name their parent; the run folder beside them does."""
    from minillm.checkpoint.files import peek

    for name in ("best_model.pt", "last.pt"):
        beside = path.with_suffix("") / name
        if beside.is_file():
            try:
                return peek(beside)
            except UserError:
                return None
    return None


def _link_text(link: dict[str, Any]) -> str:
    known = [str(link["stage"] or "stage unknown")]
    known += [f"step {link['step']}"] if link["step"] is not None else []
    state = {"yes": "found", "no": "the file is gone", "changed": "the file at this path is another one now"}
    return f"from {link['path']} ({', '.join(known)}): {state.get(link['found'], link['found'])}"
