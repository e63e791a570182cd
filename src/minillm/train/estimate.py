"""minillm estimate: what a run takes in memory, time and money, before it runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from minillm.config import UsageError
from minillm.families.settings import ARCHITECTURES
from minillm.log import UserError, format_duration
from minillm.models.config import ModelConfig, ModelSettings, build_model_config
from minillm.train.arithmetic import (
    TRAINING_FLOPS,
    active_parameters,
    family_factor,
    measure_speed,
    muon_flops,
    recomputed_flops,
)
from minillm.train.memory import Load, Memory, memory_of, optimizer_bytes, parameters, rows_at_once
from minillm.train.settings import CHECKPOINTING, DTYPES, OPTIMIZERS

GIB = 2**30
TOKENS_PER_PARAMETER = 20  # what a given amount of arithmetic is best spent on (arXiv 2203.15556)
UTILISATION = 0.4  # of a GPU's peak: assumed
VOCABULARY = 6400  # of the shipped tokenizer


class Gpu(NamedTuple):
    """A GPU by its maker's data sheet: dense products, no sparsity, sums in float32."""

    memory: float  # GB
    half: float  # TFLOP/s in bfloat16 (float16 where it has no bfloat16)
    single: float  # TFLOP/s in float32
    bfloat16: bool = True


GPUS = {
    "t4": Gpu(16, 65, 8.1, bfloat16=False),
    "l4": Gpu(24, 121, 30.3),
    "a10": Gpu(24, 125, 31.2),
    "rtx3090": Gpu(24, 71, 35.6),
    "rtx4090": Gpu(24, 165, 82.6),
    "l40s": Gpu(48, 362, 91.6),
    "a100-40gb": Gpu(40, 312, 19.5),
    "a100": Gpu(80, 312, 19.5),
    "h100": Gpu(80, 989, 67),
    "h200": Gpu(141, 989, 67),
}
HERE = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class EstimateSettings:
    """The run"""

    architecture: str = field(default="ar", metadata={"help": "family of the model", "choices": ARCHITECTURES})
    denoiser: str = field(
        default="aggregate", metadata={"help": "sdd: how candidates are read", "choices": ("aggregate", "bilateral")}
    )
    vocab_size: int = field(default=VOCABULARY, metadata={"help": "tokens of the tokenizer", "min": 1})
    batch_size: int = field(default=8, metadata={"help": "rows a batch", "min": 1})
    grad_accum_steps: int = field(default=1, metadata={"help": "batches an optimizer step", "min": 1})
    micro_batch_size: int = field(
        default=0, metadata={"help": "rows at once (default 0: as the run would choose)", "min": 0}
    )
    max_seq_len: int = field(default=512, metadata={"help": "tokens a row", "min": 8})
    optimizer: str = field(default="muon", metadata={"help": "optimizer", "choices": OPTIMIZERS})
    gradient_checkpointing: str = field(
        default="none", metadata={"help": "what is computed twice", "choices": CHECKPOINTING, "bare": "full"}
    )
    dtype: str = field(default="auto", metadata={"help": "precision of the arithmetic", "choices": DTYPES})
    device: str = field(
        default="auto",
        metadata={
            "help": "auto, cpu or cuda: this machine, whose speed is measured; or a GPU by its data sheet: "
            + ", ".join(GPUS),
            "choices": (*HERE, *GPUS),
        },
    )
    processes: int = field(default=1, metadata={"help": "processes that train together, each on a device", "min": 1})
    shards: int = field(default=1, metadata={"help": "of them share one copy of the weights (FSDP)", "min": 1})
    tokens: int = field(
        default=0,
        metadata={
            "help": f"to train on (default 0: {TOKENS_PER_PARAMETER} for each active parameter)",
            "aliases": ("data_tokens",),
            "min": 0,
        },
    )
    utilisation: float = field(
        default=0.0,
        metadata={
            "help": f"share of a GPU's peak that training reaches (default {UTILISATION}: assumed)",
            "min": 0.0,
            "max": 1.0,
        },
    )
    price_per_hour: float = field(
        default=0.0, metadata={"help": "of one device, in your currency (default 0: unknown)", "min": 0.0}
    )
    json: bool = field(default=False, metadata={"help": "print JSON instead of tables"})

    def __post_init__(self) -> None:
        if self.processes % self.shards:
            raise UsageError(f"--shards {self.shards} does not divide --processes {self.processes}")
        if self.utilisation and self.device not in GPUS:
            raise UsageError("--utilisation is for the GPUs of the data sheets: this machine's speed is measured")


