"""What a GPU is to show, in one run of a few minutes: that it computes what the CPU does, and how fast it trains.

    benchmarks/gpu.sh                     # on a machine with a GPU and this repository alone
    benchmarks/gpu.sh --device cpu --smoke

First losses and gradients of all families on packed rows, and both kernels of packed attention, against the CPU. Then
presets large, xl, medium, small at sequence 1024 in bfloat16: ours (layers compiled), transformers eager, transformers
compiled, and nanoGPT compiled where NANOGPT_DIR names a checkout; each in a process of its own, one after the other,
whichever fit into the time. What does not fit into memory is tried with half the rows.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from common import RESULTS, Worker, machine, machine_line, main, median, spread, table, write_results

from minillm.config import parse
from minillm.families import FAMILIES
from minillm.log import UserError, info

ROWS = {"small": 64, "medium": 64, "large": 32, "xl": 16}  # at once, of 1,024 tokens
SIDES = (("ours", True), ("transformers", False), ("transformers", True), ("nanogpt", True))
LONGEST_CELL = 100.0  # seconds, compiling included
SHORTEST_CELL = 15.0  # with less left none is begun
MFU_GOAL = {"large": 0.5, "xl": 0.5}
LIMITS = {"loss": 1e-4, "gradient": 1e-2, "compiled gradient": 1e-2, "bfloat16 loss": 0.02}  # relative
ATTENTION_LIMIT = 1e-3
# Dense bfloat16 FLOP/s of the makers' data sheets; what is not here is compared with the product measured in the run.
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip


@dataclass(frozen=True)
class GpuBenchmark:
    """Correctness and training speed on a GPU"""

    device: str = field(default="cuda", metadata={"help": "cuda, cuda:1, or cpu to see that the script runs"})
    smoke: bool = field(default=False, metadata={"help": "tiny sizes: shows that it runs, measures nothing"})
    presets: str = field(default="large,xl,medium,small", metadata={"help": "presets, the most wanted first"})
    seq: int = field(default=1024, metadata={"help": "tokens a row", "min": 8})
    minutes: float = field(default=7.5, metadata={"help": "for everything", "above": 0})
    spent: float = field(default=0.0, metadata={"help": "seconds of it that setting up took", "min": 0})
    results: str = field(default=RESULTS, metadata={"help": "folder for JSON and Markdown"})


@contextlib.contextmanager
def limited(worker: Worker, seconds: float) -> Iterator[Worker]:
    """The worker, which is ended when the time is over: what is asked then is an error."""
    timer = threading.Timer(max(seconds, 1.0), worker.process.kill)
    timer.start()
    try:
        with contextlib.closing(worker):
            yield worker
    finally:
        timer.cancel()


def agreement(settings: GpuBenchmark, left: float) -> tuple[dict[str, Any], list[tuple[str, bool]]]:
    """What the device is, and lines that say whether it computes the same."""
    lines: list[tuple[str, bool]] = []
    with limited(Worker("gpu_sides:Agreement", "agreement", device=settings.device), left) as worker:
        facts = dict(worker.facts)
        for name in FAMILIES:
            facts[name] = _tried(lines, name, lambda: worker.ask("family", name=name), LIMITS)  # noqa: B023
        limits = dict.fromkeys(("causal", "both ways"), ATTENTION_LIMIT)
        facts["attention"] = _tried(lines, "packed attention", lambda: worker.ask("attention"), limits)
    return facts, lines


def _tried(lines: list[tuple[str, bool]], name: str, ask: Any, limits: dict[str, float]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = ask()
    except UserError as error:
        lines.append((f"FAILED: {name}: {error}", False))
        return {"error": str(error)}
    for key, value in found.items():
        met = value <= limits[key]
        lines.append((f"{'met' if met else 'MISSED'}: {name}, {key}: {value:.1e} apart (at most {limits[key]:g})", met))
    return found


def cell(side: str, compiled: bool, preset: str, settings: GpuBenchmark, folder: str, limit: float) -> dict[str, Any]:
    """One side trained at one preset; {"error": why} where it could not be measured."""
    flags = ["--model_config", preset, "--dtype", "auto"]
    rows, seq = ROWS.get(preset, 16), settings.seq
    if settings.smoke:
        flags += ["--hidden_size", "32", "--num_hidden_layers", "2"]
        rows, seq = 2, 32
    ends = time.monotonic() + limit
    while True:
        name = f"{side} {preset}"
        start: dict[str, Any] = {"side": side, "flags": flags, "rows": rows, "seq": seq, "device": settings.device,
                 "compiled": compiled, "folder": folder}  # fmt: skip
        try:
            with limited(Worker("gpu_sides:Side", name, **start), ends - time.monotonic()) as worker:
                worker.ask("steps", seconds=0, least=1)  # three, in which kernels are chosen and compiled
                found = worker.ask("steps", seconds=0 if settings.smoke else 6, least=1)
                return {**worker.facts, **found, "rows": rows, "seq": seq}
        except UserError as error:
            if "OutOfMemory" not in str(error) or rows == 1:
                late = time.monotonic() >= ends
                return {"error": f"not done after {limit:.0f} s" if late else str(error), "rows": rows, "seq": seq}
            rows //= 2
            info(f"[benchmark] {name}: too large for the memory, once more with {rows} rows")


def peak_flops(name: str, measured: float) -> tuple[float, str]:
    """The device's FLOP/s, and where the number comes from."""
    for known, flops in PEAKS.items():
        if all(word in name for word in known.split()):
            return flops, f"{flops / 1e12:.0f} TFLOP/s of the data sheet ({measured / 1e12:.0f} measured)"
    return measured, f"{measured / 1e12:.3g} TFLOP/s of a matrix product measured in this run"


