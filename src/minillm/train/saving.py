"""What a run leaves behind: its folder, its checkpoints, its logs, and the flat weights beside it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from minillm import processes
from minillm.atomic import write_text
from minillm.checkpoint.adapter import fingerprint, save_adapter
from minillm.checkpoint.files import extract_weights, read_tensors, remove, save_tensors
from minillm.checkpoint.format import build_checkpoint
from minillm.checkpoint.sharded import (
    best_sharded,
    forget_best,
    read_sharded,
    remove_sharded,
    save_sharded,
    sharded_checkpoints,
    step_name,
)
from minillm.log import info, warn
from minillm.models.lora import LoraConfig, adapter_size, pairs_of, without_adapters
from minillm.models.transformer import count_parameters
from minillm.train.card import model_card
from minillm.train.job import Job
from minillm.train.start import newest_first


def record_validation(job: Job, result: dict[str, float], *, first: bool = False) -> bool:
    """Log an evaluation; True if it is the best so far. Where there is no validation data the training's own value
    decides. The evaluation before the first step is the starting point, never the best."""
    state = job.state
    row: dict[str, Any] = {"step": state.step, **result}
    if result:
        job.trackers.log(row)
        state.validation_log.append(row)
    if first:
        if result:
            info(f"[eval] before training: {_shown(result)}")
        return False
    value = result.get(f"val/{state.best_metric}")
    if value is None:
        value = state.training_log[-1].get(f"train/{state.best_metric}") if state.training_log else None
    improved = value is not None and state.improved(value, is_validation=bool(result))
    if result:
        info(f"[eval] step {state.step}: {_shown(result)}{' (best so far)' if improved else ''}")
    return improved


def _shown(result: dict[str, float]) -> str:
    names = {
        "val/loss": "loss", "val/perplexity": "perplexity", "val/accuracy": "accuracy",
        "val/bits_per_byte": "bits per byte", "val/rewards_accuracies": "reward accuracy", "val/reward": "reward",
    }  # fmt: skip
    return ", ".join(f"{label} {result[name]:.4f}" for name, label in names.items() if name in result)


def checkpoint_content(job: Job) -> dict[str, Any]:
    """Everything that a checkpoint holds, as it is now: `job.writer.snapshot` makes a copy of it."""
    state = job.state
    return build_checkpoint(
        architecture=job.family.name,
        stage=job.stage,
        model_state=job.model.state_dict(),
        model_config=job.model.config,
        optimizer_state=job.optimizers.state_dict(),
        scheduler_state={
            "schedule": "cosine", "step": state.step, "total_steps": job.total_steps, "warmup_steps": job.warmup_steps,
            "peak_lr": job.peak_lr, "final_lr_ratio": job.final_lr_ratio,
        },
        scaler_state=job.scaler.state_dict(),
        train_config=job.config,
        progress=state.to_dict(),
        model_name=job.run_name,
        parameters=count_parameters(job.model) - adapter_size(job.model),
        parent=job.parent,
        tokenizer=job.tokenizer.to_dict(),
        data_state={
            "position": state.step * job.rows_per_step, "rows": job.train_data.epoch_rows, "seed": job.seed,
            "description": job.train_data.describe(), "rows_per_step": job.rows_per_step,
            "stream": job.train_data.state(),
        },
        method_state={
            "name": job.method.name, "metrics": job.trackers.rows, "frozen_sha256": job.frozen_sha256,
            "state": job.method.state(),
            "trained": {name: module.state_dict() for name, module in job.method.trained().items()},
        },
        family=job.family_config.to_dict(),
        ema_state=job.average.state_dict(job.model) if job.average is not None else None,
        adapter=job.adapter.to_dict() if job.adapter is not None else None,
    )  # fmt: skip


def make_room(job: Job) -> None:
    """Take the memory that snapshots need while training goes on, once the optimizers have their state."""
    if job.writer.group is not None or processes.is_main():
        job.writer.make_room(checkpoint_content(job))


def save(job: Job, *, numbered: bool, best: bool) -> None:
    """Write a checkpoint in the background: last.pt and, under the same content, step_N.pt and best_model.pt; or,
    where the processes of the run hold parts of the weights, one folder of all of them. Old ones are pruned. All
    processes of a run call this together.
    """
    started = time.perf_counter()
    content = checkpoint_content(job)
    last = job.folder / (step_name(job.state.step) if job.writer.group is not None else "last.pt")
    if job.writer.group is not None:
        _save_shards(job, last, job.writer.snapshot(content), best=best)
    elif processes.is_main():
        _save_whole(job, last, job.writer.snapshot(content), numbered=numbered, best=best)
    stall = time.perf_counter() - started
    job.stall += stall
    info(f"[save] step {job.state.step}: {last.name}; training stood still for {stall:.2f} s")


def _save_whole(job: Job, last: Path, content: dict[str, Any], *, numbered: bool, best: bool) -> None:
    also = []
    if best:
        also.append(job.folder / "best_model.pt")
    if numbered and job.keep_last:
        also.append(job.folder / f"step_{job.state.step:06d}.pt")

    def write() -> None:
        write_logs(job)
        save_tensors(last, content, also=tuple(also))
        if best:
            forget_best(job.folder)
        steps = sorted(job.folder.glob("step_*.pt"), key=lambda path: int(path.stem.split("_")[1]))
        for old in steps[: -job.keep_last] if job.keep_last else steps:
            remove(old)
        _prune_sharded(job.folder, job.keep_last - len(steps))  # of an earlier life of the run

    job.writer.submit(write)


def _save_shards(job: Job, folder: Path, content: dict[str, Any], *, best: bool) -> None:
    """Every save is a folder of its own; the newest `keep_last` of them stay (at least one), and the best."""

    def write() -> None:
        save_sharded(folder, content, job.writer.group, best=best)
        if processes.is_main():
            write_logs(job)
            _prune_sharded(job.folder, max(1, job.keep_last))

    job.writer.submit(write)


def _prune_sharded(run: Path, keep: int) -> None:
    best = best_sharded(run)
    for old in sharded_checkpoints(run)[max(0, keep) :]:
        if old != best:
            remove_sharded(old)


def last_saved(job: Job) -> Path | None:
    """The checkpoint that was saved last, once it is written."""
    job.writer.wait()
    return next(iter(newest_first(job.folder)), None)


def write_logs(job: Job) -> None:
    """The logs as files. A full disk does not end a run: the next time writes all of them again."""
    text = json.dumps(job.state.training_log, indent=1, allow_nan=True)
    try:
        write_text(job.folder / "training_log.json", text + "\n")
        job.trackers.flush()
    except OSError as error:
        warn(f"the logs could not be written ({error}); training goes on, and the next save tries again")


def finish(job: Job) -> None:
    """Wait for the last checkpoint, then write the flat weights (those of the best checkpoint) and the card. All
    processes of a run call this together.

    Raises:
        UserError: the last checkpoint could not be written.
    """
    job.writer.finish()
    if not processes.is_main():
        return
    _consolidate(job)
    source = job.folder / "best_model.pt"
    if not source.exists():
        source = job.folder / "last.pt"
    if source.exists():
        content = read_tensors(source)
        save_tensors(job.flat_path, extract_weights(content, source))
        for name, weights in content["method_state"].get("trained", {}).items():
            beside = job.flat_path.with_name(job.flat_path.name.replace(job.stage, name, 1))
            save_tensors(beside, weights)
            info(f"[run] weights of {name}: {beside}")
        if job.adapter is not None:
            _save_adapter(job, job.adapter, content)
        info(f"[run] weights of {source.name} (step {content['global_step']}): {job.flat_path}")
    write_logs(job)
    write_text(job.folder / "README.md", model_card(job))
    job.trackers.close()


def _consolidate(job: Job) -> None:
    """The best and the last sharded checkpoint as the files that a run on one process leaves; these folders go."""
    files: dict[Path, list[Path]] = {}
    if job.writer.group is not None:
        files = {folder: [job.folder / "last.pt"] for folder in sharded_checkpoints(job.folder)[:1]}
    best = best_sharded(job.folder)
    if best is not None:
        files.setdefault(best, []).append(job.folder / "best_model.pt")
    for folder, (path, *also) in files.items():
        save_tensors(path, read_sharded(folder), also=tuple(also))
        info(f"[save] {folder.name} is now {' and '.join(each.name for each in (path, *also))}")
    forget_best(job.folder)
    for folder in files:
        remove_sharded(folder)


def _save_adapter(job: Job, config: LoraConfig, content: dict[str, Any]) -> None:
    """The adapter of a full checkpoint in peft's form, beside it."""
    facts = {"stage": job.stage, "base_sha256": fingerprint(without_adapters(content["model_state_dict"]))}
    pairs = pairs_of(content.get("ema_state_dict", content["model_state_dict"]))
    base = job.parent["path"] if job.parent else ""
    save_adapter(job.folder, pairs, config, base=base, facts=facts, causal=job.family.causal)


def write_run_files(job: Job, hf_config: dict[str, Any], generation_config: dict[str, Any]) -> None:
    """The files of a run folder that do not change while it runs."""
    job.folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", hf_config),
        ("generation_config.json", generation_config),
        ("training_config.json", {"run_name": job.run_name, "stage": job.stage, **job.config}),
    ):
        write_text(job.folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    job.tokenizer.save(job.folder)
