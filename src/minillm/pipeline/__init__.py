"""The whole job: pretrain → SFT → DPO → report. scripts/run.sh is its front door (guide: docs/run.md)."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from minillm.commands import PROGRAM, display, printable, run_command, say
from minillm.eval.report import StageResult, write_report
from minillm.log import UserError, format_duration
from minillm.pipeline import estimate, stages
from minillm.pipeline.datasets import EVALUATION_ROWS, StageData, evaluation_file, prepare, sample_prompts
from minillm.pipeline.discovery import find_pretrained, model_config
from minillm.pipeline.environment import STAGES, Environment, flag_values, read_environment
from minillm.train import arithmetic

SMOKE_EVALUATION_ROWS = 8
SAMPLE_TOKENS, SMOKE_SAMPLE_TOKENS = 96, 16
STAGE_EVALUATION = ("--eval_samples", "32", "--num_samples", "16", "--max_new_tokens", "64", "--batch_size", "16")
SMOKE_REMARK = "Four steps a stage teach nothing: a smoke test's numbers and samples only show that everything runs."
SMOKE_STAGE_EVALUATION = ("--eval_samples", "4", "--num_samples", "2", "--max_new_tokens", "8")


@dataclass(frozen=True)
class PipelineSettings:
    """Pipeline (everything else comes from environment variables, see docs/run.md)"""

    smoke_test: bool = field(
        default=False, metadata={"help": "a few steps of every stage on the CPU, to see that all of it works"}
    )
    skip_pretrain: bool = field(
        default=False, metadata={"help": "start at SFT from a pretrain checkpoint that is already there"}
    )
    force_pretrain: bool = field(
        default=False, metadata={"help": "pretrain from scratch whatever is there; wins over skip_pretrain"}
    )


def run(settings: PipelineSettings) -> None:
    """Run the pipeline.

    Raises UserError for what the user can mend, and SystemExit with the exit code of a stage that failed.
    """
    started = time.monotonic()
    environment = read_environment(os.environ, smoke_test=settings.smoke_test)
    _announce(environment)
    model_config(environment)  # an impossible size is an error now, not after the data is made
    found = find_pretrained(environment, skip=settings.skip_pretrain, force=settings.force_pretrain)
    weights = found or _starting_weights(environment, settings)
    data = prepare(environment, STAGES if found is None else STAGES[1:], smoke_test=settings.smoke_test)
    expected = _estimate(environment, data, settings.smoke_test)

    results = [] if found is None else [_evaluate_found(environment, found, settings.smoke_test)]
    trained, pages = _run_stages(environment, data, weights, settings.smoke_test)
    results += trained

    comparison = estimate.compare(expected, {r.stage: r.seconds for r in results if r.seconds is not None})
    say(f"[estimate] {comparison}")
    if settings.smoke_test:
        say(f"[stage] {SMOKE_REMARK}")
    tokens = SMOKE_SAMPLE_TOKENS if settings.smoke_test else SAMPLE_TOKENS
    prompts = sample_prompts(data["full_sft"])
    remarks = [comparison, *([SMOKE_REMARK] if settings.smoke_test else []), *pages]
    write_report(results, environment.out_dir, run=PROGRAM, remarks=remarks, new_tokens=tokens, prompts=prompts)
    say(f"[stage] All done in {format_duration(time.monotonic() - started)}.")


def _announce(environment: Environment) -> None:
    for root in (environment.cloud_home, environment.cloud_input):
        if root.is_dir():
            say(f"[cloud] OpenBayes: {root} is there")
    experts = ", mixture of experts" if environment.use_moe else ""
    say(f"[stage] Model: hidden size {environment.hidden_size}, {environment.num_layers} layers{experts}")
    say(
        f"[stage] Results go to {display(environment.out_dir)}, TensorBoard logs to "
        f"{display(environment.tensorboard_dir)}"
    )


def _starting_weights(environment: Environment, settings: PipelineSettings) -> Path | None:
    """Weights that pretraining continues from: MINILLM_PRETRAINED_PATH, where neither option says otherwise.

    After --skip-pretrain that file is known to be missing or damaged.
    """
    path = environment.pretrained_path
    if path is None:
        return None
    if settings.force_pretrain or settings.skip_pretrain:
        say(f"[stage] MINILLM_PRETRAINED_PATH ({display(path)}) is not used")
        return None
    if not path.exists():
        raise UserError(f"MINILLM_PRETRAINED_PATH names {display(path)}, which is not there: correct or unset it.")
    say(
        f"[stage] MINILLM_PRETRAINED_PATH: pretraining continues from {display(path)} "
        "(--skip-pretrain goes straight to SFT, --force-pretrain ignores it)"
    )
    return path


def _estimate(environment: Environment, data: dict[str, StageData], smoke_test: bool) -> list[estimate.StageEstimate]:
    """Say how long the stages will take, about."""
    from minillm.text.tokenizer import Tokenizer

    flags = {}
    for stage in data:
        own = stages.stage_flags(environment, stage, data=data[stage], smoke_test=smoke_test)
        flags[stage] = {**own, **flag_values(environment.arguments[stage])}
    tokenizer = Tokenizer.load(flag_values(environment.arguments["full_sft"]).get("tokenizer") or None)
    config = model_config(environment)
    speeds = estimate.stage_speeds(flags, config)
    expected = estimate.estimate_stages(data, flags, config, tokenizer, speeds)
    estimate.announce(expected, arithmetic.active_parameters(config), speeds)
    return expected


def _run_stages(
    environment: Environment, data: dict[str, StageData], weights: Path | None, smoke_test: bool
) -> tuple[list[StageResult], list[str]]:
    """Run and evaluate the stages in order; each hands its own checkpoint to the next, whatever else lies around.
    Returns them, and where their evaluations are, in words."""
    results: list[StageResult] = []
    pages = []
    for stage, files in data.items():
        origin = display(weights) if weights else "random weights"
        say(f"[stage] {stage}: starts from {origin}{' (of this run)' if results else ''}")
        command = stages.stage_command(environment, stage, data=files, pretrained=weights, smoke_test=smoke_test)
        seconds = stages.run_stage(environment, stage, command)
        weights = environment.checkpoint(stage)
        folder, text = environment.run_folder(stage), printable(command)
        results.append(StageResult(stage, weights, folder, seconds=seconds, command=text))
        pages.append(_evaluate_stage(environment, stage, smoke_test))
    return results, pages


def _evaluate_stage(environment: Environment, stage: str, smoke_test: bool) -> str:
    """`minillm evaluate` on what the stage held out; a preference-tuned model reads conversations, as before it.
    A failure is said and does not end the run: the training is worth having all the same."""
    checkpoint, output = environment.checkpoint(stage), environment.run_folder(stage) / "evaluation.json"
    read = environment.run_folder("full_sft" if stage == "rlhf" else stage) / "training_config.json"
    config = json.loads(read.read_text(encoding="utf-8"))
    command = [*PROGRAM, "evaluate", "--checkpoint", str(checkpoint), "--max_seq_len", str(config["max_seq_len"])]
    if config["validation_data"]:
        command += ["--data_path", config["validation_data"]]
    elif config.get("streaming") or isinstance(config["data_path"], list):
        say(f"[stage] {stage} is not evaluated: where data are mixed or streamed, that needs --validation_data")
        return f"Evaluation of {stage}: left out (no `--validation_data`)."
    else:
        command += ["--data_path", config["data_path"], "--held_out_seed", str(config["seed"])]
    amounts = SMOKE_STAGE_EVALUATION if smoke_test else STAGE_EVALUATION
    command += ["--metrics", "perplexity,accuracy,generation", *amounts, "--output", str(output)]
    code = run_command(command)
    if code in (130, 143):
        raise SystemExit(code)
    page = display(output.with_suffix(".md"))
    if code != 0:
        say(f"[stage] The evaluation of {stage} failed with exit code {code} (see above); the run goes on")
        return f"Evaluation of {stage}: failed (exit code {code})."
    return f"Evaluation of {stage}: `{page}`."


def _evaluate_found(environment: Environment, checkpoint: Path, smoke_test: bool) -> StageResult:
    """A quick evaluation of a found checkpoint, as a row of the report."""
    rows = evaluation_file(environment)
    if rows is None:
        return StageResult("pretrain", checkpoint, None)
    output = environment.out_dir / "pretrain_evaluation.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    count = SMOKE_EVALUATION_ROWS if smoke_test else EVALUATION_ROWS
    command = [*PROGRAM, "evaluate", "--checkpoint", str(checkpoint), "--data_path", str(rows)]
    command += ["--eval_samples", str(count), "--output", str(output)]
    code = run_command(command)
    if code in (130, 143):
        raise SystemExit(code)
    if code != 0:
        raise UserError(f"[stage] {display(checkpoint)} could not be evaluated (exit code {code}, see above).")
    found = json.loads(output.read_text(encoding="utf-8"))["models"][0]
    measured = {name: found["perplexity"][name] for name in ("loss", "perplexity")}
    measured["accuracy"] = found["accuracy"]["accuracy"]
    return StageResult("pretrain", checkpoint, None, evaluation=measured, command=printable(command))
