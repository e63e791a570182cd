"""The arena's page: one table of what was spent, the evaluation's tables, charts, and texts to read."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from minillm.compare import CompareSettings
from minillm.eval import charts
from minillm.eval.comparison import BLANK, KINDS, number, table, tables, texts

CURVES = {"exact": "Learning: bits per byte, exact", "upper_bound": "Learning: bits per byte, upper bounds"}


def markdown(result: dict[str, Any], picture: str) -> str:
    """The whole page. `picture`: the file name of the charts, or nothing."""
    parts = [
        "# The arena: " + ", ".join(_names(result)),
        f"Each was trained from scratch on the same rows in the same order, for {_budget(result)}. Made by:",
        f"    {_command(result)}",
        _spent(result),
    ]
    if len({run["seed"] for run in result["runs"]}) > 1:
        parts += ["## Over the seeds: mean (least to most)", _over_seeds(result)]
    parts.append(tables(result["evaluation"]))
    if picture:
        parts.append(f"![charts]({picture})")
    return "\n\n".join([*parts, *texts(result["evaluation"])]) + "\n"


def summary(result: dict[str, Any]) -> str:
    """For the terminal."""
    return "\n\n".join([_spent(result), _over_seeds(result)])


def draw(result: dict[str, Any], target: Path) -> bool:
    """The picture: learning curves, then the evaluation's charts."""
    curves = []
    models = result["evaluation"]["models"]
    for kind, title in CURVES.items():
        lines = [
            charts.Line(model["checkpoint"]["label"], place, [(tokens / 1e6, bits) for tokens, bits in run["curve"]])
            for place, (run, model) in enumerate(zip(result["runs"], models))
            if model["perplexity"]["likelihood"] == kind and run["curve"]
        ]
        if lines:
            curves.append(charts.Panel(title, lines=lines, x="million tokens"))
    return charts.draw(result["evaluation"], target, before=curves)


def _names(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["name"] for run in result["runs"]))


def _budget(result: dict[str, Any]) -> str:
    kind, _, amount = result["settings"]["budget"].partition(":")
    return f"{amount} {'FLOPs' if kind == 'flops' else kind}"


def _command(result: dict[str, Any]) -> str:
    """As it can be typed: the flags that are not the defaults."""
    defaults = {field.name: field.default for field in fields(CompareSettings)}
    words = ["minillm", "compare"]
    for name, value in result["settings"].items():
        if value != defaults[name]:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _spent(result: dict[str, Any]) -> str:
    header = ("run", "seed", "parameters", "steps", "tokens", "TFLOPs", "FLOPs a token", "minutes", "tokens/s")
    rows = [
        (
            run["name"], str(run["seed"]), f"{run['parameters']:,}", f"{run['steps']:,}", f"{run['tokens']:,}",
            number(run["flops"] / 1e12, 1), number(run["flops"] / run["tokens"] / 1e6, 1) + " M",
            number(run["seconds"] / 60, 1), number(run["tokens"] / run["seconds"], 0),
        )
        for run in [*result["runs"], result["judge"]]
    ]  # fmt: skip
    return "\n\n".join(["## What was spent", table(header, rows)])


def _over_seeds(result: dict[str, Any]) -> str:
    """One row for each arm; kinds of likelihood in columns of their own."""
    models = result["evaluation"]["models"]
    kinds = [kind for kind in KINDS if kind != "none" and any(m["perplexity"]["likelihood"] == kind for m in models)]
    columns: list[tuple[str, int, Callable[[dict[str, Any]], float | None]]] = [
        (f"bits per byte, {'exact' if kind == 'exact' else 'bound'}", 4, _bits_of(kind)) for kind in kinds
    ]
    columns += [
        ("judge, nats a token", 3, lambda model: model["generation"]["judge"]["nats_per_token"]),
        ("unigram entropy", 3, lambda model: model["generation"]["unigram_entropy"]),
        ("that of the text", 3, lambda model: model["generation"]["held_out"]["unigram_entropy"]),
        ("Self-BLEU", 1, lambda model: model["generation"]["self_bleu"]),
    ]
    rows = []
    for name in _names(result):
        own = [model for run, model in zip(result["runs"], models) if run["name"] == name]
        rows.append((name, *(_spread([pick(model) for model in own], digits) for _, digits, pick in columns)))
    return table(("run", *(title for title, _, _ in columns)), rows)


def _bits_of(kind: str) -> Callable[[dict[str, Any]], float | None]:
    def pick(model: dict[str, Any]) -> float | None:
        found = model["perplexity"]
        return found["bits_per_byte"] if found["likelihood"] == kind else None

    return pick


def _spread(values: Sequence[float | None], digits: int) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return BLANK
    mean = number(statistics.fmean(found), digits)
    return mean if len(found) == 1 else f"{mean} ({number(min(found), digits)} to {number(max(found), digits)})"
