"""What LoRA costs beside full fine-tuning: how fast a step is and how much memory it takes.

    python benchmarks/lora_cost.py

The training loop's own step on random tokens, in a process for each, which take turns. What the adapter learns beside
all of the weights: benchmarks/proofs/lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from common import RESULTS, Workload, machine, machine_line, main, preset_config, spread, table, worker, write_results

from minillm.config import parse


@dataclass(frozen=True)
class LoraBenchmark:
    """LoRA beside full fine-tuning"""

    rank: int = field(default=8, metadata={"help": "of the adapter, on all linear layers", "min": 1})
    preset: str = field(default="small", metadata={"help": "size of the model"})
    seq: int = field(default=256, metadata={"help": "tokens a row", "min": 8})
    batch: int = field(default=8, metadata={"help": "rows a step", "min": 1})
    steps: int = field(default=8, metadata={"help": "timed steps of each", "min": 1})
    results: str = field(default=RESULTS, metadata={"help": "folder for JSON and Markdown"})


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
    ratios = [before / after for before, after in zip(seconds["full"], seconds["lora"])]
    return {"seconds": seconds, "ratios": ratios, "peak_mb": peaks, **facts}


def markdown(costs: dict[str, Any]) -> str:
    trained = {"full": costs["parameters"], "lora": costs["adapter"]}
    rows = [[name, f"{trained[key]:,}", spread(costs["seconds"][key], 3), f"{costs['peak_mb'][key]:,.0f}"]
            for name, key in (("full fine-tuning", "full"), ("LoRA", "lora"))]  # fmt: skip
    ratio = f"LoRA takes {spread(costs['ratios'], 2)} times as many steps a second."
    return f"{table(['', 'trained parameters', 'seconds a step', 'memory, MiB'], rows)}\n\n{ratio}"


def run(argv: Sequence[str]) -> int:
    (settings,) = parse("benchmarks/lora_cost.py", "LoRA beside full fine-tuning", [LoraBenchmark], argv)
    facts = machine()
    costs = cost(settings)
    data = {"settings": asdict(settings), "machine": facts, "cost": costs}
    write_results(settings.results, "lora_cost", data, f"{machine_line(facts)}\n\n{markdown(costs)}")
    return 0


if __name__ == "__main__":
    main(run)
