"""One run in every shape: is it the same run?

    python scripts/same_run.py [--steps 50] [--processes 4] [--keep FOLDER]

Trains tiny models in float32 on 1, 2 and 4 processes (gloo) with 4, 2 and 1 batches a step: each process with a copy of
the weights, all sharing one (FSDP), and two groups of two (HSDP). Prints, for each, the largest relative difference in
the loss and in the gradient norm of any step from the run on one process, and ends with 1 where one is above 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 1e-5
SOURCE = Path(__file__).resolve().parent.parent / "src"
SIZES = ["--hidden_size", "32", "--num_hidden_layers", "2", "--max_seq_len", "64", "--dtype", "float32", "--device",
         "cpu", "--no_wandb", "--eval_samples", "8", "--log_every", "1", "--save_every", "100000",
         "--micro_batch_size", "2", "--batch_size", "2"]  # fmt: skip
CASES = {
    "ar": [],
    "ar, experts": ["--use_moe", "--num_experts", "8"],
    "diffusion": ["--architecture", "diffusion"],
    "sdd": ["--architecture", "sdd"],
}


class Shape(NamedTuple):
    processes: int
    shards: int

    def __str__(self) -> str:
        if self.processes == 1:
            return "1 process"
        kind = "replicas" if self.shards == 1 else "FSDP" if self.shards == self.processes else "HSDP"
        return f"{self.processes} processes, {kind}"


def free_port() -> int:
    """One at which the processes can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """Of one of the processes, as torchrun gives it."""
    return {
        **os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "RANK": str(rank), "LOCAL_RANK": str(rank),
    }  # fmt: skip


def run_together(commands: Sequence[Sequence[str]], processes: int, timeout: float = 3600) -> None:
    """Run `minillm` commands one after another on so many processes, which start once. Raises RuntimeError with what
    the processes said where one of them fails."""
    port, started = free_port(), []
    with tempfile.TemporaryDirectory() as logs:
        for rank in range(processes):
            with (Path(logs) / str(rank)).open("w") as log:
                started.append(
                    subprocess.Popen(
                        [sys.executable, __file__, "--commands", json.dumps([list(each) for each in commands])],
                        env=environment(rank, processes, port), stdout=log, stderr=log,
                    )
                )  # fmt: skip
        try:
            codes = [process.wait(timeout) for process in started]
        finally:
            for process in started:
                process.kill()
        if any(codes):
            said = [f"--- rank {rank}: {code}\n{(Path(logs) / str(rank)).read_text()[-4000:]}"
                    for rank, code in enumerate(codes)]  # fmt: skip
            raise RuntimeError("\n".join(said))


def _run_here(commands: list[list[str]]) -> None:
    """What one of the processes does: the commands, without leaving the others in between."""
    from minillm import processes
    from minillm.cli import execute

    stop, processes.stop = processes.stop, lambda: None
    for command in commands:
        execute(command)
    stop()


def read_log(out: Path) -> list[dict[str, Any]]:
    """The logged rows of the only run under `out`."""
    (file,) = out.glob("*/training_log.json")
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return rows


def largest_difference(name: str, rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """Of a logged value, relative, over all steps; infinite where the steps are not the same."""
    if [row["step"] for row in rows] != [row["step"] for row in others]:
        return float("inf")
    return max(abs(row[name] - other[name]) / abs(row[name]) for row, other in zip(rows, others))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--processes", type=int, default=4, choices=(2, 4), help="at most")
    parser.add_argument("--keep", default="", help="folder for the runs, which stays")
    parser.add_argument("--commands", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.commands:
        _run_here(json.loads(flags.commands))
        return 0
    shapes = [Shape(1, 1), Shape(2, 1), Shape(2, 2), Shape(4, 1), Shape(4, 4), Shape(4, 2)]
    shapes = [shape for shape in shapes if shape.processes <= flags.processes]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(flags.keep or temporary)
        data = folder / "data"
        run_together([["data", "demo", "--output_dir", str(data)]], 1)
        places = {(case, shape): folder / f"{case}-{shape}" for case in CASES for shape in shapes}
        for number in sorted({shape.processes for shape in shapes}):
            commands = [
                ["pretrain", "--data_path", str(data / "pretrain.jsonl"), "--out_dir", str(places[case, shape]), *SIZES,
                 *extra, "--max_steps", str(flags.steps), "--eval_every", str(max(1, flags.steps // 2)),
                 "--grad_accum_steps", str(flags.processes // number), "--shards", str(shape.shards)]
                for shape in shapes if shape.processes == number for case, extra in CASES.items()
            ]  # fmt: skip
            run_together(commands, number)
        worst = 0.0
        print(f"{'model':<14}{'shape':<24}{'loss':>10}{'gradient norm':>16}   over {flags.steps} steps")
        for case in CASES:
            one = read_log(places[case, shapes[0]])
            for shape in shapes[1:]:
                other = read_log(places[case, shape])
                found = [largest_difference(name, one, other) for name in ("train/loss", "train/grad_norm")]
                worst = max(worst, *found)
                print(f"{case:<14}{str(shape):<24}{found[0]:>10.1e}{found[1]:>16.1e}")
    print(f"largest: {worst:.1e}; allowed: {LIMIT:.0e}")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
