"""Our training step against that of transformers' Qwen3ForCausalLM, on the same workload in one run.

    python benchmarks/peers.py

Six processes (ours and theirs, and ours with `--dtype auto`; eager and compiled) take turns, one at a time while
the others sleep, so that what else happens on the machine happens to all. Both sides: the same sizes, fp32, the
same rows, fused AdamW, gradients clipped to norm 1. A ratio is taken within each round; the median over the
rounds counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
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
from minillm.log import info

BARS = {"eager": 1.3, "compiled": 1.2}
MEMORY_BAR = 0.6


@dataclass(frozen=True)
class PeersBenchmark:
    """Ours against transformers"""

    preset: str = field(default="small", metadata={"help": "size of the model"})
    seq: int = field(default=256, metadata={"help": "tokens a row", "min": 8})
    batch: int = field(default=16, metadata={"help": "rows a step", "min": 1})
    rounds: int = field(default=7, metadata={"help": "rounds in which every side takes its turn", "min": 1})
    steps: int = field(default=3, metadata={"help": "steps a turn", "min": 1})
    warmup: int = field(default=2, metadata={"help": "steps of every side before the first round", "min": 1})
    eager_only: bool = field(default=False, metadata={"help": "leave the compiled sides out"})
    check: bool = field(default=False, metadata={"help": "exit with 1 where a bar is missed"})
    results: str = field(default=RESULTS, metadata={"help": "folder for JSON and Markdown"})


def measure(settings: PeersBenchmark) -> dict[str, Any]:
    """Rates of every side by round, memory, and the matrix product's FLOP/s by round."""
    config = preset_config(settings.preset, seq=settings.seq).to_dict()
    modes = ("eager",) if settings.eager_only else ("eager", "compiled")
    with ExitStack() as stack:
        workers = {}
        for mode in modes:
            # Beside the like-for-like pair: ours in the number format that it takes by itself on this machine.
            for side, dtype in (("ours", "float32"), ("peer", "float32"), ("ours", "auto")):
                workload = Workload(
                    side=side,
                    config=config,
                    seq=settings.seq,
                    rows=settings.batch,
                    compiled=mode == "compiled",
                    dtype=dtype,
                )
                process = stack.enter_context(worker(workload))
                first = process.steps(settings.warmup)["seconds"][0]
                info(f"[benchmark] {process.name}: first step {first:.1f} s")
                workers[process.name] = process
        rates: dict[str, list[float]] = {name: [] for name in workers}
        gemm = []
        tokens = settings.steps * settings.batch * settings.seq
        for number in range(settings.rounds):
            gemm.append(workers["ours eager"].ask("gemm")["flops"])
            # Every other round backwards: nobody always follows the same neighbour.
            for name in list(workers)[:: 1 if number % 2 == 0 else -1]:
                rates[name].append(tokens / sum(workers[name].steps(settings.steps)["seconds"]))
            shown = ", ".join(f"{name} {values[-1]:,.0f}" for name, values in rates.items())
            info(f"[benchmark] round {number + 1}/{settings.rounds}: {shown} tokens/s")
        sides = {
            name: {
                **process.facts,
                "tokens_per_second": rates[name],
                "peak_mb": process.ask("memory")["peak_mb"],
                "utilisation": median(rates[name]) * process.facts["flops_per_token"] / median(gemm),
            }
            for name, process in workers.items()
        }
    return {"gemm_flops": gemm, "sides": sides}


def run(argv: Sequence[str]) -> int:
    (settings,) = parse("benchmarks/peers.py", __doc__ or "", [PeersBenchmark], argv)
    where = machine()
    result = measure(settings)
    sides = result["sides"]
    lines, all_met, ratios = [], True, {}
    for mode, bar in BARS.items():
        if f"ours {mode}" not in sides:
            continue
        ours, theirs = (sides[f"{side} {mode}"]["tokens_per_second"] for side in ("ours", "peer"))
        ratios[mode] = [a / b for a, b in zip(ours, theirs)]
        line, met = bar_line(f"{mode} tokens/s, ours / transformers", median(ratios[mode]), bar, at_least=True)
        lines.append(f"{line}; by round {min(ratios[mode]):.2f}-{max(ratios[mode]):.2f}")
        all_met &= met
        chosen = [a / b for a, b in zip(sides[f"ours {mode} auto"]["tokens_per_second"], theirs)]
        lines.append(f"for information: {mode} with --dtype auto / transformers in float32 {median(chosen):.2f}")
    memory = sides["ours eager"]["peak_mb"] / sides["peer eager"]["peak_mb"]
    line, met = bar_line("eager peak memory, ours / transformers", memory, MEMORY_BAR, at_least=False)
    lines.append(line)
    all_met &= met
    rows = [
        [
            name.replace("peer", "transformers"),
            spread(side["tokens_per_second"]),
            f"{100 * side['utilisation']:.0f} %",
            f"{side['peak_mb']:,.0f}",
            f"{side['libraries_mb']:,.0f}",
        ]
        for name, side in sides.items()
    ]
    header = ["side", "tokens/s: median (range)", "utilisation", "peak MiB", "of it libraries"]
    markdown = "\n\n".join(
        [
            "# Ours against transformers",
            machine_line(where),
            f"Preset {settings.preset} ({sides['ours eager']['parameters'] / 1e6:.1f} M parameters), sequence "
            f"{settings.seq}, {settings.batch} rows a step, fp32, AdamW, {sides['ours eager']['threads']} threads; "
            f"{settings.rounds} rounds of {settings.steps} steps a side. Matrix product: "
            f"{spread([flops / 1e9 for flops in result['gemm_flops']])} GFLOP/s.",
            table(header, rows),
            "\n".join(f"- {line}" for line in lines),
        ]
    )
    data = {"machine": where, "settings": asdict(settings), "ratios": ratios, "memory_ratio": memory, **result}
    write_results(settings.results, "peers", data, markdown)
    return 1 if settings.check and not all_met else 0


if __name__ == "__main__":
    main(run)
