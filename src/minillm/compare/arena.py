"""Arms trained on equal terms, one process after another, and evaluated together under a judge of their own."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple, get_type_hints

from minillm.atomic import write_text
from minillm.checkpoint.files import read_tensors
from minillm.checkpoint.loader import flat_name
from minillm.commands import PROGRAM, display, run_command, say
from minillm.compare import CompareSettings
from minillm.compare.budget import Budget, flops_per_step, read_budget
from minillm.config import parse
from minillm.eval.models import EvaluateSettings, evaluate
from minillm.eval.output import make_room
from minillm.eval.report import read_metrics, series
from minillm.log import UserError
from minillm.train.settings import Settings, without_auto

SCHEMA_VERSION = 1
JUDGE = "judge"
JUDGE_SEED = 1000  # above the largest seed of the arms: a judge must not have begun as one of them


class Arm(NamedTuple):
    """One way to train: a name, and flags of `minillm pretrain`."""

    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """A trained arm."""

    name: str
    seed: int
    architecture: str
    checkpoint: str
    parameters: int
    steps: int
    tokens: int
    flops: float  # of forward and backward passes
    seconds: float
    curve: list[tuple[int, float]]  # (tokens seen, validation bits per byte)


def compare(settings: CompareSettings, arms: Sequence[Arm]) -> Path:
    """Train every arm with every seed and the judge, evaluate all, write compare.json, .md and .png.

    Runs that are complete are taken as they are, one that was stopped goes on. Returns the page.

    Raises:
        UserError: the settings or the data cannot be used. SystemExit: a run failed or was stopped.
    """
    from minillm.compare import page

    folder = Path(settings.out_dir)
    output = folder / "compare.json"
    make_room(output, ".md", ".png")
    settings = _with_data(settings, folder)
    judge_seed = max(settings.run_seeds) + JUDGE_SEED
    wanted = [(Arm(JUDGE, ("--architecture", "ar")), judge_seed)]
    wanted += [(arm, seed) for seed in settings.run_seeds for arm in arms]
    runs = []
    for number, (arm, seed) in enumerate(wanted, 1):
        say(f"[compare] run {number} of {len(wanted)}: {arm.name}, seed {seed}")
        runs.append(train(settings, arm, seed, folder / "runs" / f"{arm.name}_{seed}"))
    judge, contenders = runs[0], runs[1:]
    evaluation = evaluate(evaluate_settings(settings, contenders, judge))
    for run, model in zip(contenders, evaluation["models"], strict=True):
        model["checkpoint"]["label"] = run.name if len(settings.run_seeds) == 1 else f"{run.name}, seed {run.seed}"
    result = {
        "schema_version": SCHEMA_VERSION,
        "command": "compare",
        "settings": asdict(settings),
        "judge": asdict(judge),
        "runs": [asdict(run) for run in contenders],
        "evaluation": evaluation,
    }
    write_text(output, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    picture = page.draw(result, output.with_suffix(".png"))
    target = output.with_suffix(".md")
    write_text(target, page.markdown(result, output.with_suffix(".png").name if picture else ""))
    say(page.summary(result))
    return target


def _with_data(settings: CompareSettings, folder: Path) -> CompareSettings:
    """With demo data where the user named none."""
    if settings.data_path:
        return settings
    from minillm.data.demo import generate_demo

    data = folder / "data"
    if not (data / "manifest.json").is_file():
        say(f"[compare] Generating demo data: minillm data demo --output_dir {display(data)}")
        generate_demo(data)
    values = asdict(settings) | {
        "data_path": str(data / "pretrain.jsonl"),
        "validation_data": str(data / "pretrain_val.jsonl"),
    }
    return CompareSettings(**values)


def pretrain_flags(settings: CompareSettings, arm: Arm, seed: int, folder: Path) -> list[str]:
    """All flags of a run but its length."""
    flags = ["--data_path", settings.data_path, "--validation_data", settings.validation_data]
    for name in ("hidden_size", "num_hidden_layers", "max_seq_len", "batch_size"):
        flags += [f"--{name}", str(getattr(settings, name))]
    flags += ["--use_moe"] * settings.use_moe
    if settings.tokenizer:
        flags += ["--tokenizer", settings.tokenizer]
    flags += ["--seed", str(seed), "--eval_samples", "64", "--no_wandb", "--out_dir", str(folder)]
    return [*flags, *shlex.split(settings.train_args), *arm.flags]


def parsed(flags: Sequence[str]) -> Settings:
    """What `minillm pretrain` makes of the flags."""
    hints = get_type_hints(Settings)
    names = [field.name for field in fields(Settings) if field.name != "method"]
    return Settings(*parse("minillm pretrain", "", [hints[name] for name in names], flags))


def train(settings: CompareSettings, arm: Arm, seed: int, folder: Path, program: Sequence[str] = PROGRAM) -> Run:
    """Pretrain in a process of its own (`program pretrain ...`), as long as the budget allows. The folder remembers the
    command: what is complete is not done again, and what was stopped goes on."""
    flags = pretrain_flags(settings, arm, seed, folder)
    chosen, _ = without_auto(parsed(flags))
    rows, length = chosen.run.batch_size * chosen.run.grad_accum_steps, chosen.data.max_seq_len
    budget = read_budget(settings.budget)
    steps = _steps(budget, chosen, rows, length)
    command = ["pretrain", *flags, "--max_steps", str(steps)]
    family = chosen.family.architecture or "ar"
    run_folder = folder / flat_name("pretrain", chosen.model.hidden_size, chosen.model.use_moe, family)
    memory = folder / "run.json"
    known = json.loads(memory.read_text(encoding="utf-8")) if memory.is_file() else {}
    same = known.get("command") == command
    if same and known["complete"] and (run_folder / "last.pt").is_file():
        say(f"[compare] {display(run_folder)} is complete")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(memory, json.dumps({"command": command, "complete": False}))
        going_on = ["--resume_from", "auto"] if same and any(run_folder.glob("*.pt")) else []
        code = run_command([*program, *command, *going_on])
        if code:
            say(f"[compare] {arm.name}, seed {seed}: exit code {code}. The same command again goes on from there.")
            raise SystemExit(code)
    last = read_tensors(run_folder / "last.pt")
    flops = known.get("flops_per_step") if same else None
    if flops is None:
        flops = flops_per_step(chosen, rows=rows, total_steps=steps)
        write_text(memory, json.dumps({"command": command, "complete": True, "flops_per_step": flops}))
    bits = series(read_metrics(run_folder), "val/bits_per_byte")
    return Run(
        name=arm.name,
        seed=seed,
        architecture=family,
        checkpoint=str(run_folder / "best_model.pt"),
        parameters=last["model_info"]["parameters"],
        steps=last["global_step"],
        tokens=last["global_step"] * rows * length,
        flops=flops * last["global_step"],
        seconds=last["training_stats"]["total_time"],
        curve=[(step * rows * length, value) for step, value in bits],
    )


def _steps(budget: Budget, chosen: Settings, rows: int, length: int) -> int:
    """As many as the budget pays for. FLOPs are counted as in the middle of a run, so a curriculum of k is too."""
    flops = flops_per_step(chosen, rows=rows, total_steps=1000) if budget.kind == "flops" else 1.0
    steps = budget.steps(rows * length, flops)
    if steps < 2:
        raise UserError(f"--budget pays for one step of {rows} rows of {length} tokens only: raise it")
    return steps


def evaluate_settings(settings: CompareSettings, runs: Sequence[Run], judge: Run) -> EvaluateSettings:
    """What `minillm evaluate` would be asked about these runs."""
    return EvaluateSettings(
        checkpoint=tuple(run.checkpoint for run in runs),
        data_path=settings.validation_data,
        metrics="perplexity,accuracy,generation,speed",
        eval_samples=settings.eval_samples,
        num_samples=settings.num_samples,
        max_new_tokens=settings.max_new_tokens,
        max_seq_len=settings.max_seq_len,
        batch_size=16,
        judge=judge.checkpoint,
    )
