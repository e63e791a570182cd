"""LoRA beside full fine-tuning: what it learns in the same steps, how fast a step is, how much memory it takes.

    python benchmarks/lora.py --check

Learning: a small model is pretrained on the demo data and fine-tuned on its conversations, once all of it and once by
an adapter, from the same checkpoint, over the same rows in the same order. Each has the learning rate that its command
takes where none is given. Compared is the lowest validation loss. Cost: the training loop's own step on random tokens,
in a process for each, which take turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    Workload,
    bar_line,
    machine,
    machine_line,
    main,
    median,
    preset_config,
    spread,
    table,
    worker,
    write_results,
)

from minillm.config import parse
from minillm.log import UserError, info

LOSS_BAR, SHARE_BAR = 1.03, 5.0  # of full fine-tuning's loss; percent of the parameters


@dataclass(frozen=True)
class LoraBenchmark:
    """LoRA beside full fine-tuning"""

    rank: int = field(default=8, metadata={"help": "of the adapter", "min": 1})
    hidden_size: int = field(default=128, metadata={"help": "learning: width of the model", "min": 16})
    num_hidden_layers: int = field(default=4, metadata={"help": "learning: layers", "min": 1})
    pretrain_steps: int = field(default=300, metadata={"help": "learning: steps of the model to adapt", "min": 1})
    tune_steps: int = field(default=150, metadata={"help": "learning: steps of both runs (0: no learning)", "min": 0})
    seeds: int = field(default=1, metadata={"help": "learning: fine-tuning runs with so many seeds", "min": 1})
    preset: str = field(default="small", metadata={"help": "cost: size of the model"})
    seq: int = field(default=256, metadata={"help": "cost: tokens a row", "min": 8})
    batch: int = field(default=8, metadata={"help": "cost: rows a step", "min": 1})
    steps: int = field(default=8, metadata={"help": "cost: timed steps of each (0: no cost)", "min": 0})
    check: bool = field(default=False, metadata={"help": "exit status 1 where a bar is missed"})
    results: str = field(default=RESULTS, metadata={"help": "folder for JSON and Markdown"})


def _command(*words: str) -> None:
    from minillm.cli import main as minillm

    if minillm(list(words)) != 0:
        raise UserError(f"this failed: minillm {' '.join(words)}")


def learning(settings: LoraBenchmark, folder: Path) -> list[dict[str, Any]]:
    """For each seed the lowest validation losses of both, and what of the model is trained."""
    from minillm.checkpoint.adapter import WEIGHTS
    from minillm.checkpoint.files import read_tensors
    from minillm.data.demo import generate_demo

    generate_demo(folder / "data", size=2000, seed=1)
    sizes = ("--hidden_size", str(settings.hidden_size), "--max_seq_len", "128", "--batch_size", "16", "--no_wandb",
             "--device", "cpu", "--dtype", "float32", "--compile", "off", "--log_every", "25")  # fmt: skip
    out = folder / "out"

    def train(command: str, data: str, steps: int, *flags: str) -> None:
        rows = ("--data_path", f"{folder}/data/{data}.jsonl", "--validation_data", f"{folder}/data/{data}_val.jsonl")
        _command(command, *rows, *sizes, "--max_steps", str(steps), "--out_dir", str(out), *flags)

    train("pretrain", "pretrain", settings.pretrain_steps, "--num_hidden_layers", str(settings.num_hidden_layers))
    base = str(out / f"pretrain_{settings.hidden_size}.pth")
    found = []
    for seed in range(settings.seeds):
        losses = {}
        for command, stage in (("sft", "full_sft"), ("lora", "lora")):
            flags = ("--lora_rank", str(settings.rank)) if command == "lora" else ()
            train(command, "sft", settings.tune_steps, "--pretrained_path", base, "--seed", str(seed), *flags)
            run = out / f"{stage}_{settings.hidden_size}"
            last = read_tensors(run / "last.pt")
            losses[command] = last["best_val_loss"]
            before = last["validation_log"][0]["val/loss"]
        adapter = sum(value.numel() for value in read_tensors(run / WEIGHTS).values())
        parameters = last["model_info"]["parameters"]
        found.append(
            {"seed": seed, "before": before, "full": losses["sft"], "lora": losses["lora"],
             "ratio": losses["lora"] / losses["sft"], "share": 100 * adapter / parameters}
        )  # fmt: skip
    return found


def cost(settings: LoraBenchmark) -> dict[str, Any]:
    """Steps of both in turns: seconds, the ratio within each turn, and peak memory without that of the libraries."""
    config = preset_config(settings.preset, seq=settings.seq).to_dict()
    full = Workload("ours", config, settings.seq, settings.batch)
    adapted = Workload("ours", config, settings.seq, settings.batch, lora_rank=settings.rank)
    with worker(full) as one, worker(adapted) as two:
        seconds: dict[str, list[float]] = {"full": [], "lora": []}
        for process in (one, two):
            process.steps(2)
        for turn in range(settings.steps):
            pair = [("full", one), ("lora", two)]
            for name, process in pair if turn % 2 else reversed(pair):
                seconds[name] += process.steps(1)["seconds"]
        peaks = {name: process.ask("memory")["peak_mb"] - process.facts["libraries_mb"]
                 for name, process in (("full", one), ("lora", two))}  # fmt: skip
        facts = {"parameters": one.facts["parameters"], "adapter": two.facts["adapter"]}
    ratios = [full / lora for full, lora in zip(seconds["full"], seconds["lora"])]
    return {"seconds": seconds, "ratios": ratios, "peak_mb": peaks, **facts}


def markdown(found: list[dict[str, Any]], costs: dict[str, Any] | None) -> str:
    parts = []
    if found:
        rows = [[row["seed"], f"{row['before']:.4f}", f"{row['full']:.4f}", f"{row['lora']:.4f}",
                 f"{row['ratio']:.3f}", f"{row['share']:.1f} %"] for row in found]  # fmt: skip
        header = ["seed", "loss before", "full fine-tuning", "LoRA", "ratio", "parameters trained"]
        parts.append(table(header, rows))
    if costs is not None:
        rows = [[name, spread(costs["seconds"][key], 3), f"{costs['peak_mb'][key]:,.0f}"]
                for name, key in (("full fine-tuning", "full"), ("LoRA", "lora"))]  # fmt: skip
        parts.append(table(["", "seconds a step", "memory, MiB"], rows))
        parts.append(f"LoRA's steps per second are {spread(costs['ratios'], 2)} times those of full fine-tuning.")
    return "\n\n".join(parts)


def run(argv: Sequence[str]) -> int:
    (settings,) = parse("benchmarks/lora.py", "LoRA beside full fine-tuning", [LoraBenchmark], argv)
    facts = machine()
    found: list[dict[str, Any]] = []
    if settings.tune_steps:
        with tempfile.TemporaryDirectory() as folder:
            found = learning(settings, Path(folder))
    costs = cost(settings) if settings.steps else None
    text = f"{machine_line(facts)}\n\n{markdown(found, costs)}"
    data = {"settings": asdict(settings), "machine": facts, "learning": found, "cost": costs}
    write_results(settings.results, "lora", data, text)
    if not found:
        return 0
    lines = [
        bar_line("loss of LoRA / full", median([row["ratio"] for row in found]), LOSS_BAR, at_least=False),
        bar_line("percent of the parameters", found[0]["share"], SHARE_BAR, at_least=False),
    ]
    for line, _ in lines:
        info(line)
    return 1 if settings.check and not all(met for _, met in lines) else 0


if __name__ == "__main__":
    main(run)
