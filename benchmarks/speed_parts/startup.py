"""Start-up: seconds from typing a command to its help, and to its first useful line.

Each command runs in a process of its own, in a little world: generated data, and checkpoints of a tiny model. The first
useful line is that of the first step for what trains, and the first line that is no warning for everything else; then
the process is ended. Of commands that need a network, or what several processes wrote, the help alone is timed. Python
alone, and with torch imported, are given beside as what cannot be undercut.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import ROOT, median, spread, table

from minillm.cli import COMMANDS
from minillm.data.demo import generate_demo
from minillm.eval.charts import Bar, Panel
from minillm.log import UserError, info
from speed_parts.base import Part, SpeedBenchmark, in_turns

TRAIN = (
    "--max_seq_len 64 --batch_size 4 --max_steps 1 --eval_samples 4 --log_every 1 --no_wandb --device cpu --out_dir NEW"
)
RUN = "out/pretrain_32/best_model.pt"
TINY = "--hidden_size 32 --num_hidden_layers 2"
TUNE = f"--pretrained_path out/pretrain_32.pth {TRAIN}"
POLICY = f"--data_path sums.jsonl --reward length:0-9 --max_completion_length 4 {TUNE}"
# The arguments of each command in the world. NEW is a name that is not there yet, RUN a checkpoint, COPY a copy of it,
# COLD a compressed one of its own.
ARGUMENTS = {
    "pretrain": f"--data_path pretrain.jsonl {TINY} {TRAIN}",
    "sft": f"--data_path sft.jsonl {TUNE}",
    "finetune": f"--data_path sft.jsonl {TUNE}",
    "lora": f"--data_path sft.jsonl {TUNE}",
    "dpo": f"--data_path dpo.jsonl {TUNE}",
    "reward": f"--data_path dpo.jsonl {TUNE}",
    "ppo": POLICY,
    "grpo": f"{POLICY} --num_generations 2",
    "spo": POLICY,
    "distill": f"--data_path sft.jsonl --teacher out/pretrain_32.pth {TUNE}",
    "reason": f"--data_path reason.jsonl {TUNE}",
    "evaluate": "--checkpoint RUN --data_path pretrain_val.jsonl",
    "evaluate-instructions": "--checkpoint RUN --data_path sft_val.jsonl",
    "compare": "--output_dir NEW",
    "generate": "--checkpoint RUN --prompt Tom --max_new_tokens 4",
    "chat": "--checkpoint RUN",
    "export": "--checkpoint RUN --output NEW",
    "convert": "--checkpoint RUN --to diffusion --output NEW.pt",
    "import": "exported --output NEW.pt",
    "merge": "--checkpoint RUN --adapter out/lora_32 --output NEW.pt",
    "checkpoint list": "out",
    "checkpoint show": "RUN",
    "checkpoint verify": "RUN",
    "checkpoint diff": "RUN RUN",
    "checkpoint average": "RUN RUN --output NEW.pt",
    "checkpoint prune": "out/pretrain_32 --keep 1",
    "checkpoint tag": "RUN",
    "checkpoint compress": "COPY.pt",
    "checkpoint restore": "COLD.pt.zst",
    "data demo": "--output_dir NEW --size 100",
    "data inspect": "pretrain.jsonl",
    "data stats": "sft.jsonl",
    "data clean": "sft.jsonl --output NEW.jsonl",
    "data prepare-text": "--input pretrain.jsonl --output_dir NEW --vocab_size 6400",
    "data prepare-instructions": "--input sft.jsonl --output_dir NEW",
    "data prepare-preferences": "--input dpo.jsonl --output NEW.jsonl",
    "data train-tokenizer": "--input pretrain.jsonl --vocab_size 400 --output_dir NEW",
    "pipeline": "--smoke_test",
    "estimate": "--model_config small",
}
STEP = "[train] step"
TRAINING = ("pretrain", "sft", "finetune", "lora", "dpo", "reward", "ppo", "grpo", "spo", "distill", "reason")
QUICK = ("pretrain", "generate", "checkpoint list")
REFERENCES = {"python alone": ["-c", "pass"], "python and torch": ["-c", "import torch"]}


class World:
    """A folder with what the commands read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        self.environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        generate_demo(folder, size=60)
        trace = "<think>\n1 + 1\n</think>\n<answer>\n2\n</answer>"
        row = {"conversations": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": trace}]}
        (folder / "reason.jsonl").write_text((json.dumps(row) + "\n") * 80, encoding="utf-8")
        sums = "".join(json.dumps({"prompt": f"{n} + {n}?", "answer": str(2 * n)}) + "\n" for n in range(80))
        (folder / "sums.jsonl").write_text(sums, encoding="utf-8")
        self.finished("pretrain", ARGUMENTS["pretrain"].replace("NEW", "out"))
        self.finished("lora", ARGUMENTS["lora"].replace("NEW", "out"))
        shutil.copy(folder / RUN, folder / "cold.pt")
        self.finished("checkpoint compress", "cold.pt")
        self.finished("export", "--checkpoint out/pretrain_32.pth --output exported --no_check")

    def words(self, command: str, arguments: str) -> list[str]:
        """The command line, with names of its own for what it writes."""
        self.number += 1
        own = f"new{self.number}"
        if "COPY" in arguments:
            shutil.copy(self.folder / RUN, self.folder / f"{own}.pt")
        if "COLD" in arguments:
            shutil.copy(self.folder / "cold.pt.zst", self.folder / f"{own}.pt.zst")
        filled = arguments.replace("RUN", RUN)
        for name in ("NEW", "COPY", "COLD"):
            filled = filled.replace(name, own)
        return [sys.executable, "-m", "minillm", *command.split(), *filled.split()]

    def finished(self, command: str, arguments: str) -> None:
        """Run to the end. Raises UserError with the last line where it fails."""
        words = self.words(command, arguments)
        done = subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"minillm {command} failed: {done.stderr.strip().splitlines()[-1:]}")

    def first_line(self, command: str) -> float:
        """Seconds to the first useful line. Raises UserError where there is none."""
        words = self.words(command, ARGUMENTS[command])
        started = time.perf_counter()
        process = subprocess.Popen(
            words, cwd=self.folder, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        lines = []
        try:
            for line in process.stdout:
                lines.append(line)
                if line.startswith(("error", "Traceback")):
                    lines += list(process.stdout)
                    break
                if STEP in line if command in TRAINING else line.strip() and "arning" not in line:
                    return time.perf_counter() - started
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        raise UserError(f"minillm {command} wrote no useful line: {''.join(lines[-4:]).strip()}")

    def ended(self, words: Sequence[str]) -> float:
        """Seconds of a whole process of Python. Raises UserError where it fails."""
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"python {' '.join(words)} failed: {done.stderr.strip().splitlines()[-1:]}")
        return time.perf_counter() - started