class Device(NamedTuple):
    """What a run would have."""

    name: str
    on_cpu: bool
    dtype: str
    memory: float  # bytes that one process may take
    speed: float  # FLOP/s of training, of one device
    how: str  # where the speed is from


def find_device(settings: EstimateSettings, hidden_size: int) -> Device:
    """A GPU by its data sheet, or this machine, measured."""
    if settings.device in GPUS:
        gpu = GPUS[settings.device]
        dtype = settings.dtype if settings.dtype != "auto" else "bfloat16" if gpu.bfloat16 else "float16"
        if dtype == "bfloat16" and not gpu.bfloat16:
            raise UserError(f"--device {settings.device} does not multiply bfloat16: give --dtype float16")
        share = settings.utilisation or UTILISATION
        peak = 1e12 * (gpu.single if dtype == "float32" else gpu.half)
        how = f"{100 * share:.0f} % of the data sheet's {peak / 1e12:,.0f} TFLOP/s: " + (
            "your number" if settings.utilisation else "assumed, not measured"
        )
        return Device(settings.device, False, dtype, gpu.memory * 1e9, share * peak, how)
    import torch

    from minillm.models.device import choose_device
    from minillm.train.batch_size import available_memory
    from minillm.train.precision import choose_dtype

    device = choose_device(settings.device)
    dtype = str(choose_dtype(settings.dtype, device)).removeprefix("torch.")
    speed = measure_speed(hidden_size, on_cpu=device.type == "cpu", dtype_name=settings.dtype)
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), float(torch.cuda.mem_get_info(device)[1])
    else:
        name, memory = f"this machine ({torch.get_num_threads()} threads)", float(available_memory())
        memory, speed = memory / settings.processes, speed / settings.processes  # they share it
    return Device(name, device.type != "cuda", dtype, memory, speed, "products of the model's width, measured now")


def _model(sizes: ModelSettings, settings: EstimateSettings) -> ModelConfig:
    return build_model_config(
        sizes,
        vocab_size=settings.vocab_size,
        max_seq_len=settings.max_seq_len,
        causal=settings.architecture == "ar",
        denoiser=settings.denoiser if settings.architecture == "sdd" else "",
    )


