"""Which device a model is on, and what it lacks."""

from __future__ import annotations

from functools import cache

import torch

from minillm import processes
from minillm.log import UserError


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's GPU, then the CPU. Raises UserError for a device that is not there."""
    if name == "auto":
        apple = torch.backends.mps.is_available() and processes.size() == 1  # there are no collectives for it
        name = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    if name == "cuda" and processes.size() > 1:
        name = f"cuda:{processes.local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({first}). --device auto takes what there is") from None
    return device


@cache
def has_float64(device: torch.device) -> bool:
    """Whether it computes in float64. Apple's GPU does not."""
    try:
        torch.empty(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return False
    return True
