"""Sharded checkpoints: a folder step_000500.sharded that the processes of a run write together, and that any number of
processes reads.

    part_00000.safetensors, ...  what each process holds of the large tensors, as torch.distributed.checkpoint reads it
    rest.pt                      everything else that is in a full checkpoint, and where the tensors belong in it
    SHA256SUMS                   of these files

It is written under a hidden name, and renamed when every process has finished: a folder of this name is whole.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.atomic import put_in_place, sync, sync_folder, write_text
from minillm.checkpoint.files import read_tensors, sha256, write_archive
from minillm.log import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

SUFFIX, EARLIER = ".sharded", ".earlier"  # the latter behind it while a save of the same step replaces it
NAME = r"step_\d+\.sharded(\.earlier)?"
REST, SUMS, PART = "rest.pt", "SHA256SUMS", "part_{:05d}.safetensors"
BEST = "best_model.sharded"  # a file with the name of the best one's folder
PLACES = "sharded"  # the key of rest.pt that says where the tensors belong
LARGE = ("model_state_dict", "ema_state_dict", "optimizer_state_dict", "method_state")  # what has large tensors
OFFSETS = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint looks for offsets in the header of a part
TAKEN = object()  # marks a place that a tensor has left
MESSAGE_BYTES = 2048  # what processes tell each other about a save


@dataclass(frozen=True)
class Chunk:
    """What this process holds of a tensor that is spread over several."""

    values: Tensor
    offsets: tuple[int, ...]  # of its first element in the whole tensor
    shape: tuple[int, ...]  # of the whole tensor
    ours: bool  # this process writes it: no other holds the same


def chunk_of(tensor: Tensor) -> Chunk | None:
    """What this process holds of a DTensor (the same memory); None for a plain tensor."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return None
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return None
    local, coordinate = tensor.to_local(), tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    first = all(not placement.is_replicate() or place == 0 for placement, place in zip(tensor.placements, coordinate))
    # Where there are more processes than rows, some hold nothing.
    offsets = tensor.__create_chunk_list__()[0].offsets if local.numel() else (0,) * tensor.ndim
    return Chunk(local, tuple(offsets), tuple(tensor.shape), first and local.numel() > 0)


# -- writing


def save_sharded(target: Path, content: Mapping[str, Any], group: ProcessGroup | None, *, best: bool = False) -> None:
    """Write a full checkpoint together with the other processes of `group`, each its own part. All of them call this
    with the same target; `group` is used by nobody else meanwhile. None: this process alone.

    Args:
        content: plain containers with tensors and chunks, which later steps do not change.
        best: it is its run's best so far.
    Raises:
        OSError: on every process, where one of them could not write. Nothing is left of it, and what stood under this
            name is untouched.
    """
    rank = group.rank() if group is not None else 0
    rest, chunks = split(content, rank)
    temporary = target.with_name(f".{target.name}.tmp")
    said: dict[str, str] = {}
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        own = {name: chunk for name, chunk in chunks.items() if chunk.ours}
        if own:
            said = {"sha256": _write_part(temporary / PART.format(rank), own)}
    except Exception as error:  # told to the others, who would wait
        said = {"error": f"process {rank}: {_reason(error)}"}
    answers = _exchange(said, group)
    problem = next((answer["error"] for answer in answers if "error" in answer), "")
    if rank == 0:
        try:
            if not problem:
                sums = {PART.format(i): answer["sha256"] for i, answer in enumerate(answers) if "sha256" in answer}
                _commit(temporary, target, rest, sums)
                if best:
                    remember_best(target)
        except Exception as error:  # told to the others, too
            problem = _reason(error)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    problem = _exchange({"error": problem}, group)[0]["error"]
    if problem:
        raise OSError(f"{target}: {problem}")


