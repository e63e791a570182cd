"""How long will it take? Tokens from a sample of each file, work from the model's size, speed from a probe.

The three are multiplied, and the result is rough: it is meant to tell minutes from hours.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from minillm.commands import say
from minillm.log import format_duration
from minillm.pipeline.datasets import StageData, read_stage_rows
from minillm.pipeline.environment import COMMANDS
from minillm.stages import STAGES
from minillm.train import arithmetic
from minillm.train.settings import DTYPES

SAMPLE_ROWS = 512
# FLOPs for each parameter and token: forward 2, backward 4; DPO adds its reference model's forward pass.
FLOPS_PER_PARAMETER = {"pretrain": 6, "full_sft": 6, "rlhf": 8}
EVALUATION_FLOPS = {"pretrain": 2, "full_sft": 2, "rlhf": 2}  # the reference is asked in the first evaluation alone
EVALUATIONS = 11  # what a stage does unless it is told otherwise: one before training, then ten
HELD_OUT_SHARE = 0.02
PAIRS_AT_ONCE = 4  # of a micro-batch of preference tuning: half of the batch of the default run
SECONDS_AROUND = 12.0  # what a stage needs besides training


@dataclass(frozen=True)
class StageEstimate:
    """What one stage is expected to process (tokens) and to take (seconds)."""

    stage: str
    tokens: int
    seconds: float


def count_tokens(path: Path, stage: str, tokenizer: Any) -> tuple[int, int]:
    """Tokens of a file, about, and how many a model reads of them with the padding between answers of several
    lengths: exact for small files, otherwise from the first rows and the file's size."""
    from minillm.data.files import RowReport, find_files

    report = RowReport()
    rows = read_stage_rows(path, stage, report)
    tokens = read = 0
    while batch := list(islice(rows, SAMPLE_ROWS)):
        lengths = _lengths(batch, stage, tokenizer)
        tokens += sum(lengths)
        read += _padded(lengths) if stage == "rlhf" else sum(lengths)
        if report.bytes_read and len(batch) == SAMPLE_ROWS:
            size = sum(file.stat().st_size for file in find_files(path))
            return round(tokens * size / report.bytes_read), round(read * size / report.bytes_read)
    return tokens, read


def _lengths(rows: list[dict[str, Any]], stage: str, tokenizer: Any) -> list[int]:
    """Tokens of each text, or of each side's turns with what the template adds to them (about five a turn)."""
    if stage == "pretrain":
        return [len(tokens) + 1 for tokens in tokenizer.encode_batch([row["text"] for row in rows])]
    sides = ("conversations",) if stage == "full_sft" else ("chosen", "rejected")
    turns = [[message["content"] for message in row[side]] for row in rows for side in sides]
    tokens = iter(tokenizer.encode_batch([text for side in turns for text in side]))
    return [sum(len(next(tokens)) + 5 for _ in side) for side in turns]


def _padded(lengths: list[int]) -> int:
    """What is read of these sides of pairs when those of a micro-batch are as long as the longest."""
    parts = [lengths[start : start + 2 * PAIRS_AT_ONCE] for start in range(0, len(lengths), 2 * PAIRS_AT_ONCE)]
    return sum(len(part) * max(part) for part in parts)


def trained_tokens(file_tokens: int, flags: dict[str, str]) -> int:
    """Tokens a stage processes: all epochs, or max_steps global batches when those are given."""
    max_steps = _number(flags, "max_steps", 0)
    if max_steps:
        batch = _number(flags, "batch_size", 16) * _number(flags, "grad_accum_steps", 1)
        return round(max_steps * min(batch * _number(flags, "max_seq_len", 256), max(file_tokens, 1)))
    return round(file_tokens * _number(flags, "epochs", 1))


def _number(flags: dict[str, str], name: str, default: float) -> float:
    try:
        return float(flags.get(name) or default)
    except ValueError:
        return default  # the stage itself will refuse it, with a better message


def stage_speeds(flags: dict[str, dict[str, str]], config: Any) -> dict[str, float]:
    """FLOP/s that each stage will reach on its device and in its dtype, each pair measured once."""
    measured: dict[tuple[bool, str], float] = {}
    speeds = {}
    for stage, given in flags.items():
        dtype = given.get("dtype", "auto")
        on_cpu, name = given.get("device") == "cpu", dtype if dtype in DTYPES else "auto"  # the stage refuses others
        if (on_cpu, name) not in measured:
            measured[on_cpu, name] = arithmetic.measure_speed(config.hidden_size, on_cpu=on_cpu, dtype_name=name)
        speeds[stage] = measured[on_cpu, name]
    return speeds


def estimate_stages(
    data: dict[str, StageData],
    flags: dict[str, dict[str, str]],
    config: Any,
    tokenizer: Any,
    speeds: dict[str, float],
) -> list[StageEstimate]:
    """One estimate a stage, in order. `speeds`: FLOP/s that the training of each stage reaches."""
    estimates = []
    for stage, files in data.items():
        there, read = count_tokens(files.train, stage, tokenizer)
        held_out = count_tokens(files.validation, stage, tokenizer)[1] if files.validation else read * HELD_OUT_SHARE
        row_length = _number(flags[stage], "max_seq_len", 256)
        evaluated = min(held_out, _number(flags[stage], "eval_samples", 128) * row_length)
        tokens = trained_tokens(there, flags[stage])
        padded = tokens * read / max(there, 1)
        rows = _number(flags[stage], "batch_size", 16) * _number(flags[stage], "grad_accum_steps", 1)
        steps = _number(flags[stage], "max_steps", 0) or tokens / (rows * row_length)
        optimizer = flags[stage].get("optimizer") or STAGES[stage].optimizer
        work = arithmetic.active_parameters(config) * arithmetic.family_factor(config, stage) * (
            FLOPS_PER_PARAMETER[stage] * padded + EVALUATION_FLOPS[stage] * EVALUATIONS * evaluated
        ) + (steps * arithmetic.muon_flops(config) if optimizer == "muon" else 0.0)
        estimates.append(StageEstimate(stage, tokens, SECONDS_AROUND + work / speeds[stage]))
    return estimates


def announce(estimates: list[StageEstimate], parameters: int, speeds: dict[str, float]) -> None:
    reached = " or ".join(f"{speed / 1e9:,.0f}" for speed in dict.fromkeys(speeds.values()))
    say(f"[estimate] {parameters / 1e6:.1f} M active parameters; training should reach {reached} GFLOP/s here")
    for estimate in estimates:
        say(
            f"[estimate]   {COMMANDS[estimate.stage]:<8} about {estimate.tokens:>11,} tokens  "
            f"{format_duration(estimate.seconds):>8}"
        )
    say(f"[estimate] Roughly {format_duration(sum(e.seconds for e in estimates))} in all.")


def compare(estimates: list[StageEstimate], seconds: dict[str, float]) -> str:
    """One line: what was estimated and what it took."""
    done = [(e, seconds[e.stage]) for e in estimates if e.stage in seconds]
    parts = [f"{COMMANDS[e.stage]} {format_duration(e.seconds)} → {format_duration(took)}" for e, took in done]
    total, took_all = sum(e.seconds for e, _ in done), sum(took for _, took in done)
    return f"Estimated {format_duration(total)}, took {format_duration(took_all)} ({', '.join(parts)})"
