"""What the training tests share: a tiny world of data, and the command a user types, in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {"pretrain": "pretrain", "full_sft": "sft", "rlhf": "dpo"}
DATA = {"pretrain": "pretrain", "full_sft": "sft", "rlhf": "dpo"}
# Small enough for a second, and float32, so that equality can be asked for.
TINY = ["--hidden_size", "32", "--num_hidden_layers", "2", "--max_seq_len", "128", "--dtype", "float32",
        "--device", "cpu", "--no_wandb", "--batch_size", "4", "--eval_samples", "4", "--log_every", "1"]  # fmt: skip
PYTHON = sys.executable  # what `run` starts; the nursery where a test file says so


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "MINILLM_PRETRAINED_PATH": ""}


def command(stage: str, data: Path, out: Path, *flags: str) -> list[str]:
    return [
        sys.executable, "-m", "minillm", COMMANDS[stage], "--data_path", str(data / f"{DATA[stage]}.jsonl"),
        "--validation_data", str(data / f"{DATA[stage]}_val.jsonl"), "--out_dir", str(out), *TINY, *flags,
    ]  # fmt: skip


def run(stage: str, data: Path, out: Path, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    words = [PYTHON, *command(stage, data, out, *flags)[1:]]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=240)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def start_together(
    size: int, stage: str, data: Path, out: Path, *flags: str, program: str = ""
) -> list[subprocess.Popen[str]]:
    """One run on several processes of this machine, as torchrun would start them. `program` comes in place of ours."""
    arguments = command(stage, data, out, *flags)
    if program:
        arguments[1:3] = ["-c", program]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            arguments, stderr=subprocess.PIPE, text=True,
            env={**environment(), **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]  # fmt: skip


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


TIMES = {
    "elapsed", "step_time", "tokens_per_second", "memory_mb", "train/tokens_per_sec", "train/memory_mb", "train/mfu",
    "total_time", "average_step_time", "train/checkpoint_stall",
}  # fmt: skip


def without_times(value: Any) -> Any:
    """The same containers without what a clock or the machine says."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list | tuple):
        return [without_times(item) for item in value]
    return value


def equal(one: Any, two: Any) -> bool:
    """Bit equality of nested containers and tensors."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return isinstance(two, list | tuple) and len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)
