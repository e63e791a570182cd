"""What makes sparse-distribution diffusion better than masked diffusion, and how it should write.

    python experiments/sdd.py --data_path ../shared/data/pretrain_en.jsonl.gz \
        --validation_data ../shared/data/pretrain_en_val.jsonl

Six parts (--parts takes some of them): `settings` trains SDD with one setting changed at a time, beside diffusion;
`main` trains both families at equal parameters, tokens and steps with several seeds; `writing` lets the models of
its first seed write in different ways; `steps` gives those of all seeds fewer steps; `draws` lets them write in 16
steps, each time drawn anew; `temperature` lets them, and the judge, write at several temperatures. All texts are read
by one judge, an AR model with a seed of its own. Runs that are complete are not repeated. Writes sdd.json, tables
(sdd_tables.md) and charts (sdd.png) into --out_dir.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minillm.atomic import write_text
from minillm.cli import main as command_line
from minillm.commands import PROGRAM, say
from minillm.compare import CompareSettings
from minillm.compare.arena import JUDGE, Arm, Run, evaluate_settings, train
from minillm.config import parse
from minillm.eval import charts
from minillm.eval.comparison import number, table
from minillm.eval.models import evaluate

PARTS = ("settings", "main", "writing", "steps", "draws", "temperature")
FRESH = "fresh-beliefs"  # first word of a training process in which beliefs never are older than what is shown
DIFFUSION = Arm("diffusion", ("--architecture", "diffusion"))
STEPS = (2, 4, 8, 16, 32, 64)
DRAWS = (1000, 2000, 3000, 4000)  # seeds of writing: far enough apart that no two texts share their noise
JUDGE_SEED = 1003
KEPT = (0, 0.25, 0.5, 0.75, 1)
TEMPERATURES = (0.9, 0.95, 1.0, 1.05)
Texts = dict[str, Any]
Way = Callable[[Any, Any], tuple[Any, Any]]  # (family, sampling) -> what to write with


@dataclass(frozen=True)
class Experiment:
    """SDD beside masked diffusion"""

    data_path: str = field(metadata={"help": "training text"})
    validation_data: str = field(metadata={"help": "held-out text"})
    parts: str = field(default=",".join(PARTS), metadata={"help": f"of {','.join(PARTS)} (default: all)"})
    steps: int = field(default=1000, metadata={"help": "training steps of main and the judge", "min": 10})
    settings_steps: int = field(default=400, metadata={"help": "training steps of each run of settings", "min": 10})
    seeds: str = field(default="1,2,3", metadata={"help": "of main; settings takes the first"})
    hidden_size: int = field(default=128, metadata={"help": "width", "min": 8})
    num_hidden_layers: int = field(default=4, metadata={"help": "layers", "min": 1})
    num_samples: int = field(default=64, metadata={"help": "texts that each model writes", "min": 2})
    train_args: str = field(default="--learning_rate 4e-3", metadata={"help": "further flags of minillm pretrain"})
    out_dir: str = field(default="out/experiments/sdd", metadata={"help": "runs and results"})

    def arena(self, steps: int) -> CompareSettings:
        return CompareSettings(
            data_path=self.data_path, validation_data=self.validation_data, budget=f"steps:{steps}", seeds=self.seeds,
            hidden_size=self.hidden_size, num_hidden_layers=self.num_hidden_layers, num_samples=self.num_samples,
            train_args=self.train_args, out_dir=self.out_dir,
        )  # fmt: skip


def sdd(name: str, *flags: str) -> Arm:
    return Arm(name, ("--architecture", "sdd", *flags))


def settings_arms(steps: int) -> list[Arm]:
    """The defaults (rho 1, k 8, aggregate), and each with one thing changed."""
    return [
        DIFFUSION,
        sdd("sdd"),
        *(sdd(f"rho {rho}", "--belief_share", rho) for rho in ("0", "0.5")),
        *(sdd(f"k {k}", "--fixed_k", k) for k in ("1", "16")),
        sdd("k 1,2,4,8 over half the run", "--k_schedule", "1,2,4,8", "--k_warmup_steps", str(steps // 2)),
        sdd(FRESH),
        sdd("bilateral", "--denoiser", "bilateral"),
        sdd("swap", "--noise", "swap"),
    ]


def trained(experiment: Experiment, arms: Sequence[Arm], seeds: Sequence[int], steps: int, part: str) -> list[Run]:
    settings, runs = experiment.arena(steps), []
    for seed in seeds:
        for arm in arms:
            say(f"[experiment] {part}: {arm.name}, seed {seed}")
            program = (sys.executable, __file__, FRESH) if arm.name == FRESH else PROGRAM
            folder = Path(experiment.out_dir) / part / f"{arm.name.replace(' ', '_')}_{seed}"
            runs.append(train(settings, arm, seed, folder, program))
    return runs


def evaluated(experiment: Experiment, runs: Sequence[Run], judge: Run) -> list[dict[str, Any]]:
    """For each run its likelihood, and 64 tokens after each held-out beginning, one token a step."""
    settings = evaluate_settings(experiment.arena(experiment.steps), runs, judge)
    return evaluate(replace(settings, metrics="perplexity,accuracy,generation", block_length=0))["models"]


def row(name: str, model: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one run that the tables show."""
    likelihood, written = model["perplexity"], model["generation"]
    is_bound = likelihood["likelihood"] != "none"
    return {
        "name": name,
        "loss": likelihood["loss"],
        "loss_error": likelihood["loss_standard_error"],
        "is_bound": is_bound,
        **text_numbers(written),
        "texts": [text["prompt"] + " | " + text["text"] for text in written["texts"][:3]],
    }