def measure(flags: SpeedBenchmark) -> Part:
    commands = QUICK if flags.quick else tuple(COMMANDS)
    rounds = flags.rounds_or(3)
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        world.ended(["-c", "import torch"])  # from now on all files are in the system's cache
        helps = {name: ["-m", "minillm", *name.split(), "--help"] for name in ("", *commands)}
        calls = {f"minillm {name} --help".replace("  ", " "): words for name, words in helps.items()}
        help_seconds = in_turns(
            {name: lambda words=words: world.ended(words) for name, words in {**REFERENCES, **calls}.items()},  # type: ignore[misc]
            rounds,
            "s",
        )
        first: dict[str, list[float]] = {}
        for name in commands:
            if name in ARGUMENTS:
                first[name] = [world.first_line(name) for _ in range(max(1, rounds - 1))]
                info(f"[benchmark] minillm {name}: {median(first[name]):.2f} s to its first line")
    rows = [
        [
            f"minillm {name}".strip(),
            spread(help_seconds[f"minillm {name} --help".replace("  ", " ")], 3),
            spread(first[name], 2) if name in first else "",
        ]
        for name in ("", *commands)
    ]
    part = Part(
        "Start-up",
        f"{rounds} rounds; {', '.join(f'{name} {spread(help_seconds[name], 3)} s' for name in REFERENCES)}.",
        {"help_seconds": help_seconds, "first_line_seconds": first},
        sections=[table(["command", "s to its help", "s to its first useful line"], rows)],
    )
    part.panels = [
        Panel("Seconds to the help", [Bar(name[8:-7] or "minillm", 0, median(help_seconds[name])) for name in calls]),
        Panel("Seconds to the first useful line", [Bar(name, 1, median(each)) for name, each in first.items()]),
    ]
    return part
