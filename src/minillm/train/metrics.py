"""Metrics travel as (sum, count) until they are shown; then they go, under one name, to every tracker."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch

from minillm import processes
from minillm.atomic import write_text
from minillm.log import info, warn
from minillm.models.device import has_float64

LARGEST_EXPONENT = 700.0
SAMPLES = "samples.jsonl"  # in the run folder


def perplexity(loss: float) -> float:
    """exp(nats a token); infinite where that is more than a float can hold."""
    return math.exp(loss) if loss < LARGEST_EXPONENT else math.inf


class Sums:
    """Adds up (sum, count) pairs by name. Sums stay tensors on their device until they are read."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, metrics: dict[str, tuple[torch.Tensor, float]]) -> None:
        for name, (value, count) in metrics.items():
            value = value.detach().double() if has_float64(value.device) else value.detach()
            self.values[name] = self.values[name] + value if name in self.values else value
            self.counts[name] = self.counts.get(name, 0.0) + count

    def merge(self, other: Sums) -> None:
        self.add({name: (value, other.counts[name]) for name, value in other.values.items()})

    def means(self) -> dict[str, float]:
        """Over what all processes have added up; they ask together."""
        if processes.size() > 1:
            return _joint_means(self)
        names = [name for name in self.values if self.counts[name]]
        if not names:
            return {}
        device = self.values[names[-1]].device  # a method may count some of them on the CPU
        dtype = torch.float64 if has_float64(device) else torch.float32
        values = torch.stack([self.values[name].to(device, dtype) for name in names]).tolist()
        return {name: value / self.counts[name] for name, value in zip(names, values)}


def _joint_means(own: Sums) -> dict[str, float]:
    numbers = {name: (float(value), own.counts[name]) for name, value in own.values.items()}
    values: dict[str, float] = {}
    counts: dict[str, float] = {}
    for one in processes.gathered(numbers):
        for name, (value, count) in one.items():
            values[name] = values.get(name, 0.0) + value
            counts[name] = counts.get(name, 0.0) + count
    return {name: value / counts[name] for name, value in values.items() if counts[name]}


def named(prefix: str, means: dict[str, float]) -> dict[str, float]:
    """Full metric names: train/loss, val/accuracy. A training reward keeps its own name (rewards/margins), a
    validation one is val/rewards_margins."""
    result = {}
    for name, value in means.items():
        if "/" not in name:
            result[f"{prefix}/{name}"] = value
        else:
            result[name if prefix == "train" else f"{prefix}/{name.replace('/', '_')}"] = value
    return result


def csv_text(rows: list[dict[str, Any]]) -> str:
    """The rows as CSV: step first, every name that occurs a column, blank where a row has no value."""
    columns = ["step", *sorted({name for row in rows for name in row if name != "step"})]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _step_of(line: str) -> int:
    """Of a line of samples; a line that was cut short belongs to a later step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62


class Trackers:
    """metrics.csv in the run folder, TensorBoard and W&B: the same names everywhere."""

    def __init__(self, folder: Path, *, tensorboard_dir: str, wandb: Any) -> None:
        self.folder, self.wandb, self.writes = folder, wandb, processes.is_main()
        self.rows: list[dict[str, Any]] = []
        self.tensorboard: Any = None
        if tensorboard_dir and self.writes:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                warn("tensorboardX is not installed, no TensorBoard files: pip install 'minillm-trainer[track]'")
            else:
                self.tensorboard = SummaryWriter(str(Path(tensorboard_dir) / folder.name))

    def restore(self, rows: list[dict[str, Any]], step: int) -> None:
        """Start from the rows a checkpoint of this step holds; later ones on disk belong to steps that are done
        again."""
        self.rows = list(rows)
        if not self.writes:
            return
        self.flush()
        path = self.folder / SAMPLES
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if _step_of(line) <= step))

    def log(self, row: dict[str, Any]) -> None:
        """One row: `step` and full metric names."""
        self.rows.append(row)
        numbers = {name: value for name, value in row.items() if isinstance(value, float | int) and name != "step"}
        if self.tensorboard is not None:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, row["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=row["step"])

    def log_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A table of texts: lines of samples.jsonl, and where a tracker shows tables, one there."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        columns: list[Any] = list(rows[0])
        if self.tensorboard is not None:
            cells = [" | ".join(str(row[name]).replace("\n", " ") for name in columns) for row in rows]
            table = "\n".join(f"| {line} |" for line in (" | ".join(columns), "|".join("-" * len(columns)), *cells))
            self.tensorboard.add_text("samples", table, step)
        if self.wandb is not None:
            import wandb

            self.wandb.log(
                {"samples": wandb.Table(columns, [[row[name] for name in columns] for row in rows])}, step=step
            )

    def flush(self) -> None:
        if self.writes:
            write_text(self.folder / "metrics.csv", csv_text(self.rows))

    def close(self) -> None:
        self.flush()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def next_version(folder: Path) -> int:
    """1 for the first run in this place, else one more than the last run's version."""
    config = folder / "training_config.json"
    if not config.is_file():
        return 1
    text = config.read_text(encoding="utf-8")
    found = re.search(r'"version": (\d+)', text) or re.search(r'"run_name": ".*-v(\d+)"', text)
    return int(found.group(1)) + 1 if found else 1


def start_wandb(*, project: str, name: str, folder: Path, config: dict[str, Any]) -> Any:
    """A W&B run, or None. Never asks anything: without a key or without network it logs offline."""
    try:
        import wandb
    except ImportError:
        info("[track] wandb is not installed: no W&B log (pip install 'minillm-trainer[track]', or --no_wandb)")
        return None
    has_key = bool(os.environ.get("WANDB_API_KEY")) or _netrc_has_wandb()
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    settings = wandb.Settings(silent=True, init_timeout=20, console="off")
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            run = wandb.init(
                project=project, name=name, dir=str(folder), config=config, mode=attempt, settings=settings
            )
            if attempt == "offline":
                info(f"[track] W&B logs offline under {folder}/wandb (wandb sync uploads it; --no_wandb turns it off)")
            return run
        except Exception as error:  # no network, a bad key, a full disk: training does not depend on a tracker
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warn(f"W&B ({attempt}) did not start: {reason}")
    return None


def _netrc_has_wandb() -> bool:
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return "api.wandb.ai" in path.read_text(encoding="utf-8", errors="ignore")
    except OSError:
        return False
