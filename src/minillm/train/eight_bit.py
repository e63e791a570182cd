"""AdamW whose two moments take 8 bits a value instead of 32 (arXiv 2110.02861), through torchao.

torchao keeps a moment as a tensor class of its own: codes, a scale for each 256 values, and the table of what the codes
mean. Checkpoints hold these three as plain tensors, so that reading one runs no code of torchao's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from minillm.log import UserError

PARTS = ("codes", "scale", "qmap")
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def adamw_8bit(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """The optimizer, which is stepped, saved and restored like torch's own. Tensors of fewer than 4,096 values, or of a
    number that 256 does not divide, keep moments of 32 bits.

    torchao compiles its step. On a CPU that took half a minute for the shapes of one model and made a step 3.5 times as
    fast, so it is left to GPUs.

    Raises:
        UserError: torchao is not there.
    """
    for talks in ("torchao", "torch.utils._pytree"):  # of GPU kernels that it cannot load, and of its own old calls
        logging.getLogger(talks).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"--optimizer adamw8bit needs torchao ({error}): pip install 'minillm-trainer[quant]', or take adamw"
        ) from None

    class EightBitAdamW(AdamW8bit):  # type: ignore[misc, valid-type]
        def step(self, closure: None = None) -> None:
            on_gpu = any(parameter.is_cuda for group in self.param_groups for parameter in group["params"])
            with nullcontext() if on_gpu else torch.compiler.set_stance("force_eager"):
                super().step(closure)

    return EightBitAdamW(groups, lr=lr, betas=betas)


def to_plain(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state_dict with each 8-bit moment as plain tensors: exp_avg.codes, exp_avg.scale, exp_avg.qmap."""
    plain: dict[Any, dict[str, Any]] = {}
    for index, values in state["state"].items():
        plain[index] = {}
        for name, value in values.items():
            if hasattr(value, "codes"):
                plain[index] |= {f"{name}.{part}": getattr(value, part) for part in PARTS}
            else:
                plain[index][name] = value
    return {**state, "state": plain}


def from_plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_plain` was given.

    Raises:
        ValueError: the tensors are not those of 8-bit moments.
    """
    return {**state, "state": {index: _rebuilt(values) for index, values in state["state"].items()}}


def _rebuilt(values: Mapping[str, Any]) -> dict[str, Any]:
    packed = {name.partition(".")[0] for name in values if "." in name}
    result = {name: value for name, value in values.items() if "." not in name}
    if packed:
        from torchao.optim.subclass_8bit import OptimState8bit
    for name in packed:
        codes, scale, qmap = (values[f"{name}.{part}"] for part in PARTS)
        _check(name, codes, scale, qmap)
        result[name] = OptimState8bit(codes, scale, qmap, SIGNED[name], dtype=torch.float32)
    return result


def _check(name: str, codes: torch.Tensor, scale: torch.Tensor, qmap: torch.Tensor) -> None:
    kinds: Iterable[tuple[torch.Tensor, torch.dtype]] = (
        (codes, torch.uint8), (scale, torch.float32), (qmap, torch.float32),
    )  # fmt: skip
    whole = scale.ndim == 1 and len(scale) and codes.numel() % len(scale) == 0 and tuple(qmap.shape) == (256,)
    if name not in SIGNED or any(tensor.dtype != dtype for tensor, dtype in kinds) or not whole:
        raise ValueError(f"{name} is no moment of 8 bits: codes {tuple(codes.shape)}, scale {tuple(scale.shape)}")
