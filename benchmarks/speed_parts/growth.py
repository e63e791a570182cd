"""Growth: how time and memory of a training step follow the length of a row, rows a step, depth, width, processes, and
how preparing and reading text follow the size of a corpus; each with the exponent of the power law that fits best.

An exponent of 1 is proportional growth. It is the slope of the least-squares line through the logarithms. A fixed part
(libraries are subtracted, Python's time for an operation is not) makes it less at the small end, so the slope of the
largest doubling is given too. Rows are full ones of random tokens, trained by the training loop's step; processes are
started by torchrun, each with one thread and as many rows; the corpus is prepared by `minillm data prepare-text`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, VOCABULARY, Worker, Workload, machine, median, spread, table, worker

from minillm.data.demo import generate_demo
from minillm.eval.charts import Line, Panel
from minillm.log import UserError, info
from minillm.models.config import ModelSettings, build_model_config
from speed_parts.base import Part, SpeedBenchmark, in_turns

BASE = {"width": 256, "depth": 4, "seq": 256, "rows": 8}
POINTS = {
    "seq": (128, 256, 512, 1024, 2048),
    "rows": (2, 4, 8, 16, 32),
    "depth": (2, 4, 8, 16),
    "width": (128, 256, 512, 1024),
}
QUICK_BASE = {"width": 64, "depth": 1, "seq": 32, "rows": 2}
QUICK_POINTS = {"seq": (32, 64), "rows": (2, 4)}
TITLES = {"seq": "tokens a row", "rows": "rows a step", "depth": "layers", "width": "width", "processes": "processes",
          "megabytes": "MB of text"}  # fmt: skip
MEGABYTES = (4, 16, 64)
STEPS_OF_A_PROCESS = 12


@dataclass
class Curve:
    """What was measured at each size: seconds by round, and MiB beyond the libraries."""

    seconds: dict[int, list[float]]
    memory: dict[int, float]

    def exponents(self) -> dict[str, float]:
        """Fitted over all sizes, and over the two largest."""
        sizes = sorted(self.seconds)
        time = [median(self.seconds[size]) for size in sizes]
        memory = [self.memory[size] for size in sizes]
        return {
            "seconds": exponent(sizes, time),
            "seconds, largest": exponent(sizes[-2:], time[-2:]),
            "memory": exponent(sizes, memory),
            "memory, largest": exponent(sizes[-2:], memory[-2:]),
        }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of value = c x size^p: the slope of the least-squares line through the logarithms; NaN where there is none."""
    if len(sizes) < 2 or min(values) <= 0:
        return math.nan
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def measure(flags: SpeedBenchmark) -> Part:
    curves = {name: training_curve(name, flags) for name in (QUICK_POINTS if flags.quick else POINTS)}
    if not flags.quick:
        curves["processes"] = processes_curve()
    curves["megabytes"] = corpus_curve((1, 2) if flags.quick else MEGABYTES)
    base = QUICK_BASE if flags.quick else BASE
    part = Part(
        "Growth",
        f"One at a time is changed of: {', '.join(f'{value} {TITLES[name]}' for name, value in base.items())}; "
        "float32, eager, AdamW. Memory is what the process holds at most beyond its libraries.",
        {
            name: {"seconds": curve.seconds, "memory_mb": curve.memory, "exponents": curve.exponents()}
            for name, curve in curves.items()
        },
    )
    rows = []
    for name, curve in curves.items():
        found = curve.exponents()
        rows.append([TITLES[name], *(f"{found[key]:.2f}" for key in found)])
    part.sections = [
        table(["size", "exponent of time", "largest sizes", "exponent of memory", "largest sizes"], rows),
        *(
            table(
                [TITLES[name], "seconds: median (range)", "MiB"],
                [
                    [size, spread(curve.seconds[size], 3), f"{curve.memory[size]:,.0f}"]
                    for size in sorted(curve.seconds)
                ],
            )
            for name, curve in curves.items()
        ),
    ]
    part.panels = [
        Panel(
            f"Growth with {TITLES[name]}",
            lines=[_line("seconds", 0, {size: median(each) for size, each in curve.seconds.items()}),
                   _line("MiB", 1, curve.memory)],
            x=TITLES[name],
            logarithmic=True,
        )
        for name, curve in curves.items()
    ]  # fmt: skip
    return part