def split(content: Mapping[str, Any], rank: int = 0) -> tuple[dict[str, Any], dict[str, Chunk]]:
    """(the content without its large tensors, these by name). What all processes have whole, the first one writes."""
    chunks: dict[str, Chunk] = {}
    places: dict[str, Any] = {}

    def without(value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, dict):
            items = {key: without(item, (*path, key)) for key, item in value.items()}
            return {key: item for key, item in items.items() if item is not TAKEN}
        if isinstance(value, Tensor) and path[0] in LARGE and value.numel() and value.ndim:
            value = Chunk(value, (0,) * value.ndim, tuple(value.shape), ours=rank == 0)
        if not isinstance(value, Chunk):
            return value
        name = ".".join(map(str, path))
        chunks[name] = value
        places[name] = {"path": list(path), "shape": list(value.shape), "dtype": str(value.values.dtype)}
        return TAKEN

    rest = without(dict(content), ())
    rest[PLACES] = {"places": places, "saved": time.time()}
    return rest, chunks


def _write_part(path: Path, chunks: Mapping[str, Chunk]) -> str:
    """Write this process's tensors to disk for good; the SHA-256 of the file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    offsets = {name: {"saved_offsets": list(chunk.offsets)} for name, chunk in chunks.items()}
    try:
        tensors = {name: chunk.values.contiguous() for name, chunk in chunks.items()}
        save_file(tensors, path, {"format": "pt", OFFSETS: json.dumps(offsets)})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    sync(path)
    return sha256(path)


def _commit(temporary: Path, target: Path, rest: dict[str, Any], sums: dict[str, str]) -> None:
    """Complete the folder and give it its name."""
    for path in temporary.iterdir():
        if path.name not in sums:  # of an earlier try
            path.unlink()
    for name in sums:
        if not (temporary / name).is_file():
            raise OSError(
                f"{name} is not there: the processes of a sharded run write to one file system that they share"
            )
    with (temporary / REST).open("wb") as file:
        write_archive(rest, file)
    sync(temporary / REST)
    sums[REST] = sha256(temporary / REST)
    (temporary / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8")
    sync(temporary / SUMS)
    sync_folder(temporary)
    put_in_place(temporary, target, target.with_name(target.name + EARLIER))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def _exchange(said: dict[str, str], group: ProcessGroup | None) -> list[dict[str, str]]:
    """What every process says, in the order of ranks. In JSON: nothing is unpickled."""
    if group is None:
        return [said]
    import torch.distributed as dist

    short = {name: text[: MESSAGE_BYTES // 8] for name, text in said.items()}
    line = json.dumps(short).encode().ljust(MESSAGE_BYTES)
    own = torch.frombuffer(bytearray(line), dtype=torch.uint8)
    everyone = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(everyone, own, group=group)
    return [json.loads(bytes(each.tolist())) for each in everyone]


# -- reading


def is_sharded(path: Path) -> bool:
    """Is this the folder of a sharded checkpoint?"""
    return path.name.endswith((SUFFIX, SUFFIX + EARLIER)) and path.is_dir()


def sharded_checkpoints(run: Path) -> list[Path]:
    """Those of a run folder, the one that was saved last first."""
    named = (path for path in run.glob("step_*") if re.fullmatch(NAME, path.name) and path.is_dir())
    paths = sorted(named, reverse=True)
    by_step = {path.name.removesuffix(EARLIER): path for path in paths}  # an earlier one only where it stands alone
    return sorted(by_step.values(), key=_saved, reverse=True)


def remove_sharded(folder: Path) -> None:
    """Delete one. A kill in between leaves no half of it under its name."""
    leaving = folder.with_name(f".{folder.name}.leaving.tmp")
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def clear_sharded_leftovers(run: Path) -> None:
    """Tidy up after a killed process: what was never committed goes, what was being replaced comes back."""
    for left in run.glob(f".step_*{SUFFIX}*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for earlier in run.glob(f"step_*{SUFFIX}{EARLIER}"):
        if earlier.with_name(earlier.name.removesuffix(EARLIER)).exists():
            shutil.rmtree(earlier, ignore_errors=True)
        else:
            earlier.rename(earlier.with_name(earlier.name.removesuffix(EARLIER)))


def _saved(folder: Path) -> float:
    """When it was committed; 0 where that cannot be read."""
    try:
        return float(_open_rest(folder)[PLACES]["saved"])
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return 0.0


def best_sharded(run: Path) -> Path | None:
    """The best of a run folder's sharded checkpoints, where that is not best_model.pt."""
    pointer = run / BEST
    name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    return next((path for path in sharded_checkpoints(run) if path.name == name), None)


