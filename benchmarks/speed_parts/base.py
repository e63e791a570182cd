"""What the parts of benchmarks/speed.py share: the flags, what a part hands back, and rounds in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common import RESULTS, bar_line, median, spread, table

from minillm.eval.charts import Bar, Panel
from minillm.log import info

PARTS = ("training", "generation", "sft", "checkpoints", "startup", "growth")

MOST_SHOWN = 12  # sides in the line of a round


@dataclass(frozen=True)
class SpeedBenchmark:
    """Speed, in one place"""

    parts: str = field(default=",".join(PARTS), metadata={"help": "parts, separated by commas"})
    rounds: int = field(default=0, metadata={"help": "rounds in which every side takes its turn (default: the part's)"})
    presets: str = field(default="small", metadata={"help": "training: presets, separated by commas"})
    families: str = field(default="ar", metadata={"help": "training: ar, diffusion, sdd, separated by commas"})
    kinds: str = field(default="dense", metadata={"help": "training: dense, moe or both"})
    modes: str = field(default="eager,compiled", metadata={"help": "training: eager, compiled or both"})
    seq: int = field(default=256, metadata={"help": "tokens a row", "min": 8})
    batch: int = field(default=16, metadata={"help": "rows a step", "min": 1})
    check: bool = field(default=False, metadata={"help": "exit with 1 where a bar is missed"})
    quick: bool = field(default=False, metadata={"help": "tiny sizes: shows that it runs, measures nothing"})
    results: str = field(default=RESULTS, metadata={"help": "folder for JSON, Markdown and PNG"})

    def rounds_or(self, default: int) -> int:
        """As the flag says, else one where it is only to run, else `default`."""
        return self.rounds or (1 if self.quick else default)


@dataclass
class Part:
    """What a part found. Bars are (line, met); `sections` is Markdown that follows them."""

    title: str
    conditions: str
    data: dict[str, Any]
    bars: list[tuple[str, bool]] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)

    def bar(self, name: str, values: Sequence[float], bar: float, *, at_least: bool = True, digits: int = 2) -> None:
        """A bar on the median of the values, one a round."""
        line, met = bar_line(name, median(values), bar, at_least=at_least)
        self.bars.append((f"{line}; by round {min(values):.{digits}f} to {max(values):.{digits}f}", met))


def in_turns(sides: Mapping[str, Callable[[], float]], rounds: int, unit: str) -> dict[str, list[float]]:
    """The value of each side in every round. Every other round goes backwards: nobody always follows the same one."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            values[name].append(sides[name]())
        shown = ", ".join(f"{name} {each[-1]:,.4g}" for name, each in values.items())
        info(f"[benchmark] round {number + 1}/{rounds}: {shown if len(sides) <= MOST_SHOWN else '(many)'} {unit}")
    return values


def ratios(values: Mapping[str, Sequence[float]], ours: str, theirs: str) -> list[float]:
    """Ours over theirs, round by round."""
    return [mine / other for mine, other in zip(values[ours], values[theirs])]


def ratio_table(values: Mapping[str, Sequence[float]], ours: str, others: Sequence[str]) -> str:
    """The ratio to each of the others."""
    rows = [[f"{ours} / {other}", spread(ratios(values, ours, other), 2)] for other in others]
    return table(["ratio", "median (least-most)"], rows)


def bars_panel(title: str, values: Mapping[str, Sequence[float]]) -> Panel:
    """The medians as bars, with the least and the most of the rounds."""
    bars = []
    for place, (name, each) in enumerate(values.items()):
        middle = median(each)
        bars.append(Bar(name, place, middle, (middle - min(each), max(each) - middle) if len(each) > 1 else None))
    return Panel(title, bars)