def _line(label: str, place: int, values: Mapping[int, float]) -> Line:
    return Line(label, place, [(float(size), value) for size, value in values.items() if value > 0])


def training_curve(name: str, flags: SpeedBenchmark) -> Curve:
    """A step at each value of one of the sizes."""
    base, points = (QUICK_BASE, QUICK_POINTS) if flags.quick else (BASE, POINTS)
    with ExitStack() as stack:
        processes: dict[str, Worker] = {}
        for value in points[name]:
            sizes = {**base, name: value}
            settings = ModelSettings(hidden_size=sizes["width"], num_hidden_layers=sizes["depth"])
            config = build_model_config(settings, vocab_size=VOCABULARY, max_seq_len=sizes["seq"], causal=True)
            workload = Workload(side="ours", config=config.to_dict(), seq=sizes["seq"], rows=sizes["rows"])
            processes[str(value)] = stack.enter_context(worker(workload))
            processes[str(value)].steps(1)
        seconds = in_turns(
            {key: lambda each=each: min(each.steps(2)["seconds"]) for key, each in processes.items()},  # type: ignore[misc]
            flags.rounds_or(3),
            f"s a step by {TITLES[name]}",
        )
        memory = {
            int(key): each.ask("memory")["peak_mb"] - each.facts["libraries_mb"] for key, each in processes.items()
        }
    return Curve({int(key): values for key, values in seconds.items()}, memory)


def processes_curve() -> Curve:
    """Steps of 1, 2, 4 ... processes, up to one a core: a step should take as long, whatever their number."""
    seconds: dict[int, list[float]] = {}
    memory: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        generate_demo(Path(folder), size=300)
        count = 1
        while count <= int(machine()["cores"]):
            log = _run_processes(Path(folder), count)
            seconds[count] = [row["step_time"] for row in log[2:]]
            memory[count] = max(row["memory_mb"] for row in log)
            info(f"[benchmark] {count} processes: {spread(seconds[count], 3)} s a step")
            count *= 2
    return Curve(seconds, memory)


def _run_processes(folder: Path, count: int) -> list[dict[str, Any]]:
    """The training log of a run of so many processes."""
    out = folder / f"out{count}"
    flags = {
        "data_path": folder / "pretrain.jsonl", "out_dir": out, "hidden_size": BASE["width"],
        "num_hidden_layers": BASE["depth"], "max_seq_len": BASE["seq"], "batch_size": BASE["rows"], "log_every": 1,
        "max_steps": STEPS_OF_A_PROCESS, "eval_every": 1000, "save_every": 1000, "eval_samples": 1, "dtype": "float32",
        "compile": "off", "device": "cpu", "optimizer": "adamw",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    done = subprocess.run(
        [*command, "-m", "minillm", "pretrain", *words, "--no_wandb"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    logs = list(out.glob("*/training_log.json"))
    if done.returncode or not logs:
        raise UserError(f"{count} processes failed ({done.returncode}): {done.stderr.strip()[-500:]}")
    return json.loads(logs[0].read_text(encoding="utf-8"))


def corpus_curve(sizes: Sequence[int]) -> Curve:
    """Preparing a corpus of so many MB, in a process of its own each."""
    seconds: dict[int, list[float]] = {}
    memory: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        generate_demo(Path(folder) / "demo", size=600)
        for size in sizes:
            name = f"{size} MB"
            with closing(Worker("speed_parts.corpora:Preparing", name, folder=folder, megabytes=size)) as process:
                answer = process.ask("prepare")
                seconds[size] = [answer["seconds"]]
                memory[size] = process.ask("memory")["peak_mb"] - process.facts["libraries_mb"]
            info(f"[benchmark] {name} of text: {answer['seconds']:.2f} s")
    return Curve(seconds, memory)