def text_numbers(written: Texts) -> dict[str, Any]:
    return {
        "judge": written["judge"]["nats_per_token"],
        "judge_error": written["judge"]["standard_error"],
        "entropy": written["unigram_entropy"],
        "text_judge": written["held_out"]["judge"]["nats_per_token"],
        "text_entropy": written["held_out"]["unigram_entropy"],
        "self_bleu": written["self_bleu"],
        "text_self_bleu": written["held_out"]["self_bleu"],
        "distinct_2": written["distinct_2"],
    }


# --- ways of writing ---


def with_sampling(**changes: Any) -> Way:
    return lambda family, sampling: (family, replace(sampling, **changes))


def with_beliefs_kept(share: float) -> Way:
    """SDD keeps this share of a belief from one step to the next."""

    def way(family: Any, sampling: Any) -> tuple[Any, Any]:
        changed = copy(family)
        changed.kept_belief = share
        return changed, sampling

    return way


def writers(run: Run) -> dict[str, Way]:
    """The first is what `main` does."""
    kept = KEPT if run.architecture == "sdd" else ()
    return {
        "random order": with_sampling(),
        "surest first": with_sampling(order="confidence"),
        "random, in blocks of 16": with_sampling(block_length=16),
        "random, a tenth thought over": with_sampling(remask=0.1),
        "all above 0.9 at once": with_sampling(threshold=0.9),
        **{f"random, beliefs keep {share:g}": with_beliefs_kept(share) for share in kept},
    }


def written_by(experiment: Experiment, runs: Sequence[Run], judge: Run, ways: dict[str, Way]) -> list[dict[str, Any]]:
    """Every run's texts in every way, judged."""
    import numpy as np

    from minillm.eval.answers import write_answers
    from minillm.eval.generation import choose_prompts, generation_section, judge_texts
    from minillm.eval.models import choose_rows, open_data, open_model, sampling_of

    settings = replace(evaluate_settings(experiment.arena(experiment.steps), runs, judge), block_length=0)
    found, unjudged = [], []
    for run in runs:
        opened, family = open_model(run.checkpoint, settings)
        data = open_data(opened, family, "pretrain", settings)
        order = choose_rows(np.arange(len(data)), settings.num_samples, settings.seed)
        prompts, skipped = choose_prompts(opened, data, order, settings.num_samples, settings.max_new_tokens)
        for name, way in ways.items():
            say(f"[experiment] {run.name}, seed {run.seed}: {name}")
            writer, sampling = way(family, sampling_of(opened, settings))
            answers = write_answers(opened, writer, [p.tokens for p in prompts], sampling, settings.batch_size)
            section, texts = generation_section(opened, prompts, skipped, answers)
            unjudged += texts
            found.append((run, name, section))
    judge_texts(*open_model(judge.checkpoint, settings), unjudged, settings.seed, settings.batch_size)
    return [
        {"name": f"{run.name}: {way}", "run": run.name, "seed": run.seed, "way": way, **text_numbers(section)}
        for run, way, section in found
    ]


# --- tables and charts ---

TEXT_COLUMNS = (("judge, nats a token", "judge", 3), ("unigram entropy", "entropy", 3), ("Self-BLEU", "self_bleu", 2))


def mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.fmean(each[key] for each in rows)


def spread(rows: Sequence[dict[str, Any]], key: str, digits: int) -> str:
    values = [each[key] for each in rows]
    return number(mean(rows, key), digits) + (
        "" if len(values) == 1 else f" ({number(min(values), digits)} to {number(max(values), digits)})"
    )


def text_table(rows: Sequence[dict[str, Any]], *, with_loss: bool) -> str:
    """One line for each name; several rows of a name are seeds: mean (least to most)."""
    names = list(dict.fromkeys(each["name"] for each in rows))
    header = ["run", *(["bound, nats a token"] if with_loss else []), *(title for title, _, _ in TEXT_COLUMNS)]
    lines = []
    for name in names:
        own = [each for each in rows if each["name"] == name]
        cells = [name]
        if with_loss:
            cells.append(spread(own, "loss", 3) + ("" if own[0]["is_bound"] else " (no bound)"))
        lines.append([*cells, *(spread(own, key, digits) for _, key, digits in TEXT_COLUMNS)])
    text = ["the held-out text", *(["–"] if with_loss else [])]
    lines.append([*text, *(spread(rows, f"text_{key}", digits) for _, key, digits in TEXT_COLUMNS)])
    return table(header, lines)


