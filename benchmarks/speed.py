"""Speed, in one place: ours beside its peers, in the same rounds.

    python benchmarks/speed.py --parts training,generation --check

Parts: training (tokens/s, against transformers and, with NANOGPT_DIR, LITGPT_DIR or MINIMIND_DIR set to a checkout,
against these), generation, sft (against TRL), checkpoints (against torch.save and DCP), startup, growth. Each writes
speed-PART.json, .md and .png. --quick runs everything at sizes that measure nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from common import machine, machine_line, main, write_results
from speed_parts.base import PARTS, Part, SpeedBenchmark

from minillm.config import parse
from minillm.eval.charts import draw_panels
from minillm.log import UserError, info


def page(part: Part, where: str) -> str:
    """The part's Markdown, ratios and bars first."""
    lines = "\n".join(f"- {line}" for line, _ in part.bars)
    return "\n\n".join(filter(None, [f"# {part.title}", where, part.conditions, lines, *part.sections]))


def run(argv: Sequence[str]) -> int:
    (settings,) = parse("benchmarks/speed.py", __doc__ or "", [SpeedBenchmark], argv)
    names = [name for name in settings.parts.split(",") if name]
    if wrong := [name for name in names if name not in PARTS]:
        raise UserError(f"--parts: {wrong[0]!r} is not one of {', '.join(PARTS)}")
    all_met = True
    for name in names:
        info(f"[benchmark] {name}")
        facts = machine()
        part: Part = import_module(f"speed_parts.{name}").measure(settings)
        data = {
            "machine": facts,
            "settings": asdict(settings),
            "bars": [{"line": line, "met": met} for line, met in part.bars],
            **part.data,
        }
        write_results(settings.results, f"speed-{name}", data, page(part, machine_line(facts)))
        if part.panels:
            rows = max(len(panel.bars) for panel in part.panels)
            draw_panels(part.panels, Path(settings.results) / f"speed-{name}.png", rows=max(rows, 6))
        all_met &= all(met for _, met in part.bars)
    return 1 if settings.check and not all_met else 0


if __name__ == "__main__":
    main(run)