def remember_best(folder: Path) -> None:
    """Take note that this is its run's best."""
    write_text(folder.parent / BEST, folder.name + "\n")


def forget_best(run: Path) -> None:
    """From now on best_model.pt is the run's best."""
    (run / BEST).unlink(missing_ok=True)


def step_name(step: int) -> str:
    """500 -> step_000500.sharded"""
    return f"step_{step:06d}{SUFFIX}"


def step_of(folder: Path) -> int:
    """step_000500.sharded -> 500"""
    return int(folder.name.split(".")[0].split("_")[1])


def verify_sharded(folder: Path) -> None:
    """Every file is there, and has the SHA-256 that was recorded.

    Raises:
        UserError: names the first that is not.
    """
    sums = folder / SUMS
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.is_file() else []
    recorded = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if REST not in recorded:
        raise UserError(f"{folder} is no whole sharded checkpoint: {SUMS} is missing or does not name {REST}")
    there = {path.name for path in folder.iterdir()} - {SUMS}
    for name in sorted(there ^ set(recorded)):
        what = "is not recorded in" if name in there else "is missing, and recorded in"
        raise UserError(f"{folder}: {name} {what} {SUMS}")
    for name, digest in recorded.items():
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise UserError(f"{folder / name} is no plain file, so it is refused")
        if sha256(folder / name) != digest:
            raise UserError(
                f"{folder / name} does not match its recorded SHA-256 ({SUMS}): it was cut short or changed"
            )


def read_sharded(folder: Path, *, verify: bool = True) -> dict[str, Any]:
    """The full checkpoint that is in it, with whole tensors on the CPU.

    Raises:
        UserError: it is damaged, unsafe or not whole.
    """
    if verify:
        verify_sharded(folder)
    content, places = _placed(folder, "cpu")
    _load(folder, places)
    return content


def peek_sharded(folder: Path) -> dict[str, Any]:
    """The same with the large tensors as shape and type alone (on the meta device), unverified: quick.

    Raises:
        UserError: it cannot be read.
    """
    return _placed(folder, "meta")[0]


def _open_rest(folder: Path) -> dict[str, Any]:
    rest = read_tensors(folder / REST)
    if not isinstance(rest, dict) or not isinstance(rest.get(PLACES), dict):
        raise UserError(f"{folder / REST} is not the rest of a sharded checkpoint")
    return rest


def _placed(folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The full checkpoint with new tensors where the parts have some, and these by name."""
    content = _open_rest(folder)
    about = content.pop(PLACES)
    stored = _stored(folder)
    tensors: dict[str, Tensor] = {}
    try:
        for name, place in about["places"].items():
            shape, dtype = torch.Size(place["shape"]), getattr(torch, place["dtype"].removeprefix("torch."))
            if name not in stored or stored[name] != (shape, dtype):
                found = f"is {tuple(stored[name][0])} {stored[name][1]}" if name in stored else "is missing"
                raise UserError(f"{folder}: {name} {found} in its parts, expected {tuple(shape)} {dtype}")
            tensors[name] = torch.empty(shape, dtype=dtype, device=device)
            *outer, last = place["path"]
            inner: Any = content
            for key in outer:
                inner = inner[key]
            inner[last] = tensors[name]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder / REST} does not say where its tensors belong ({error!r})") from None
    return content, tensors


def _stored(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor in the parts, none of which has more elements than the files hold."""
    found = {}
    for name, about in _metadata(folder).items():
        held = sum(chunk.sizes.numel() for chunk in about.chunks)
        if held != about.size.numel():
            raise UserError(f"{folder}: of {name}, which is {tuple(about.size)}, its parts hold {held:,} elements")
        found[name] = about.size, about.properties.dtype
    return found


def _metadata(folder: Path) -> dict[str, TensorStorageMetadata]:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        stored: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        return dict(stored)  # safetensors hold nothing but tensors
    except Exception as error:  # it believes what it reads
        raise UserError(f"the parts of {folder} cannot be read ({_reason(error)})") from None


def _load(folder: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except Exception as error:  # it believes what it reads
        raise UserError(f"the parts of {folder} cannot be read ({_reason(error)})") from None
