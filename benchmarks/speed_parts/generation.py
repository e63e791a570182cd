"""Generation: new tokens a second at batch 1 and 16, against transformers' generate; diffusion with its cache of
finished blocks and without.

All sides have the same weights and prompts and take the most probable token, and nothing stops a text, so the
autoregressive ones must write the same. Seconds are those of a whole call, the prompt's reading included.

Diffusion writes block after block, one token a step. Cached: what stands before the block under way is read once.
Reread: the same model, blocks and steps, but every step reads the whole row. A model trained with --diffusion_block
never looks ahead of a block, so that both must write the same; that is the comparison that has the bar. For models that
look at everything the cache is an approximation. Whole: no blocks, every step reads prompt and canvas.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

from common import Worker, preset_config, spread, table

from speed_parts.base import Part, SpeedBenchmark, bars_panel, in_turns, ratio_table, ratios

BARS = {1: 2.5, 16: 1.5}
BLOCK_BAR = 3.0
PEERS = {"transformers, dynamic cache": "dynamic", "transformers, static cache, compiled": "static"}


def measure(flags: SpeedBenchmark) -> Part:
    """Both halves."""
    part = Part("Generation", "", {})
    prompt, new = (16, 8) if flags.quick else (flags.seq // 2, flags.seq // 2)
    _autoregressive(flags, part, prompt, new)
    _diffusion(flags, part, prompt, new)
    return part


def _autoregressive(flags: SpeedBenchmark, part: Part, prompt: int, new: int) -> None:
    config = preset_config(flags.presets.split(",")[0], seq=prompt + new).to_dict()
    rates: dict[int, dict[str, list[float]]] = {}
    same: dict[str, float] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        exported = str(Path(folder) / "exported")
        ours = stack.enter_context(
            closing(Worker("speed_parts.writers:Ours", "ours", config=config, folder=exported, prompt=prompt))
        )
        sides = {"ours": ours}
        for name, cache in PEERS.items():
            peer = Worker("speed_parts.writers:Transformers", name, folder=exported, cache=cache, prompt=prompt)
            sides[name] = stack.enter_context(closing(peer))
        for batch in (1, 16):
            texts = {name: side.ask("write", batch=batch, new=new)["tokens"] for name, side in sides.items()}
            for name in PEERS:
                same[f"{name}, batch {batch}"] = _agreement(texts["ours"], texts[name])

            def rate(side: Worker, batch: int = batch) -> float:
                return batch * new / side.ask("write", batch=batch, new=new)["seconds"]

            rates[batch] = in_turns(
                {name: lambda side=side: rate(side) for name, side in sides.items()},  # type: ignore[misc]
                flags.rounds_or(7 if batch == 1 else 5),
                f"new tokens/s at batch {batch}",
            )
        bandwidth = ours.ask("bandwidth")["bytes_per_second"] / ours.facts["bytes"]
    for batch, values in rates.items():
        part.bar(
            f"batch {batch}: new tokens/s, ours / transformers' dynamic cache",
            ratios(values, "ours", next(iter(PEERS))),
            BARS[batch],
        )
        part.sections.append(f"## Batch {batch}\n\n" + ratio_table(values, "ours", list(PEERS)))
        part.sections.append(
            table(["side", "new tokens/s: median (range)"], [[name, spread(each)] for name, each in values.items()])
        )
        part.panels.append(bars_panel(f"New tokens/s, batch {batch}", values))
    part.sections.append(
        f"Memory allows {bandwidth:,.0f} tokens/s at batch 1: all weights read once a token, as fast as a sum reads. "
        f"Share of tokens that are ours: {', '.join(f'{name} {share:.3f}' for name, share in same.items())}."
    )
    part.conditions = f"{prompt} prompt tokens, {new} new ones, float32, {ours.facts['threads']} threads, greedy."
    part.data["autoregressive"] = {"rates": rates, "same_tokens": same, "bandwidth_tokens_per_second": bandwidth}


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of positions with the same token."""
    pairs = [(a, b) for mine, other in zip(ours, theirs) for a, b in zip(mine, other)]
    return sum(a == b for a, b in pairs) / max(1, len(pairs))


def _diffusion(flags: SpeedBenchmark, part: Part, prompt: int, new: int) -> None:
    block = 4 if flags.quick else 32
    config = preset_config(flags.presets.split(",")[0], seq=prompt + new, causal=False).to_dict()
    ways = ("causal, cached", "causal, reread", "cached", "reread", "whole")
    with closing(
        Worker("speed_parts.writers:Diffusers", "diffusion", config=config, block=block, prompt=prompt)
    ) as worker:
        texts = {way: worker.ask("write", way=way, new=new)["tokens"] for way in ways[:2]}

        def rate(way: str) -> float:
            return new / worker.ask("write", way=way, new=new)["seconds"]

        values = in_turns(
            {way: lambda way=way: rate(way) for way in ways},  # type: ignore[misc]
            flags.rounds_or(3),
            "new tokens/s of diffusion",
        )
    same = _agreement(texts[ways[0]], texts[ways[1]])
    exact = ratios(values, *ways[:2])
    part.bar("diffusion: new tokens/s, blocks cached / reread, the same text", exact, BLOCK_BAR)
    part.bars.append((f"{'met' if same == 1 else 'MISSED'}: the same tokens, share {same:.3f} (bar: 1)", same == 1))
    part.sections += [
        f"## Diffusion: one text, blocks of {block}, a token a step",
        table(
            ["ratio", "median (least-most)"],
            [
                ["cached / reread, a model that never looks ahead of a block", spread(exact, 2)],
                ["cached / reread, a model that looks at everything", spread(ratios(values, "cached", "reread"), 2)],
                ["cached / whole, the same model", spread(ratios(values, "cached", "whole"), 2)],
            ],
        ),
        table(["way", "new tokens/s: median (range)"], [[way, spread(each, 1)] for way, each in values.items()]),
    ]
    part.panels.append(bars_panel("Diffusion, new tokens/s", values))
    part.data["diffusion"] = {"rates": values, "same_tokens": same}