def run(argv: Sequence[str]) -> int:
    (settings,) = parse("benchmarks/gpu.py", __doc__ or "", [GpuBenchmark], argv)
    deadline = time.monotonic() + 60 * settings.minutes - settings.spent
    where = machine()
    facts, lines = agreement(settings, min(90.0, deadline - time.monotonic()))
    for line, _ in lines:
        info(f"[benchmark] {line}")
    peak, peak_text = peak_flops(facts["name"], facts["gemm_flops"])
    sides = [each for each in SIDES if each[0] != "nanogpt" or os.environ.get("NANOGPT_DIR")]
    if settings.smoke:
        sides = [(side, compiled and settings.device != "cpu") for side, compiled in sides[:2]]
    presets = ["small"] if settings.smoke else settings.presets.split(",")
    # Ours and transformers' eager side of every preset first: they compile little.
    order = [(preset, each) for some in (sides[:2], sides[2:]) for preset in presets for each in some]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for preset, (side, compiled) in order:
            left = deadline - time.monotonic()
            found: dict[str, Any] = {"error": "no time was left"}
            if left >= SHORTEST_CELL:
                found = cell(side, compiled, preset, settings, folder, min(left, LONGEST_CELL))
            results.append({"preset": preset, "side": side, "compiled": compiled, **found})
            shown = found.get("error") or f"{median(found['tokens_per_second']):,.0f} tokens/s"
            info(f"[benchmark] {preset} {side} {'compiled' if compiled else 'eager'}: {shown}")
    for result in results:
        if "error" not in result:
            result["mfu"] = median(result["tokens_per_second"]) * result["flops_with_attention"] / peak
    lines += goals(results, settings)
    markdown = page(settings, where, facts, peak_text, lines, results)
    data = {"machine": where, "settings": asdict(settings), "device": facts, "peak_flops": peak, "results": results}
    write_results(settings.results, "gpu", data, markdown)
    return 0 if all(met for _, met in lines) else 1


def goals(results: list[dict[str, Any]], settings: GpuBenchmark) -> list[tuple[str, bool]]:
    """The goals on our utilisation, where it was measured on a GPU."""
    lines = []
    for result in results:
        goal = MFU_GOAL.get(result["preset"])
        if result["side"] == "ours" and goal and "mfu" in result and settings.device != "cpu":
            met = result["mfu"] >= goal
            lines.append((f"{'met' if met else 'MISSED'}: {result['preset']}: {100 * result['mfu']:.0f} % of the "
                          f"device's FLOP/s (goal: {100 * goal:.0f} %)", met))  # fmt: skip
    return lines


def page(
    settings: GpuBenchmark,
    where: dict[str, Any],
    facts: dict[str, Any],
    peak_text: str,
    lines: list[tuple[str, bool]],
    results: list[dict[str, Any]],
) -> str:
    """The Markdown, ready for docs/performance.md."""
    ours = {r["preset"]: median(r["tokens_per_second"]) for r in results if r["side"] == "ours" and "mfu" in r}
    rows = []
    for result in results:
        name = f"{result['side']} {'compiled' if result['compiled'] else 'eager'}"
        if "error" in result:
            rows.append([result["preset"], name, "", result["error"], "", "", ""])
            continue
        rates = result["tokens_per_second"]
        ratio = f"{ours[result['preset']] / median(rates):.2f}" if result["preset"] in ours else ""
        rows.append([
            f"{result['preset']}, {result['parameters'] / 1e6:.0f} M", name, f"{result['rows']} x {result['seq']}",
            spread(rates), f"{100 * result['mfu']:.0f} %", f"{result['peak_bytes'] / 2**30:.1f}", ratio,
        ])  # fmt: skip
    header = ["preset", "side", "rows x tokens", "tokens/s: median (range)", "utilisation", "peak GiB", "ours / side"]
    return "\n\n".join(
        [
            f"# Training on {facts['name']}, {datetime.date.today().isoformat()}",
            f"{machine_line(where)}; CUDA {facts['cuda']}.",
            "Arithmetic of `--dtype auto` (bfloat16 on GPUs that have it) with float32 weights on all sides, fused "
            "AdamW, gradients clipped; utilisation is (6 x parameters + attention's products) x tokens/s, by "
            f"{peak_text}.",
            *(["**Smoke run: the numbers mean nothing.**"] if settings.smoke else []),
            table(header, rows),
            "\n".join(f"- {line}" for line, _ in lines),
        ]
    )


if __name__ == "__main__":
    main(run)
