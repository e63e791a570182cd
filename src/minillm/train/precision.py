"""Number format, threads and allocator: what the machine can do, found out rather than assumed."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import time
from typing import Any

import torch

from minillm.log import info
from minillm.models.transformer import LanguageModel


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the hardware multiplies it: most GPUs, CPUs with AMX or AVX-512 BF16 (on AMD cores with
    the latter a training step took 0.6 of float32's time). Emulated bfloat16 is up to 45 times slower than float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    # torch keeps these to itself; without them we do not know, and float32 is always right.
    known = [getattr(torch.cpu, name, bool) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    return torch.bfloat16 if device.type == "cpu" and any(ask() for ask in known) else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Arithmetic in `dtype`; weights, gradients and optimizer state stay float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def choose_compile(name: str, *, device: torch.device, dtype: torch.dtype, flops: float) -> bool:
    """`auto`: where the run is long enough to pay for compiling (about a minute on a CPU), and where it can. On a CPU
    in float32 it gains nothing over our eager step (docs/performance.md)."""
    if name != "auto":
        return name == "on"
    if device.type == "cpu":
        able = bool(shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++"))
        return able and dtype != torch.float32 and flops > 1.5e11 * 1200
    return device.type == "cuda" and flops > 5e17


def compile_layers(model: LanguageModel, *, dynamic: bool | None = None, backend: str = "inductor") -> None:
    """Compile each layer by itself: they are alike, so one is compiled for all.

    Args:
        dynamic: lengths differ from batch to batch (None: compile anew when one does).
    """
    if model.config.use_moe:  # how many tokens an expert gets is read as part of the graph, not as a break in it
        torch._dynamo.config.capture_scalar_outputs = True
    for layer in model.model.layers:
        layer.compile(dynamic=dynamic, backend=backend)


def memory_mb(device: torch.device) -> float:
    """Peak memory so far in MiB: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product of training's shape, measured now: the yardstick for train/mfu."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.full((size, size), 0.5, device=device, dtype=dtype)
    b = torch.full((size, size), 0.5, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def describe_machine(device: torch.device, dtype: torch.dtype, compiled: bool) -> None:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    info(
        f"[run] torch {torch.__version__}, {device} ({where}), "
        f"{str(dtype).removeprefix('torch.')}{', compiled' if compiled else ''}"
    )
