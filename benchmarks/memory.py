"""The memory that training takes beside the memory that `minillm estimate` says.

    python benchmarks/memory.py --presets small,medium --check

Each cell is a process of its own: the job of `minillm pretrain` on made-up text, two optimizer steps of two
micro-batches, on the CPU. What is compared is the highest resident memory of that process, libraries included. The bar
is 10 % in every cell. One cell runs at a time; xl takes about 8 GB.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    Worker,
    machine,
    machine_line,
    main,
    peak_memory_mb,
    preset_config,
    table,
    write_results,
)
from sessions import Session

from minillm.config import parse
from minillm.log import UserError, info
from minillm.train.memory import MIB, Load, memory_of
from minillm.train.settings import CHECKPOINTING, OPTIMIZERS

BAR = 0.10
MICRO_BATCHES = 2


@dataclass(frozen=True)
class MemoryBenchmark:
    """Estimated and measured memory"""

    presets: str = field(default="small,medium,large,xl", metadata={"help": "presets, separated by commas"})
    kinds: str = field(default=",".join(CHECKPOINTING), metadata={"help": "gradient checkpointing of these kinds"})
    seq: int = field(default=512, metadata={"help": "tokens a row", "min": 8})
    rows: int = field(default=2, metadata={"help": "rows at once; a step has twice as many", "min": 1})
    steps: int = field(default=2, metadata={"help": "optimizer steps (the first has no optimizer state yet)", "min": 1})
    optimizer: str = field(default="adamw", metadata={"help": "optimizer", "choices": OPTIMIZERS})
    dtype: str = field(default="float32", metadata={"help": "arithmetic", "choices": ("float32", "bfloat16")})
    check: bool = field(default=False, metadata={"help": "exit 1 where an estimate is more than 10 % off"})
    results: str = field(default=RESULTS, metadata={"help": "folder for JSON and Markdown"})


class Cell(Session):
    """One run in a worker process."""

    job: Any

    def start(self, preset: str, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Build the job of `minillm pretrain` on made-up text."""
        from minillm.models.config import ModelSettings
        from minillm.models.transformer import count_parameters
        from minillm.train.job import build_job
        from minillm.train.settings import DataSettings, OptimSettings, RunSettings, Settings, TrackSettings

        asked = MemoryBenchmark(**settings)
        self.folder = tempfile.TemporaryDirectory()
        data = Path(self.folder.name) / "text.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts(asked)), encoding="utf-8")
        run = RunSettings(
            out_dir=self.folder.name, device="cpu", dtype=asked.dtype, compile="off", max_steps=100,
            batch_size=MICRO_BATCHES * asked.rows, micro_batch_size=asked.rows, gradient_checkpointing=kind,
        )  # fmt: skip
        self.job = build_job(
            "pretrain",
            Settings(
                ModelSettings(model_config=preset),
                DataSettings(data_path=(str(data),), max_seq_len=asked.seq),
                run,
                OptimSettings(optimizer=asked.optimizer),
                TrackSettings(no_wandb=True),
            ),
        )
        return {"parameters": count_parameters(self.job.model)}

    def close(self) -> None:
        self.folder.cleanup()

    def steps(self, count: int) -> dict[str, Any]:
        """Peak memory after each step, in MiB, and its seconds."""
        from minillm.train.loop import take_step

        peaks, seconds = [], []
        for _ in range(count):
            started = time.perf_counter()
            take_step(self.job)
            self.job.state.step += 1
            seconds.append(time.perf_counter() - started)
            peaks.append(peak_memory_mb())
        return {"peak_mb": peaks, "seconds": seconds}


def _texts(settings: MemoryBenchmark) -> list[str]:
    """Enough words that mean nothing, from few letters, so that a token is about a letter."""
    drawn = random.Random(0)
    words = ["".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=drawn.randint(2, 7))) for _ in range(500)]
    wanted = 64 * settings.seq + 4 * MICRO_BATCHES * settings.rows * settings.seq  # what is held out as well
    return [" ".join(drawn.choices(words, k=200)) for _ in range(wanted // 200 + 1)]


def measure(preset: str, kind: str, settings: MemoryBenchmark) -> dict[str, Any]:
    """One cell: MiB estimated and measured, and seconds of the last step."""
    config = preset_config(preset, seq=settings.seq)
    load = Load(
        config, settings.rows, settings.seq, settings.optimizer, kind, settings.dtype, micro_batches=MICRO_BATCHES
    )  # fmt: skip
    estimated = memory_of(load)
    with closing(
        Worker("memory:Cell", f"{preset} {kind}", preset=preset, kind=kind, settings=asdict(settings))
    ) as work:
        answer = work.ask("steps", count=settings.steps)
    measured = answer["peak_mb"][-1]
    return {
        "preset": preset, "kind": kind, **work.facts, "measured_mb": measured, "seconds": answer["seconds"][-1],
        "by_kind_mb": {name: size / MIB for name, size in asdict(estimated).items()},
        "estimated_mb": estimated.peak / MIB, "off": estimated.peak / MIB / measured - 1,
    }  # fmt: skip


def run(argv: Sequence[str]) -> int:
    (settings,) = parse("benchmarks/memory.py", __doc__ or "", [MemoryBenchmark], argv)
    kinds = [kind for kind in settings.kinds.split(",") if kind]
    if wrong := [kind for kind in kinds if kind not in CHECKPOINTING]:
        raise UserError(f"--kinds: {wrong[0]!r} is not one of {', '.join(CHECKPOINTING)}")
    where = machine()
    cells = []
    for preset in settings.presets.split(","):
        for kind in kinds:
            cells.append(measure(preset, kind, settings))
            info(f"[benchmark] {preset} {kind}: {100 * cells[-1]['off']:+.1f} %")
    worst = max(abs(cell["off"]) for cell in cells)
    rows = [
        [cell["preset"], f"{cell['parameters'] / 1e6:.1f} M", cell["kind"], f"{cell['estimated_mb']:,.0f}",
         f"{cell['measured_mb']:,.0f}", f"{100 * cell['off']:+.1f} %", f"{cell['by_kind_mb']['activations']:,.0f}",
         f"{cell['seconds']:.1f}"] for cell in cells
    ]  # fmt: skip
    header = ["preset", "parameters", "checkpointing", "estimated MiB", "measured MiB", "off", "of it activations",
              "seconds a step"]  # fmt: skip
    met = f"{'met' if worst <= BAR else 'MISSED'}: the estimate is at most {100 * worst:.1f} % off (bar: 10 %)"
    how = (
        f"{settings.rows} rows of {settings.seq} tokens at once, {MICRO_BATCHES} micro-batches a step, "
        f"{settings.dtype}, {settings.optimizer}, step {settings.steps}."
    )
    heading = "# Memory, estimated and measured"
    markdown = "\n\n".join([heading, machine_line(where), how, table(header, rows), met])
    write_results(
        settings.results, "memory", {"machine": where, "settings": asdict(settings), "cells": cells}, markdown
    )
    return 1 if settings.check and worst > BAR else 0


if __name__ == "__main__":
    main(run)
