"""What a checkpoint costs: how long training stands still for it, and how fast bytes reach the disk.

Every side saves the same weights and optimizer state, of preset medium after real steps: ours as the training loop does
(`minillm.train.saving.save`), the others as torch.save, torch.distributed.checkpoint's save and its async_save. A turn
takes steps without a save, then a save and as many steps: the stall is what the second lasts longer, so that a write in
the background pays for the steps it slows down. Bandwidth is the state's bytes by the seconds until the file is
complete, with nothing else to do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from common import Worker, median, spread, table

from minillm.data.demo import generate_demo
from speed_parts.base import Part, SpeedBenchmark, bars_panel, in_turns, ratio_table

BAR = 0.02
SECONDS_BETWEEN = 60.0
PEERS = ("torch.save", "DCP save", "DCP async_save")


def measure(flags: SpeedBenchmark) -> Part:
    rows, seq = (2, 32) if flags.quick else (4, flags.seq)
    preset = "small" if flags.quick else "medium"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        generate_demo(folder, size=300)
        workers = {
            side: stack.enter_context(
                closing(Worker("speed_parts.savers:Saver", side, folder=str(folder), preset=preset, seq=seq, rows=rows))
            )
            for side in ("ours", "peers")
        }
        ways = ("ours", *PEERS)
        saved: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}

        def turn(way: str) -> Callable[[], float]:
            def save() -> float:
                answer = workers["ours" if way == "ours" else "peers"].ask("save", way=way)
                saved[way].append(answer)
                return answer["stall"]

            return save

        stalls = in_turns({way: turn(way) for way in ways}, flags.rounds_or(5), "s of stall")
        size = workers["ours"].facts["bytes"]
    rates = {way: [size / 1e6 / each["complete"] for each in answers] for way, answers in saved.items()}
    calls = {way: [each["call"] for each in answers] for way, answers in saved.items()}
    part = Part(
        "Checkpoints",
        f"Preset {preset}: {size / 2**20:,.0f} MiB of weights and optimizer state; steps of {rows} rows of {seq} "
        f"tokens, {median([each['step'] for each in saved['ours']]):.2f} s each; "
        f"{workers['ours'].facts['threads']} threads.",
        {"bytes": size, "stall_seconds": stalls, "turns": saved},
    )
    part.bar(
        f"share of the training time that stands still at one save every {SECONDS_BETWEEN:.0f} s",
        [stall / SECONDS_BETWEEN for stall in stalls["ours"]],
        BAR,
        at_least=False,
        digits=3,
    )
    part.sections = [
        ratio_table({way: [max(each, 1e-3) for each in stalls[way]] for way in ways}, "ours", PEERS),
        table(
            ["way", "stall s: median (range)", "of 60 s", "the call itself s", "MB/s until complete"],
            [
                [way, spread(stalls[way], 2), f"{100 * median(stalls[way]) / SECONDS_BETWEEN:.2f} %",
                 spread(calls[way], 2), spread(rates[way])]
                for way in ways
            ],
        ),
    ]  # fmt: skip
    part.panels = [bars_panel("Stall of a save in seconds", stalls), bars_panel("MB/s until complete", rates)]
    return part