def estimate(sizes: ModelSettings, settings: EstimateSettings) -> dict[str, Any]:
    """Everything that is printed: parameters, bytes, tokens/s, seconds, money (None: no price was given)."""
    config = _model(sizes, settings)
    device = find_device(settings, config.hidden_size)
    own_rows = settings.batch_size * settings.grad_accum_steps
    rows = min(own_rows, settings.micro_batch_size) or rows_at_once(
        batch_size=settings.batch_size,
        rows_per_step=own_rows,
        row_tokens=settings.max_seq_len,
        on_cpu=device.on_cpu,
    )
    load = Load(
        config,
        rows,
        settings.max_seq_len,
        settings.optimizer,
        settings.gradient_checkpointing,
        device.dtype,
        "cpu" if device.on_cpu else "cuda",
        micro_batches=-(-own_rows // rows),
        shards=settings.shards,
    )
    memory = memory_of(load)
    count, active = parameters(config), active_parameters(config)
    factor = family_factor(config, "pretrain")
    flops = TRAINING_FLOPS * active * factor + recomputed_flops(config, settings.gradient_checkpointing)
    own_tokens = own_rows * settings.max_seq_len
    update = muon_flops(config, device.dtype) if settings.optimizer == "muon" else 0.0
    step = (own_tokens * flops + update) / device.speed
    rate = settings.processes * own_tokens / step
    tokens = settings.tokens or TOKENS_PER_PARAMETER * active
    hours = tokens / rate / 3600
    return {
        "model": {**config.to_dict(), "parameters": count, "active_parameters": active},
        "step": {
            "rows": own_rows * settings.processes, "rows_at_once": rows, "tokens": own_tokens * settings.processes,
            "seconds": step, "optimizer": settings.optimizer, "dtype": device.dtype,
            "gradient_checkpointing": settings.gradient_checkpointing,
        },
        "memory": asdict(memory),
        "checkpoint_bytes": 4 * count + optimizer_bytes(config, settings.optimizer),
        "device": {"name": device.name, "memory": device.memory, "flops": device.speed, "speed_is": device.how},
        "fits": memory.peak <= device.memory,
        "tokens_per_second": rate,
        "tokens": tokens,
        "days": hours / 24,
        "cost": hours * settings.price_per_hour * settings.processes if settings.price_per_hour else None,
    }  # fmt: skip


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 60 else format_duration(value)


def shown(found: dict[str, Any], settings: EstimateSettings) -> str:
    """The same for people."""
    model, step, device = found["model"], found["step"], found["device"]
    memory = Memory(**found["memory"])
    lines = [
        f"model    {model['parameters']:,} parameters ({model['active_parameters']:,} take part in a token): width "
        f"{model['hidden_size']}, {model['num_hidden_layers']} layers, {model['num_attention_heads']} heads, "
        f"vocabulary {model['vocab_size']:,}",
        f"step     {step['rows']:,} rows of {settings.max_seq_len:,} tokens, {step['rows_at_once']:,} at once; "
        f"{step['optimizer']}, {step['dtype']}, gradient checkpointing {step['gradient_checkpointing']}",
        f"device   {settings.processes} x {device['name']}" if settings.processes > 1 else f"device   {device['name']}",
        "",
        "memory of a process, GiB",
    ]
    labels = {"holes": "holes of the allocator"}
    lines += [
        f"  {labels.get(kind, kind):<24}{size / GIB:>8.2f}" for kind, size in asdict(memory).items() if kind != "peak"
    ]
    total = sum(asdict(memory).values()) - memory.peak
    note = "" if memory.peak >= 0.99 * total else "  (gradients come as activations go: not all at one time)"
    lines.append(f"  {'peak':<24}{memory.peak / GIB:>8.2f}{note}")
    verdict = f"fits into {device['memory'] / GIB:.1f} GiB" if found["fits"] else (
        f"does NOT fit into {device['memory'] / GIB:.1f} GiB: try --gradient_checkpointing full, "
        "--micro_batch_size 1, --optimizer adamw8bit or --shards"
    )  # fmt: skip
    lines += [
        f"  {verdict}",
        f"  while a checkpoint is written, {found['checkpoint_bytes'] / settings.shards / GIB:.2f} more of main memory",
        "",
        f"speed    about {found['tokens_per_second']:,.0f} tokens/s, {_seconds(step['seconds'])} a step "
        f"({device['flops'] / 1e12:.2f} TFLOP/s a device; {device['speed_is']})",
        f"time     {found['tokens']:,} tokens: {found['days']:,.2f} days",
    ]
    if found["cost"] is not None:
        lines.append(f"cost     {found['cost']:,.2f} at {settings.price_per_hour:g} an hour and device")
    else:
        lines.append("cost     unknown: --price_per_hour gives it")
    return "\n".join(lines)


def run(sizes: ModelSettings, settings: EstimateSettings) -> None:
    """Print the estimate."""
    found = estimate(sizes, settings)
    print(json.dumps(found, indent=1) if settings.json else shown(found, settings))
