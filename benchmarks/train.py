"""Training speed of the presets: tokens/s, model FLOPs utilisation, peak memory.

    python benchmarks/train.py --presets small,medium --seq 256 --batch 16

Each configuration (preset, dense or experts, eager or compiled) trains alone in a process of its own, with the
training loop's own step on random tokens. Utilisation is 6 x active parameters x tokens/s, divided by the
FLOP/s of a matrix product measured in the same process just before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from common import (
    RESULTS,
    Workload,
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

KINDS = ("dense", "moe")


@dataclass(frozen=True)
class TrainBenchmark:
    """Training speed of the presets"""

    presets: str = field(default="small,medium", metadata={"help": "presets, separated by commas"})
    kinds: str = field(default="dense,moe", metadata={"help": "dense, moe or both"})
    seq: int = field(default=256, metadata={"help": "tokens a row", "min": 8})
    batch: int = field(default=16, metadata={"help": "rows a step", "min": 1})
    eager: bool = field(default=False, metadata={"help": "only eager (neither flag: both)"})
    compiled: bool = field(default=False, metadata={"help": "only compiled (neither flag: both)"})
    steps: int = field(default=10, metadata={"help": "timed steps", "min": 1})
    warmup: int = field(default=3, metadata={"help": "steps before the timed ones", "min": 1})
    optimizer: str = field(default="adamw", metadata={"help": "our optimizer", "choices": ("adamw", "muon")})
    results: str = field(default=RESULTS, metadata={"help": "folder for JSON and Markdown"})


def measure(workload: Workload, settings: TrainBenchmark) -> dict[str, Any]:
    """Steady state of one configuration."""
    with worker(workload) as process:
        warmup = process.steps(settings.warmup)["seconds"]
        before = process.ask("gemm")["flops"]
        seconds = process.steps(settings.steps)["seconds"]
        gemm = (before + process.ask("gemm")["flops"]) / 2
        peak = process.ask("memory")["peak_mb"]
        facts = process.facts
    rates = [workload.tokens_per_step / second for second in seconds]
    return {
        **facts,
        "compiled": workload.compiled,
        "tokens_per_second": rates,
        "gemm_flops": gemm,
        "utilisation": median(rates) * facts["flops_per_token"] / gemm,
        "peak_mb": peak,
        "first_step_seconds": warmup[0],
    }


def run(argv: Sequence[str]) -> int:
    (settings,) = parse("benchmarks/train.py", __doc__ or "", [TrainBenchmark], argv)
    kinds = settings.kinds.split(",")
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"--kinds: {wrong[0]!r} is not one of {', '.join(KINDS)}")
    both = settings.eager == settings.compiled
    modes = [mode for mode, wanted in ((False, settings.eager), (True, settings.compiled)) if both or wanted]
    configs = [
        (preset, kind, preset_config(preset, seq=settings.seq, use_moe=kind == "moe"))
        for preset in settings.presets.split(",")
        for kind in kinds
    ]
    where = machine()
    results = []
    for preset, kind, config in configs:
        for compiled in modes:
            workload = Workload(
                side="ours", config=config.to_dict(), seq=settings.seq, rows=settings.batch, compiled=compiled,
                optimizer=settings.optimizer,
            )  # fmt: skip
            result = {"preset": preset, "kind": kind, **measure(workload, settings)}
            results.append(result)
            info(f"[benchmark] {preset} {kind} {'compiled' if compiled else 'eager'}: "
                 f"{spread(result['tokens_per_second'])} tokens/s")  # fmt: skip
    rows = [
        [
            result["preset"],
            result["kind"],
            "compiled" if result["compiled"] else "eager",
            f"{result['parameters'] / 1e6:.1f} M",
            spread(result["tokens_per_second"]),
            f"{result['gemm_flops'] / 1e9:.0f}",
            f"{100 * result['utilisation']:.0f} %",
            f"{result['peak_mb']:,.0f}",
            f"{result['first_step_seconds']:.1f}",
        ]
        for result in results
    ]
    header = ["preset", "kind", "mode", "parameters", "tokens/s: median (range)", "GEMM GFLOP/s", "utilisation",
              "peak MiB", "first step s"]  # fmt: skip
    markdown = "\n\n".join(
        [
            "# Training speed of the presets",
            machine_line(where),
            f"Sequence {settings.seq}, {settings.batch} rows a step, fp32, {settings.optimizer}, "
            f"{results[0]['threads']} threads, {settings.steps} timed steps after {settings.warmup}.",
            table(header, rows),
        ]
    )
    write_results(
        settings.results, "train", {"machine": where, "settings": asdict(settings), "results": results}, markdown
    )
    return 0


if __name__ == "__main__":
    main(run)
