"""What came out of a pipeline run: table, samples and loss curves, on the terminal and in report.md."""

from __future__ import annotations

import csv
import os
import platform
import shlex
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minillm.atomic import write_atomic, write_text
from minillm.commands import display
from minillm.log import warn
from minillm.stages import STAGES

HEADINGS = ("stage", "val loss before → after", "perplexity", "accuracy", "tokens/s", "minutes", "checkpoint")
BLANK = "–"
# What the last checkpoint is asked: (title, prompt).
CHAT_PROMPTS = (
    ("Instruction", "Please tell a story. Emma and a green lantern should be in it."),
    ("Chinese", "你是谁？"),
    ("Arithmetic", "What is 8 + 7?"),
)
TEXT_PROMPTS = (
    ("Continuation", "One morning, "),
    ("Chinese continuation", "一天早上，"),
    ("Arithmetic continuation", "8 + 7 ="),
)


@dataclass(frozen=True)
class StageResult:
    """One stage that ran, or (without `seconds`) a checkpoint that was found and only evaluated."""

    stage: str
    checkpoint: Path
    run_folder: Path | None
    seconds: float | None = None
    command: str = ""
    evaluation: dict[str, float] = field(default_factory=dict)  # keys loss, perplexity, accuracy


@dataclass(frozen=True)
class Curves:
    """What metrics.csv says: loss curves as (step, value), and the validation values of the weights kept.

    Those are the best evaluation's, because a stage hands on its best checkpoint. The evaluation before the
    first step is where it started from, and never the best.
    """

    training: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    before: float | None = None
    after: float | None = None
    perplexity: float | None = None
    accuracy: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Sample:
    title: str
    prompt: str
    text: str


def read_curves(run_folder: Path | None, stage: str) -> Curves:
    """Read a run folder's metrics.csv; a missing file or column gives empty curves."""
    rows = read_metrics(run_folder) if run_folder is not None else []
    evaluations = [row for row in rows if row.get("val/loss")]
    start = evaluations[0] if evaluations and int(evaluations[0]["step"]) == 0 else {}
    best = min((row for row in evaluations if row is not start), key=lambda row: float(row["val/loss"]), default={})
    speeds = [value for _, value in series(rows, "train/tokens_per_sec")]
    return Curves(
        training=series(rows, "train/loss"),
        validation=series(rows, "val/loss"),
        before=_value(start, "val/loss"),
        after=_value(best, "val/loss"),
        perplexity=None if stage == "rlhf" else _value(best, "val/perplexity"),
        accuracy=_value(best, "val/rewards_accuracies" if stage == "rlhf" else "val/accuracy"),
        tokens_per_second=statistics.median(speeds) if speeds else None,
    )


