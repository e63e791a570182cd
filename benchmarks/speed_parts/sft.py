"""Fine-tuning on real conversations: trained tokens a second, against TRL's SFTTrainer with and without packing.

All sides begin with the same weights, read the same conversations, train the assistant's tokens alone (completion-only
in TRL's terms), in float32 with fused AdamW and clipping, and take steps of as many rows. A row has up to twice
--seq tokens, so that most conversations are whole: a packed row of ours and of TRL's packing, one conversation of TRL
without packing (its default), padded to the longest of its batch. Counted are tokens whose loss is trained: neither
prompts nor padding. Steps are whole ones, with taking the rows and padding; what comes before the first step
(tokenizing, packing, building) is given apart.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

from common import ROOT, Worker, median, preset_config, spread, table

from speed_parts.base import Part, SpeedBenchmark, bars_panel, in_turns, ratio_table, ratios

REAL = ROOT.parent / "shared" / "data" / "sft_mini_512.jsonl"
BAR = 2.0
UNPACKED, PACKED = "TRL", "TRL, packing"
STEPS = 3  # a turn


def conversations(folder: Path, quick: bool) -> Path:
    """The real ones where they lie beside the checkout, else those of the demo world."""
    if REAL.is_file() and not quick:
        return REAL
    from minillm.data.demo import generate_demo

    generate_demo(folder / "demo", size=100 if quick else 2380)
    return folder / "demo" / "sft.jsonl"


def measure(flags: SpeedBenchmark) -> Part:
    # twice the length: most conversations are longer than 256 tokens or close to it
    steps, batch, seq = (1, 4, 128) if flags.quick else (STEPS, flags.batch // 2, 2 * flags.seq)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = conversations(folder, flags.quick)
        count = len(data.read_text(encoding="utf-8").splitlines())
        common = {"folder": str(folder), "data": str(data), "seq": seq, "batch": batch}
        config = preset_config(flags.presets.split(",")[0], seq=seq).to_dict()
        ours = stack.enter_context(closing(Worker("speed_parts.tuners:Ours", "ours", config=config, **common)))
        sides = {"ours": ours}
        for name in (UNPACKED, PACKED):
            peer = Worker("speed_parts.tuners:Trl", name, packing=name == PACKED, **common)
            sides[name] = stack.enter_context(closing(peer))
        filled: dict[str, list[float]] = {name: [] for name in sides}

        def rate(name: str) -> float:
            answer = sides[name].ask("steps", count=steps)
            filled[name].append(answer["trained"] / answer["read"])
            return answer["trained"] / answer["seconds"]

        for name in sides:
            rate(name)  # the first step is slower
        values = in_turns(
            {name: lambda name=name: rate(name) for name in sides},  # type: ignore[misc]
            flags.rounds_or(5),
            "trained tokens/s",
        )
        start = {name: side.facts["seconds"] for name, side in sides.items()}
        memory = {name: side.ask("memory")["peak_mb"] for name, side in sides.items()}
    part = Part(
        "Fine-tuning against TRL",
        f"{count:,} conversations of {data.name}, rows of at most {seq} tokens, {batch} rows a step, float32, "
        f"{ours.facts['threads']} threads; rounds of {steps} steps a side.",
        {"rates": values, "seconds_until_first_step": start, "trained_share": filled, "peak_mb": memory},
    )
    part.bar("trained tokens/s, ours / TRL without packing", ratios(values, "ours", UNPACKED), BAR)
    part.sections = [
        ratio_table(values, "ours", [UNPACKED, PACKED]),
        table(
            ["side", "trained tokens/s: median (range)", "trained of those computed", "s before the first", "peak MiB"],
            [
                [name, spread(values[name]), f"{100 * median(filled[name]):.0f} %", f"{start[name]:.1f}",
                 f"{memory[name]:,.0f}"]
                for name in sides
            ],
        ),
    ]  # fmt: skip
    part.panels = [bars_panel("Trained tokens/s", values)]
    return part
