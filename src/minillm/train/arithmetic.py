"""How much arithmetic training takes, and how fast a machine does it. The formulas need no torch.

They count the products with weights; attention's own are left out, as in train/mfu.
"""

from __future__ import annotations

import time
from typing import Any

from minillm.families.settings import FamilyConfig

TRAINING_FLOPS = 6  # for each parameter and token: forward 2, backward 4
# On a CPU, what is not a matrix product takes as long as if every FLOP of the model cost this much more, a thread
# (measured: 500 GFLOP/s with two threads, both where products reach 400 and where they reach 2,200). On a GPU, the
# part of the probe's speed that training reaches.
OTHER_FLOPS_PER_THREAD = 250e9
GPU_EFFICIENCY = 0.5


def active_parameters(config: Any) -> int:
    """Parameters that take part in computing one token (for experts: those that it visits)."""
    heads = config.num_attention_heads + config.num_key_value_heads
    attention = 2 * config.hidden_size * config.head_dim * heads
    width = config.num_experts_per_tok * config.moe_intermediate_size if config.use_moe else config.intermediate_size
    return (
        config.num_hidden_layers * (attention + 3 * config.hidden_size * width) + config.vocab_size * config.hidden_size
    )


def reached_speed(products: float, threads: int) -> float:
    """FLOP/s of training where matrix products alone reach `products`, on so many CPU threads (0: on a GPU)."""
    if not threads:
        return GPU_EFFICIENCY * products
    return 1.0 / (1.0 / products + 1.0 / (OTHER_FLOPS_PER_THREAD * threads))


def family_factor(config: Any, stage: str) -> float:
    """How much more a step of this family computes than one of AR: scores are means over several noise samples,
    and SDD asks the model for its beliefs first: 2 operations more for 6 in training, 4 for 8 in DPO."""
    if config.causal:
        return 1.0
    passes = FamilyConfig().score_samples if stage == "rlhf" else 1
    beliefs = 0.0 if not config.denoiser else 4 / 8 if stage == "rlhf" else 2 / 6
    return passes * (1.0 + beliefs)


def recomputed_flops(config: Any, kind: str) -> float:
    """What gradient checkpointing adds for each token: the forward pass again, but for each layer's last product, whose
    result nobody asks for; with `selective` only inside the feed-forward part."""
    if kind == "none":
        return 0.0
    width = config.num_experts_per_tok * config.moe_intermediate_size if config.use_moe else config.intermediate_size
    flops = 2.0 * 2 * config.hidden_size * width
    if kind == "full":
        heads = config.num_attention_heads + config.num_key_value_heads
        flops += 2.0 * 2 * config.hidden_size * config.head_dim * heads
    return config.num_hidden_layers * flops


def muon_flops(config: Any, dtype: str = "float32") -> float:
    """Arithmetic of one step of Muon in a run of this dtype: five Newton-Schulz rounds on every matrix inside the
    layers."""
    hidden, head = config.hidden_size, config.head_dim
    width, experts = (
        (config.moe_intermediate_size, config.num_experts) if config.use_moe else (config.intermediate_size, 1)
    )
    attention = [config.num_attention_heads, config.num_attention_heads] + [config.num_key_value_heads] * 2
    shapes = [(hidden, heads * head) for heads in attention] + [(hidden, width)] * (3 * experts)
    total = 0.0
    for rows, columns in map(sorted, shapes):
        if columns >= 2 * rows:  # the rounds are done on the Gram matrix alone, in bfloat16 on two of them
            once = dtype != "bfloat16"
            total += (4.0 if once else 8.0) * rows**2 * columns + (34.0 if once else 28.0) * rows**3
        else:
            total += 5 * (4.0 * rows**2 * columns + 2.0 * rows**3)
    return config.num_hidden_layers * total


def measure_speed(hidden_size: int, *, on_cpu: bool, seconds: float = 0.5, dtype_name: str = "auto") -> float:
    """FLOP/s that training will reach: from matrix products of the model's width, on the device that the
    stages choose by themselves and in this dtype (auto: theirs)."""
    import torch

    from minillm.models.device import choose_device
    from minillm.train.precision import choose_dtype

    device = choose_device("cpu" if on_cpu else "auto")
    dtype = choose_dtype(dtype_name, device)
    inputs, weights = (
        torch.randn(2048, hidden_size, device=device, dtype=dtype),
        torch.randn(hidden_size, 4 * hidden_size, device=device, dtype=dtype),
    )
    float((inputs @ weights)[0, 0])  # start the threads, and wait
    rounds, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        float((inputs @ weights)[0, 0])
        rounds += 1
    measured = 2.0 * inputs.numel() * weights.shape[1] * rounds / (time.perf_counter() - started)
    return reached_speed(measured, torch.get_num_threads() if device.type == "cpu" else 0)
