"""The results of `minillm evaluate` as one picture of side-by-side charts. matplotlib is in the extra `report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minillm.atomic import write_atomic
from minillm.eval.comparison import by_kind, labels
from minillm.log import warn

COLUMNS = 2
Value = tuple[float | None, float | None, float | None]  # value, standard error, that of the held-out text
KIND_TITLES = {"exact": "Bits per byte, exact", "upper_bound": "Bits per byte, upper bounds"}


class Bar(NamedTuple):
    label: str
    place: int  # of the model: its colour
    value: float
    error: float | tuple[float, float] | None = None  # to both sides, or below and above
    mark: float | None = None  # the held-out text's value


class Line(NamedTuple):
    label: str
    place: int
    points: list[tuple[float, float]]


class Panel(NamedTuple):
    title: str
    bars: Sequence[Bar] = ()
    lines: Sequence[Line] = ()
    x: str = ""
    start: float = 0.0  # of the axis of bars
    logarithmic: bool = False  # both axes: a power is a straight line


def panels(result: dict[str, Any]) -> list[Panel]:
    """What there is to draw. Each kind of likelihood, and each kind of prediction, has a chart of its own."""
    models = result["models"]
    names = labels(models)

    def bars(value: Callable[[dict[str, Any]], Value], section: str) -> list[Bar]:
        found = [(place, value(model[section])) for place, model in enumerate(models) if model[section]]
        return [
            Bar(names[place], place, shown, error, mark) for place, (shown, error, mark) in found if shown is not None
        ]

    drawn = []
    for kind, places in by_kind(models).items():
        if kind in KIND_TITLES:
            sections = [(place, models[place]["perplexity"]) for place in places]
            drawn.append(
                Panel(
                    KIND_TITLES[kind],
                    [
                        Bar(names[place], place, each["bits_per_byte"], each["bits_per_byte_standard_error"])
                        for place, each in sections
                        if each["bits_per_byte"] is not None
                    ],
                )
            )
    drawn.append(Panel("Accuracy of the next token", bars(_accuracy_of("next"), "accuracy")))
    drawn.append(Panel("Accuracy of hidden tokens", bars(_accuracy_of("hidden"), "accuracy")))
    drawn.append(Panel("Accuracy by share that is hidden", lines=_by_level(models, names), x="hidden share"))
    drawn.append(
        Panel(
            "Unigram entropy in nats (line: held-out text)",
            bars(lambda s: (s["unigram_entropy"], None, s["held_out"]["unigram_entropy"]), "generation"),
        )
    )
    drawn.append(Panel("Judge, nats per token (line: held-out text)", bars(_judged, "generation")))
    drawn.append(
        Panel("New tokens/s, batch 1", bars(lambda s: (s["batch_1"]["tokens_per_second"], None, None), "speed"))
    )
    drawn.append(
        Panel("New tokens/s, saturated", bars(lambda s: (s["saturated"]["tokens_per_second"], None, None), "speed"))
    )
    curves: tuple[tuple[str, Callable[[dict[str, Any]], float | None]], ...] = (
        ("Judge, nats per token, by steps", lambda point: point["judge"] and point["judge"]["nats_per_token"]),
        ("Unigram entropy in nats, by steps", lambda point: point["unigram_entropy"]),
    )
    for title, pick in curves:
        drawn.append(Panel(title, lines=_by_steps(models, names, pick), x="steps"))
    return [panel for panel in drawn if panel.bars or panel.lines]


def _accuracy_of(predicts: str) -> Callable[[dict[str, Any]], Value]:
    def value(section: dict[str, Any]) -> Value:
        return (section["accuracy"] if section["predicts"] == predicts else None), section["standard_error"], None

    return value


def _judged(section: dict[str, Any]) -> Value:
    own, held_out = section["judge"], section["held_out"]["judge"]
    if not own:
        return None, None, None
    return own["nats_per_token"], own["standard_error"], held_out["nats_per_token"]


def _by_level(models: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Line]:
    lines = []
    for place, model in enumerate(models):
        levels = model["accuracy"]["by_level"] if model["accuracy"] else []
        points = [
            ((level["hidden_from"] + level["hidden_to"]) / 2, level["accuracy"])
            for level in levels
            if level["accuracy"] is not None
        ]
        if points:
            lines.append(Line(names[place], place, points))
    return lines


def _by_steps(
    models: Sequence[dict[str, Any]], names: Sequence[str], pick: Callable[[dict[str, Any]], float | None]
) -> list[Line]:
    lines = []
    for place, model in enumerate(models):
        found = [(point["steps"], pick(point)) for point in (model["speed"] or {}).get("quality_by_steps", [])]
        points = [(float(steps), value) for steps, value in found if value is not None]
        if points:
            lines.append(Line(names[place], place, points))
    return lines


def draw(result: dict[str, Any], target: Path, before: Sequence[Panel] = ()) -> bool:
    """Write the picture, with other panels before its own; False where there is nothing to draw or no matplotlib
    (which is said)."""
    wanted = [*before, *panels(result)]
    if not wanted:
        return False
    return draw_panels(wanted, target, rows=len(result["models"]))


def draw_panels(wanted: Sequence[Panel], target: Path, *, rows: int) -> bool:
    """Write the picture of these panels, high enough for `rows` bars each; False where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        warn("charts need matplotlib: pip install 'minillm-trainer[report]'")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = -(-len(wanted) // COLUMNS)
    height = max(2.4, 1.1 + 0.35 * rows)
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=(12, height * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(wanted) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, wanted):
        _draw_panel(axis, panel)
    try:
        write_atomic(target, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    finally:
        pyplot.close(figure)
    return True


def _draw_panel(axis: Any, panel: Panel) -> None:
    axis.set_title(panel.title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    for line in panel.lines:
        axis.plot(*zip(*line.points), color=f"C{line.place % 10}", marker="o", markersize=4, label=line.label)
    if panel.lines:
        axis.set_xlabel(panel.x)
        if panel.logarithmic:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            for each in (axis.xaxis, axis.yaxis):
                each.set_major_formatter("{x:g}")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
        return
    for row, bar in enumerate(panel.bars):
        error = [[each] for each in bar.error] if isinstance(bar.error, tuple) else bar.error
        axis.barh(row, bar.value, xerr=error, color=f"C{bar.place % 10}", height=0.6, capsize=3)
        if bar.mark is not None:
            axis.plot([bar.mark, bar.mark], [row - 0.4, row + 0.4], color="black", linewidth=1.5)
    axis.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars])
    axis.set_ylim(max(len(panel.bars), 2) - 0.5, -0.5)  # the first on top, and no bar as thick as the chart
    axis.set_xlim(left=panel.start)