def tables(result: dict[str, Any]) -> str:
    parts = []
    for part in PARTS:
        if part in result:
            parts += [f"## {part}", text_table(result[part], with_loss=part in ("settings", "main"))]
    return "\n\n".join(parts) + "\n"


def draw(result: dict[str, Any], target: Path) -> None:
    """Bounds and judged texts of the settings; the judge and entropy against steps."""
    panels = []
    if "settings" in result:
        rows = result["settings"]
        bounds = [charts.Bar(r["name"], i, r["loss"], r["loss_error"]) for i, r in enumerate(rows) if r["is_bound"]]
        lowest = round(min(bar.value for bar in bounds) - 0.1, 1)
        judged = [charts.Bar(r["name"], i, r["judge"], r["judge_error"], r["text_judge"]) for i, r in enumerate(rows)]
        varied = [charts.Bar(r["name"], i, r["entropy"], None, r["text_entropy"]) for i, r in enumerate(rows)]
        panels += [
            charts.Panel("Bound, nats a token (the axis begins near the lowest)", bounds, start=lowest),
            charts.Panel("Judge, nats a token (line: held-out text)", judged),
            charts.Panel("Unigram entropy (line: held-out text)", varied),
        ]
    if "steps" in result:
        for title, key in (("Judge, nats a token, by steps", "judge"), ("Unigram entropy, by steps", "entropy")):
            lines = []
            for place, run in enumerate(dict.fromkeys(each["run"] for each in result["steps"])):
                own = [each for each in result["steps"] if each["run"] == run]
                points = [
                    (float(steps), mean([each for each in own if each["way"] == f"{steps} steps"], key))
                    for steps in STEPS
                ]
                lines.append(charts.Line(run, place, points))
            panels.append(charts.Panel(title, lines=lines, x="steps for 64 tokens"))
    if "temperature" in result:
        for title, key in (("unigram entropy", "entropy"), ("Self-BLEU", "self_bleu")):
            lines = []
            for place, run in enumerate(("diffusion", "sdd")):
                rows = [each for each in result["temperature"] if each["run"] == run]
                ways = [[each for each in rows if each["way"] == way] for way in dict.fromkeys(r["way"] for r in rows)]
                points = [(mean(way, key), mean(way, "judge")) for way in ways]
                lines.append(charts.Line(run, place, points))
            panels.append(charts.Panel(f"Judge against {title}, by temperature", lines=lines, x=title))
    if panels:
        charts.draw_panels(panels, target, rows=12)


def run(experiment: Experiment) -> None:
    parts = experiment.parts.split(",")
    seeds = tuple(int(seed) for seed in experiment.seeds.split(","))
    output = Path(experiment.out_dir) / "sdd.json"
    result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    (judge,) = trained(experiment, [Arm(JUDGE, ("--architecture", "ar"))], [JUDGE_SEED], experiment.steps, "judge")

    def keep(part: str, rows: list[dict[str, Any]]) -> None:
        result[part] = rows
        write_text(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        write_text(output.with_name("sdd_tables.md"), tables(result))
        draw(result, output.with_suffix(".png"))
        say(tables({part: rows}))

    if "settings" in parts:
        steps = experiment.settings_steps
        runs = trained(experiment, settings_arms(steps), seeds[:1], steps, "settings")
        models = evaluated(experiment, runs, judge)
        keep("settings", [row(each.name, model) for each, model in zip(runs, models)])
    if set(PARTS[1:]) & set(parts):
        runs = trained(experiment, [DIFFUSION, sdd("sdd")], seeds, experiment.steps, "main")
        if "main" in parts:
            keep("main", [row(each.name, model) for each, model in zip(runs, evaluated(experiment, runs, judge))])
        if "writing" in parts:
            first = [run for run in runs if run.seed == seeds[0]]
            keep("writing", [text for run in first for text in written_by(experiment, [run], judge, writers(run))])
        if "steps" in parts:
            ways = {f"{count} steps": with_sampling(steps=count) for count in STEPS}
            keep("steps", written_by(experiment, runs, judge, ways))
        if "draws" in parts:
            ways = {f"16 steps, draw {draw}": with_sampling(steps=16, seed=draw) for draw in DRAWS}
            keep("draws", written_by(experiment, runs, judge, ways))
        if "temperature" in parts:
            ways = {f"temperature {degree:g}": with_sampling(temperature=degree) for degree in TEMPERATURES}
            keep("temperature", written_by(experiment, [*runs, judge], judge, ways))


def train_with_fresh_beliefs(argv: Sequence[str]) -> int:
    """`minillm ...` with beliefs that are never older than what is shown beside them."""
    import torch

    from minillm.families.sdd import SparseDistributionDiffusion

    def nothing(self: Any, batch: Any, noise: Any) -> torch.Tensor:
        return torch.zeros_like(batch.loss_mask)

    SparseDistributionDiffusion._revealed_later = nothing  # type: ignore[method-assign]
    return command_line(argv)


if __name__ == "__main__":
    if sys.argv[1:2] == [FRESH]:
        sys.exit(train_with_fresh_beliefs(sys.argv[2:]))
    (chosen,) = parse("experiments/sdd.py", __doc__ or "", [Experiment], sys.argv[1:])
    run(chosen)