def read_metrics(run_folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv; none where there is no such file."""
    path = run_folder / "metrics.csv"
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _value(row: dict[str, str], column: str) -> float | None:
    return float(row[column]) if row.get(column) else None


def series(rows: Sequence[dict[str, str]], column: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have one."""
    return [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]


def table_row(result: StageResult) -> tuple[str, ...]:
    """The cells of one stage, in the order of HEADINGS."""
    curves = read_curves(result.run_folder, result.stage)
    measured = result.evaluation
    if result.seconds is not None:
        after, perplexity, accuracy = curves.after, curves.perplexity, curves.accuracy
    else:
        after, perplexity, accuracy = (measured.get(name) for name in ("loss", "perplexity", "accuracy"))
    shown = _percent(accuracy) + (" (reward)" if result.stage == "rlhf" and accuracy is not None else "")
    return (
        result.stage if result.seconds is not None else f"{result.stage} (found)",
        f"{_number(curves.before, 4)} → {_number(after, 4)}",
        _number(perplexity, 2),
        shown,
        _number(curves.tokens_per_second, 0),
        _number(None if result.seconds is None else result.seconds / 60, 1),
        display(result.checkpoint),
    )


def _number(value: float | None, digits: int) -> str:
    return BLANK if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return BLANK if value is None else f"{100 * value:.1f} %"


def text_table(rows: Sequence[tuple[str, ...]]) -> str:
    """The table for a terminal: numbers to the right, words to the left."""
    lines = [HEADINGS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    left = {0, len(HEADINGS) - 1}
    text = [
        "  ".join(
            cell.ljust(w) if column in left else cell.rjust(w) for column, (cell, w) in enumerate(zip(line, widths))
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in [text[0], "  ".join("-" * w for w in widths), *text[1:]])


def markdown_table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = [HEADINGS, ("---",) + ("---:",) * (len(HEADINGS) - 2) + ("---",), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def generate_samples(
    result: StageResult, run: Sequence[str], new_tokens: int, prompts: Sequence[tuple[str, str]] = ()
) -> list[Sample]:
    """Ask the checkpoint the prompts (default: fixed ones), greedily, through `minillm generate`.

    A failure becomes the sample's text: the report is worth having all the same.
    """
    prompts = prompts or (TEXT_PROMPTS if result.stage == "pretrain" else CHAT_PROMPTS)
    samples = []
    for title, prompt in prompts:
        command = [*run, "generate", "--checkpoint", str(result.checkpoint), "--prompt", prompt]
        command += ["--max_new_tokens", str(new_tokens), "--temperature", "0"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
        text = done.stdout.strip()
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            warn(f"no sample for '{prompt}': {shlex.join(command)} failed: {reason}")
            text = f"(generation failed: {reason})"
        samples.append(Sample(title, prompt, text or "(an empty answer)"))
    return samples


def draw_curves(result: StageResult, target: Path) -> bool:
    """Draw training and validation loss over steps; False when there is nothing to draw or no matplotlib."""
    curves = read_curves(result.run_folder, result.stage)
    if not curves.training and not curves.validation:
        return False
    try:
        import matplotlib
    except ImportError:
        warn("loss curves need matplotlib: pip install 'minillm-trainer[report]'")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    if curves.training:
        axes.plot(*zip(*curves.training), color="#9db4c8", linewidth=1.2, label="training")
    if curves.validation:
        axes.plot(
            *zip(*curves.validation),
            color="#b3431f",
            linewidth=1.8,
            marker="o",
            markersize=4,
            label="validation",
        )
    axes.set_title(f"{STAGES[result.stage].title}: loss")
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("DPO loss" if result.stage == "rlhf" else "cross-entropy (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_atomic(target, lambda beside: figure.savefig(beside, dpi=130, format="png"))
    pyplot.close(figure)
    return True


def write_report(
    results: Sequence[StageResult],
    out_dir: Path,
    *,
    run: Sequence[str],
    remarks: Sequence[str] = (),
    new_tokens: int = 96,
    prompts: Sequence[tuple[str, str]] = (),
) -> Path:
    """Print table and samples; write report.md and one loss_*.png a stage. Returns report.md's path.

    `run`: the words in front of a minillm command, as ("python", "-m", "minillm"). `prompts`: (title, prompt) of
    the samples; none: questions of the demo world.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    rows = [table_row(result) for result in results]
    samples = generate_samples(results[-1], run, new_tokens, prompts)
    pictures = {}
    for result in results:
        target = out_dir / f"loss_{result.stage}.png"
        if draw_curves(result, target):
            pictures[result.stage] = target.name
    report = out_dir / "report.md"
    write_text(report, _markdown(results, rows, samples, pictures, remarks))

    print(f"\n{text_table(rows)}\n", flush=True)
    for sample in samples:
        print(f"[sample] {sample.title}: {sample.prompt}\n{sample.text}\n", flush=True)
    print(f"[report] {display(report)}", flush=True)
    return report


def _markdown(
    results: Sequence[StageResult],
    rows: Sequence[tuple[str, ...]],
    samples: Sequence[Sample],
    pictures: dict[str, str],
    remarks: Sequence[str],
) -> str:
    parts = ["# Report", markdown_table(rows)]
    parts.append(
        "Values are those of the checkpoint that a stage hands on: the best on the validation data."
        " Losses are means over that data, in nats per trained token. For preference tuning they"
        " are DPO losses, the accuracy is the share of pairs whose chosen answer is rewarded more, and there"
        " is no perplexity."
    )
    parts += remarks
    parts.append(f"## Samples\n\nGreedy, from `{display(results[-1].checkpoint)}`.")
    parts += [f"### {sample.title}\n\n{_fenced(sample.prompt)}\n\n{_fenced(sample.text)}" for sample in samples]
    if pictures:
        parts.append("## Loss curves")
        parts += [f"![{STAGES[stage].title}]({name})" for stage, name in pictures.items()]
    parts.append("## Environment\n\n" + "\n".join(f"- {line}" for line in environment_lines()))
    commands = [result.command for result in results if result.command]
    parts.append("## Commands\n\n" + _fenced("\n".join(commands), "sh"))
    return "\n\n".join(parts) + "\n"


def _fenced(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def environment_lines() -> list[str]:
    """Versions and hardware, without importing torch."""
    from importlib.metadata import PackageNotFoundError, version

    lines = [f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in ("minillm-trainer", "torch", "tokenizers", "numpy"):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name}: not installed as a package")
    return [*lines, f"{os.cpu_count()} CPU cores"]
