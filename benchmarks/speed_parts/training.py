"""Training: tokens a second and utilisation of every preset, family and kind, eager and compiled, against transformers
and, where NANOGPT_DIR, LITGPT_DIR or MINIMIND_DIR names a checkout, against these.

Ours is the step of the training loop. All sides: float32, the same rows, fused AdamW, gradients clipped to norm 1.
Eager and compiled processes are measured one group after the other; within a group one trains while the others sleep.
Utilisation is 6 x parameters that a token passes through x tokens/s, by the FLOP/s of a 1024 x 1024 matrix product
measured in every round. (SDD asks the model what it believes before it trains, which that does not count.)
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from common import CHECKOUTS, Worker, Workload, bar_line, checkout, median, preset_config, spread, table, worker

from minillm.families import FAMILIES
from minillm.log import UserError, info
from minillm.train.precision import choose_dtype
from speed_parts.base import Part, SpeedBenchmark, bars_panel, in_turns, ratios

BARS = {"eager": 1.3, "compiled": 1.2}
LITGPT_BAR = 1.0
MEMORY_BAR = 0.6
KINDS, MODES = ("dense", "moe"), ("eager", "compiled")
STEPS = 2  # a turn


def listed(text: str, flag: str, known: tuple[str, ...]) -> list[str]:
    """The names in a flag. Raises UserError for one that is not known."""
    names = text.split(",")
    if wrong := [name for name in names if name not in known]:
        raise UserError(f"--{flag}: {wrong[0]!r} is not one of {', '.join(known)}")
    return names


def measure(flags: SpeedBenchmark) -> Part:
    families = listed(flags.families, "families", tuple(FAMILIES))
    kinds = listed(flags.kinds, "kinds", KINDS)
    seq, batch = (32, 2) if flags.quick else (flags.seq, flags.batch)
    part = Part("Training", f"Sequence {seq}, {batch} rows a step, float32, AdamW; rounds of {STEPS} steps a side.", {})
    cells = [
        (preset, family, kind, mode)
        for preset in flags.presets.split(",")
        for family in families
        for kind in kinds
        for mode in listed(flags.modes, "modes", MODES)
    ]
    results: list[dict[str, Any]] = []
    for preset, family, kind, mode in cells:
        config = preset_config(
            preset, seq=seq, use_moe=kind == "moe", causal=family == "ar", denoiser="aggregate" * (family == "sdd")
        ).to_dict()
        compiled = mode == "compiled"
        base = Workload(side="ours", config=config, seq=seq, rows=batch, family=family, compiled=compiled)
        sides = measure_cell(base, flags.rounds_or(5))
        results.append({"preset": preset, "family": family, "kind": kind, "mode": mode, "sides": sides})
        _judge(part, f"{preset} {family} {kind} {mode}", mode, sides, on_bar=(preset, kind) == ("small", "dense"))
    part.data = {"results": results}
    rows = [
        [
            f"{cell['preset']} {cell['family']} {cell['kind']} {cell['mode']}", name,
            spread(cell["sides"]["ours"]["ratio"][name], 2) if name in cell["sides"]["ours"]["ratio"] else "",
            spread(side["tokens_per_second"]), f"{100 * side['utilisation']:.0f} %",
            f"{side['parameters'] / 1e6:.1f} M", f"{side['peak_mb']:,.0f}", f"{side['first_step_seconds']:.1f}",
        ]
        for cell in results
        for name, side in cell["sides"].items()
    ]  # fmt: skip
    header = ["model", "side", "ours / side", "tokens/s: median (range)", "utilisation", "parameters", "peak MiB",
              "first step s"]  # fmt: skip
    part.sections = [table(header, rows)]
    for cell in results:
        title = f"Tokens/s: {cell['preset']} {cell['family']} {cell['kind']} {cell['mode']}"
        values = {name: side["tokens_per_second"] for name, side in cell["sides"].items()}
        part.panels.append(bars_panel(title, values))
    return part


def workloads(base: Workload) -> dict[str, Workload]:
    """Ours, ours in the number format that it takes by itself (if another), and the peers that have such a model."""
    found = {"ours": base}
    if base.family != "ar":
        return found
    if choose_dtype("auto", torch.device("cpu")) != torch.float32:
        found["ours, --dtype auto"] = replace(base, dtype="auto")
    found["transformers"] = replace(base, side="transformers")
    for side in CHECKOUTS:
        if checkout(side) and not base.config["use_moe"]:
            found[side] = replace(base, side=side)
    return found


def measure_cell(base: Workload, rounds: int) -> dict[str, Any]:
    """Each side's rates by round, utilisation and memory; under ours the ratios."""
    with ExitStack() as stack:
        processes: dict[str, Worker] = {}
        first: dict[str, float] = {}
        for name, workload in workloads(base).items():
            processes[name] = stack.enter_context(worker(workload))
            first[name] = processes[name].steps(2)["seconds"][0]
            info(f"[benchmark] {name}: first step {first[name]:.1f} s")
        gemm: list[float] = []

        def rate(name: str) -> float:
            if name == "ours":
                gemm.append(processes[name].ask("gemm")["flops"])
            return STEPS * base.tokens_per_step / sum(processes[name].steps(STEPS)["seconds"])

        values = in_turns({name: lambda name=name: rate(name) for name in processes}, rounds, "tokens/s")  # type: ignore[misc]
        sides: dict[str, Any] = {
            name: {
                **process.facts,
                "tokens_per_second": values[name],
                "first_step_seconds": first[name],
                "peak_mb": process.ask("memory")["peak_mb"],
                "utilisation": median(values[name]) * process.facts["flops_per_token"] / median(gemm),
            }
            for name, process in processes.items()
        }
    sides["ours"]["gemm_flops"] = gemm
    sides["ours"]["ratio"] = {name: ratios(values, "ours", name) for name in values if name != "ours"}
    return sides


def _judge(part: Part, cell: str, mode: str, sides: dict[str, Any], *, on_bar: bool) -> None:
    """The bars of one cell."""
    found = sides["ours"]["ratio"]
    if not on_bar or "transformers" not in found:
        return
    part.bar(f"{cell}: tokens/s, ours / transformers", found["transformers"], BARS[mode])
    if "litgpt" in found and mode == "compiled":
        part.bar(f"{cell}: tokens/s, ours / LitGPT", found["litgpt"], LITGPT_BAR)
    if mode == "eager":
        memory = sides["ours"]["peak_mb"] / sides["transformers"]["peak_mb"]
        part.bars.append(bar_line(f"{cell}: peak memory, ours / transformers", memory, MEMORY_BAR, at_least=False))
