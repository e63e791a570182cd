"""Asking the reference once for every row of a run, instead of at every step.

It is asked in the run's own order, with the run's own micro-batches: a run of one epoch is the same bit for bit with
and without. In later epochs rows meet other neighbours, and without it the same log-probability would be computed in
another shape, which rounds differently.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from minillm import processes
from minillm.checkpoint.files import read_tensors, save_tensors
from minillm.log import UserError, format_duration, info
from minillm.methods.reference import ReferenceScores, WithReference
from minillm.train.job import Job
from minillm.train.precision import autocast

FILE = "reference_logps.pth"


def precompute_reference(job: Job) -> None:
    """Let the method look up what its reference says, where it has one and that saves time: with two epochs or more,
    or where `--precompute_reference on` says so. The numbers are written into the run folder with their hash; the
    reference is dropped."""
    method = job.method
    if not isinstance(method, WithReference) or method.reference is None or not _wanted(job):
        return
    key = _key(job)
    content = _written(job, key)
    if content is None:
        started = time.perf_counter()
        content = {"key": key, "training": _training(job, method), "validation": _validation(job, method)}
        save_tensors(job.folder / FILE, content)
        rows = len(content["training"]["ids"])
        seconds = format_duration(time.perf_counter() - started)
        info(f"[run] the reference was asked about {rows:,} rows in {seconds}: {job.folder / FILE}")
    validation = content["validation"]
    method.precomputed = (_scores(content["training"]), _scores(validation) if validation else None)
    method.reference = None


def _wanted(job: Job) -> bool:
    mode = job.config.get("precompute_reference", "auto")
    if mode == "auto":
        return job.family.ordered and job.total_steps * job.rows_per_step >= 2 * job.train_data.epoch_rows
    return bool(mode == "on")


def _key(job: Job) -> dict[str, Any]:
    """What the numbers follow from."""
    return {
        "reference": job.frozen_sha256.get("reference", ""),
        "start": (job.parent or {}).get("sha256", ""),
        "method": job.method.name,
        "data": job.train_data.describe(),
        "validation": job.validation_data.describe() if job.validation_data else "",
        "slots": job.total_steps * job.rows_per_step,
        "seed": job.seed,
        "micro_rows": job.micro_rows,
        "eval_samples": job.eval_samples,
        "dtype": str(job.dtype),
    }


def _written(job: Job, key: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier session of the run wrote, None where it is damaged or of another run."""
    if not (job.folder / FILE).is_file():
        return None
    try:
        content: dict[str, Any] = read_tensors(job.folder / FILE)
    except UserError:
        return None
    return content if content.get("key") == key else None


def _training(job: Job, method: WithReference) -> dict[str, Any]:
    """In the order of the run, until every row of it was met. Rows that come again are not asked about again."""
    found = _Found()
    for step in range(job.total_steps):
        met = step * job.rows_per_step >= job.train_data.epoch_rows
        if met and len(found.values) == job.train_data.epoch_rows:
            break
        for rank in range(processes.size()):
            for start, rows in job.micro_batches(step, rank):
                batch = job.train_data.take(start, rows)
                if found.lacks(batch.sample_ids):
                    found.add(batch.sample_ids, _asked(job, method, batch, step, start))
    return found.content()


def _validation(job: Job, method: WithReference) -> dict[str, Any] | None:
    """As the loop evaluates."""
    if job.validation_data is None:
        return None
    size, found = min(job.validation_data.epoch_rows, job.eval_samples), _Found()
    for start in range(0, size, job.micro_rows):
        batch = job.validation_data.take(start, min(job.micro_rows, size - start))
        if found.lacks(batch.sample_ids):
            found.add(batch.sample_ids, _asked(job, method, batch, -1, start))
    return found.content()


def _asked(job: Job, method: WithReference, batch: Any, step: int, start: int) -> torch.Tensor:
    with torch.no_grad(), autocast(job.device, job.dtype):
        return method.ask_reference(batch, job.device, step, start).float().cpu()


class _Found:
    """Numbers of rows by sample id; the first ones stay."""

    def __init__(self) -> None:
        self.values: dict[int, list[float]] = {}

    def lacks(self, sample_ids: np.ndarray) -> bool:
        return any(each not in self.values for each in sample_ids.tolist())

    def add(self, sample_ids: np.ndarray, asked: torch.Tensor) -> None:
        for each, values in zip(sample_ids.tolist(), asked.tolist(), strict=True):
            self.values.setdefault(each, values)

    def content(self) -> dict[str, Any]:
        ids = sorted(self.values)
        return {"ids": torch.tensor(ids), "values": torch.tensor([self.values[each] for each in ids])}


def _scores(content: dict[str, Any]) -> ReferenceScores:
    return ReferenceScores(content["ids"].numpy(), content["values"])
