"""How fast a model writes: new tokens a second, latency, steps and memory; for canvases, quality against steps.

Every row writes all of max_new_tokens (nothing stops it), and every position that is written counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.eval.answers import write_answers
from minillm.eval.generation import Prompt, Unjudged
from minillm.eval.text_metrics import unigram_entropy

if TYPE_CHECKING:
    import torch

    from minillm.checkpoint.model import OpenedCheckpoint
    from minillm.families.base import Family, Progress, Sampling

REPEATS = 3  # runs at batch 1, of which the median is taken
LARGEST_BATCH = 64
SATURATED = 1.1  # a doubled batch that gains less has saturated the machine
STEPS = (8, 16, 32, 64)  # of the quality curve
WARM_UP_TOKENS = 4
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def speed_section(
    opened: OpenedCheckpoint, family: Family, prompts: Sequence[Prompt], sampling: Sampling
) -> dict[str, Any]:
    """Rates at batch 1 and at growing batches until they gain no more."""
    import torch

    free, device = replace(sampling, stop_ids=()), opened.model.head_weight.device
    rows = [prompt.tokens for prompt in prompts]

    def write(batch: int, watch: Callable[[Progress], None] | None = None) -> float:
        """Seconds for a batch of prompts, which repeat where there are too few."""
        chosen = [rows[index % len(rows)] for index in range(batch)]
        started = time.perf_counter()
        family.generate(opened.model, chosen, free, watch)
        return time.perf_counter() - started

    family.generate(opened.model, rows[:1], replace(free, max_new_tokens=min(WARM_UP_TOKENS, free.max_new_tokens)))
    first_token, steps = watched(write, opened.tokenizer.mask_id)
    batches = [_rate(1, statistics.median(write(1) for _ in range(REPEATS)), free.max_new_tokens)]
    batch = 2
    while batch <= LARGEST_BATCH:
        reset = reset_peak_memory(device)
        batches.append(_rate(batch, write(batch), free.max_new_tokens))
        batches[-1]["peak_memory_mb"] = peak_memory_mb(device) if reset else None
        if batches[-1]["tokens_per_second"] < SATURATED * batches[-2]["tokens_per_second"]:
            break
        batch *= 2
    reset = reset_peak_memory(device)
    write(1)
    batches[0]["peak_memory_mb"] = peak_memory_mb(device) if reset else None
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "new_tokens": free.max_new_tokens,
        "steps": steps,
        "first_token_seconds": first_token,
        "batch_1": batches[0],
        "saturated": max(batches, key=lambda each: each["tokens_per_second"]),
        "batches": batches,
        "quality_by_steps": [],
    }


def _rate(batch: int, seconds: float, new_tokens: int) -> dict[str, Any]:
    return {"batch": batch, "tokens_per_second": batch * new_tokens / seconds, "peak_memory_mb": None}


def watched(write: Callable[[int, Callable[[Progress], None]], float], mask_id: int) -> tuple[float, int]:
    """(seconds until the first new token of the text stands, steps) of one row. A canvas may reveal it late."""
    seen: list[float] = []
    steps = 0
    started = time.perf_counter()

    def watch(state: Progress) -> None:
        nonlocal steps
        steps += 1
        if not seen and state.tokens[0] and state.tokens[0][0] != mask_id:
            seen.append(time.perf_counter() - started)

    write(1, watch)
    return seen[0], steps


def quality_by_steps(
    opened: OpenedCheckpoint, family: Family, prompts: Sequence[Prompt], sampling: Sampling, batch_size: int
) -> tuple[list[dict[str, Any]], list[Unjudged]]:
    """(entropy and rate of the texts at each number of steps, what the judge should read)."""
    points: list[dict[str, Any]] = []
    unjudged = []
    for steps in STEPS:
        if steps > sampling.max_new_tokens:
            break
        started = time.perf_counter()
        own = replace(sampling, steps=steps)
        answers = write_answers(opened, family, [prompt.tokens for prompt in prompts], own, batch_size)
        seconds = time.perf_counter() - started
        texts = [answer.tokens for answer in answers]
        point = {
            "steps": steps,
            "unigram_entropy": unigram_entropy(texts),
            "texts_per_second": len(texts) / seconds,
            "judge": None,
        }
        points.append(point)
        written = [(prompt.tokens, tokens) for prompt, tokens in zip(prompts, texts)]
        unjudged.append(Unjudged(point, opened.tokenizer, written))
    return points, unjudged


def reset_peak_memory(device: torch.device) -> bool:
    """Let the peak begin anew, of a GPU or else of the process; False where that cannot be done (only Linux can)."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with suppress(OSError):
        CLEAR_REFS.write_text("5")
        return STATUS.is_file()
    return False


def peak_memory_mb(device: torch.device) -> float:
    """MiB held at most since the reset: on a GPU by tensors, else by the process, the interpreter included."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
