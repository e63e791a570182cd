"""What a teacher says of every row, asked once and kept on disk: the K most probable tokens at each trained position.

It stands beside the run's folder, so that another run over the same rows finds it. In it, for "train" and "val", R rows
and N positions: ids.npy int64 [R], offsets.npy int64 [R + 1], tokens.bin uint16 or uint32 [N, K], log_probs.bin float32
[N, K], rest.bin float32 [N] (log of the probability of all other tokens). meta.json holds the fingerprint of teacher,
data and view and the SHA-256 of each file. It is written beside and renamed, and read mapped into memory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minillm.atomic import put_in_place
from minillm.checkpoint.files import sha256
from minillm.families.base import Noise, TokenBatch
from minillm.log import UserError, format_duration, info, progress, warn
from minillm.methods.distill import Distillation, Part
from minillm.models.divergence import States, TopK, top_k
from minillm.train.job import Job
from minillm.train.precision import autocast

SIDES = ("train", "val")
META = "meta.json"


def cache_teacher(job: Job) -> None:
    """With --cache_teacher K, let the method look up what its teacher says. The teacher is dropped.

    Raises:
        UserError: there is no room for the cache.
    """
    method, count = job.method, int(job.config.get("cache_teacher") or 0)
    if not isinstance(method, Distillation) or not count:
        return
    folder = job.folder.with_name(job.folder.name + ".teacher")
    fingerprint = _fingerprint(job, method, count)
    problem = _problem(folder, fingerprint)
    if problem:
        if folder.exists():
            warn(f"{folder} is made anew: {problem}")
        try:
            _build(job, method, count, folder, fingerprint)
        except OSError as error:
            raise UserError(
                f"{folder} could not be written: {error.strerror or error}. Make room, or keep fewer tokens"
            ) from error
    else:
        info(f"[distill] {folder} holds what the teacher says of these rows")
    method.teacher = CachedTeacher(folder, method.teacher.sha256)


class Side(NamedTuple):
    """What is known of the R rows of one side, mapped into memory."""

    ids: np.ndarray  # int64 [R], ascending
    starts: np.ndarray  # int64 [R], of each row's positions
    ends: np.ndarray
    tokens: np.ndarray  # [N, K]
    log_probs: np.ndarray  # [N, K]
    rest: np.ndarray | None  # [N]


class CachedTeacher:
    """What a cache knows, asked by the rows' ids."""

    def __init__(self, folder: Path, sha256: str) -> None:
        self.sha256, self.folder = sha256, folder
        self.sides = {side: _opened(folder, side) for side in SIDES if (folder / f"{side}_ids.npy").exists()}

    def about(self, part: Part) -> TopK:
        """Raises UserError for rows that the teacher was not asked about."""
        side = self.sides["val" if part.evaluating else "train"]
        ids = part.sample_ids.cpu().numpy()
        places = np.searchsorted(side.ids, ids).clip(max=len(side.ids) - 1)
        starts, ends = side.starts[places], side.ends[places]
        trained = (part.view.weights != 0).sum(1).cpu().numpy()
        if not np.array_equal(side.ids[places], ids) or not np.array_equal(ends - starts, trained):
            raise UserError(f"{self.folder} does not hold the rows of this step: delete it, and it is made again")
        index = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends)])
        device = part.view.weights.device

        def of(array: np.ndarray, dtype: type) -> torch.Tensor:
            return torch.from_numpy(array[index].astype(dtype, copy=False)).to(device)

        rest = None if side.rest is None else of(side.rest, np.float32)
        return TopK(of(side.tokens, np.int64), of(side.log_probs, np.float32), rest)


