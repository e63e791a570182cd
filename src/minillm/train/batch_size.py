"""`--batch_size auto`: as many rows at once as fit.

What is learned does not depend on how a step is cut, so the rows of a step stay what they are by default, and only
their number at once is found. On one GPU by trying; elsewhere from the estimate of train/memory.py, as a CPU's process
that takes too much is killed, and processes would have to fail together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from minillm import processes
from minillm.data.batches import Batch
from minillm.families.base import Family
from minillm.families.settings import FamilyConfig
from minillm.log import UserError, info
from minillm.methods.base import Method
from minillm.methods.likelihood import Likelihood
from minillm.models.transformer import LanguageModel, count_parameters
from minillm.stages import STAGES
from minillm.train.memory import CPU_TOKENS_AT_ONCE, Load, largest_rows, optimizer_bytes, parameters
from minillm.train.precision import autocast
from minillm.train.settings import OptimSettings, Settings

USED_AT_MOST = 0.9  # of the memory: real batches differ, and allocators leave holes


def available_memory() -> int:
    """Bytes of main memory that this process may still take: what the system has, within the limit of its group."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        there = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        there = min(there, limit - used)
    except (OSError, ValueError):  # no group, or one without a limit
        pass
    return max(0, there)


def largest_that_fits(choices: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The last of these growing numbers before the first that does not fit; 0: not even the first does."""
    found = 0
    for rows in choices:
        if not fits(rows):
            break
        found = rows
    return found


def steps_fit(model: LanguageModel, family: Family, shape: tuple[int, int], dtype: torch.dtype, reserved: int) -> bool:
    """Whether two micro-batches of random tokens `shape` (rows, length) pass forward and backward beside `reserved`
    bytes, for what is not there yet. Weights and gradients are as before afterwards."""
    device = model.head_weight.device
    on_gpu = device.type == "cuda"
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, shape)
    batch = Batch(tokens, np.ones(shape, dtype=bool), None, None, np.arange(shape[0]))
    method, held = Likelihood(family, 0), None
    model.train()
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.empty(reserved, dtype=torch.uint8, device=device)
        for _ in range(2):
            with autocast(device, dtype):
                part = method.prepare(model, batch, device, 0, 0)
                loss = method.loss(model, part.data).loss
            loss.backward()
        peak = torch.cuda.max_memory_reserved(device) if on_gpu else 0
        return not on_gpu or peak <= USED_AT_MOST * torch.cuda.get_device_properties(device).total_memory
    except torch.OutOfMemoryError:
        return False
    finally:
        del held
        model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.empty_cache()


def find_micro_rows(
    stage: str,
    settings: Settings,
    optim: OptimSettings,
    method: Method,
    model: LanguageModel,
    family: Family,
    *,
    shards: int,
    own_rows: int,
    dtype: torch.dtype,
) -> int:
    """Rows at once, a divisor of `own_rows` (those of a step in this process); says what was found.

    Raises:
        UserError: not even one row fits.
    """
    load = _one_row(settings, optim, method, model, dtype, shards)
    model_rows = _model_rows(stage, family)
    device = model.head_weight.device
    choices = [rows for rows in range(1, own_rows + 1) if own_rows % rows == 0]
    if device.type == "cuda" and processes.size() == 1:
        state = optimizer_bytes(load.config, load.optimizer, load.trained_share)

        def fits(rows: int) -> bool:
            return steps_fit(model, family, (rows * model_rows, load.length), dtype, state)

        found, how = largest_that_fits(choices, fits), "found by trying"
    else:
        row_tokens = load.length * model_rows
        if device.type == "cpu":  # more is slower there
            choices = [rows for rows in choices if rows == 1 or rows * row_tokens <= CPU_TOKENS_AT_ONCE]
        free, here = _free(device), 4 * parameters(load.config)  # the weights are there already
        load = replace(load, rows=model_rows, micro_batches=own_rows)
        found = largest_rows(load, round(USED_AT_MOST * free) + here, [rows * model_rows for rows in choices])
        found, how = min(processes.gathered(found // model_rows)), f"by the estimate, {free / 2**30:.1f} GiB free"
    if not found:
        raise UserError(
            f"--batch_size auto: not even one row of {load.length} tokens fits into the memory of {device}. Try "
            "--gradient_checkpointing full, --optimizer adamw8bit, a smaller --max_seq_len or a smaller model"
        )
    info(f"[run] --batch_size auto: {found} of {own_rows} rows at once ({how})")
    return found


def _one_row(
    settings: Settings, optim: OptimSettings, method: Method, model: LanguageModel, dtype: torch.dtype, shards: int
) -> Load:
    """What the run keeps in memory with one row at once."""
    own = {id(parameter) for parameter in model.parameters()}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Load(
        model.config,
        rows=1,
        length=settings.data.max_seq_len,
        optimizer=optim.optimizer,
        gradient_checkpointing=settings.run.gradient_checkpointing,
        dtype=str(dtype).removeprefix("torch."),
        device="cpu" if model.head_weight.device.type == "cpu" else "cuda",
        shards=shards,
        packed=True,
        trained_share=trained / count_parameters(model),
        frozen_models=sum(id(next(each.parameters())) not in own for each in method.frozen().values()),
    )


def _model_rows(stage: str, family: Family) -> int:
    """Rows of the model for one of the data: both answers of a pair, and where a likelihood is a bound one for each
    sample of noise."""
    scores = STAGES[stage].data in ("pairs", "prompts") and stage != "reward"
    return STAGES[stage].model_rows * (FamilyConfig().score_samples if scores and not family.ordered else 1)


def _free(device: torch.device) -> int:
    """Bytes for this process: of its GPU, or its share of the main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