def _opened(folder: Path, side: str) -> Side:
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    ids, offsets = np.load(folder / f"{side}_ids.npy"), np.load(folder / f"{side}_offsets.npy")
    count, positions, order = meta["count"], int(offsets[-1]), np.argsort(ids)

    def mapped(name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.memmap(folder / f"{side}_{name}.bin", dtype=dtype, mode="r", shape=shape)

    return Side(
        ids[order], offsets[:-1][order], offsets[1:][order], mapped("tokens", meta["dtype"], (positions, count)),
        mapped("log_probs", "float32", (positions, count)),
        mapped("rest", "float32", (positions,)) if meta["rest"] else None,
    )  # fmt: skip


def _batches(job: Job, side: str) -> Iterator[tuple[Any, int]]:
    """(batch, first slot) of every row that the run will see, once, in its order and its micro-batches."""
    feed = job.train_data if side == "train" else job.validation_data
    if feed is None:
        return
    slots = min(feed.epoch_rows, job.total_steps * job.rows_per_step if side == "train" else job.eval_samples)
    for start in range(0, slots, job.micro_rows):
        yield feed.take(start, min(job.micro_rows, slots - start)), start


def _fingerprint(job: Job, method: Distillation, count: int) -> str:
    """Of the teacher, of all that the view is made from, and of what is kept."""
    values = [method.teacher.sha256, count, method.objective.temperature, job.family_config.to_dict(), str(job.dtype)]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for side in SIDES:
        for batch, _ in _batches(job, side):
            for array in (batch.sample_ids, batch.tokens, batch.loss_mask, batch.positions, batch.segments):
                digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        digest.update(side.encode())
    return digest.hexdigest()


def _problem(folder: Path, fingerprint: str) -> str:
    """Why the cache cannot be used, "" where it can."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["fingerprint"] != fingerprint:
            return "it is of another teacher, temperature or number of tokens, or of other rows"
        wrong = [name for name, digest in meta["files"].items() if sha256(folder / name) != digest]
    except (OSError, ValueError, KeyError):
        return "it cannot be read"
    return f"{wrong[0]} is damaged" if wrong else ""


def _build(job: Job, method: Distillation, count: int, folder: Path, fingerprint: str) -> None:
    beside, started = folder.with_name(f".{folder.name}.building"), time.perf_counter()
    shutil.rmtree(beside, ignore_errors=True)  # of a killed run
    beside.mkdir(parents=True)
    vocabulary = job.model.config.vocab_size
    dtype = "uint16" if vocabulary <= 65_536 else "uint32"
    try:
        positions = sum(_write(job, method, count, beside, side, dtype) for side in SIDES)
        files = {path.name: sha256(path) for path in sorted(beside.iterdir())}
        meta = {
            "fingerprint": fingerprint, "teacher": method.teacher.sha256, "count": min(count, vocabulary),
            "rest": count < vocabulary, "temperature": method.objective.temperature, "dtype": dtype, "files": files,
        }  # fmt: skip
        (beside / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        put_in_place(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    seconds = format_duration(time.perf_counter() - started)
    info(f"[distill] {folder}: the teacher was asked about {positions:,} tokens in {seconds}, {size:,.1f} MB")


def _write(job: Job, method: Distillation, count: int, folder: Path, side: str, dtype: str) -> int:
    """The files of one side; the number of positions."""
    ids: list[int] = []
    lengths: list[int] = []
    known: set[int] = set()
    if next(_batches(job, side), None) is None:
        return 0
    streams = {name: open(folder / f"{side}_{name}.bin", "wb") for name in ("tokens", "log_probs", "rest")}  # noqa: SIM115
    try:
        with progress(None, "rows the teacher was asked about") as bar:
            for batch, slot in _batches(job, side):
                found, trained = _asked(job, method, count, batch, slot, side)
                new = np.array([each not in known for each in batch.sample_ids.tolist()])
                keep = np.repeat(new, trained)
                for name, values in zip(("tokens", "log_probs", "rest"), found):
                    if values is not None:
                        array = values.cpu().numpy()[keep]
                        streams[name].write(array.astype(dtype if name == "tokens" else "float32").tobytes())
                ids += batch.sample_ids[new].tolist()
                lengths += trained[new].tolist()
                known.update(batch.sample_ids.tolist())
                bar.advance(len(new))
    finally:
        for stream in streams.values():
            stream.close()
    np.save(folder / f"{side}_ids.npy", np.array(ids, dtype=np.int64))
    np.save(folder / f"{side}_offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    return sum(lengths)


@torch.no_grad()
def _asked(job: Job, method: Distillation, count: int, batch: Any, slot: int, side: str) -> tuple[TopK, np.ndarray]:
    """What is kept of a batch, and the number of positions in each of its rows [B]."""
    rows = TokenBatch.from_numpy(batch, job.device)
    with autocast(job.device, job.dtype):
        view = job.family.view(job.model, rows, Noise.of(job.seed, rows, 0, slot))
        states = method.teacher.about(Part(view, rows.sample_ids, side == "val", False))
        assert isinstance(states, States)
        found = top_k(states, count, method.objective.temperature)
    return found, (view.weights != 0).sum(1).cpu().numpy()
