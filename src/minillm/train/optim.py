"""Optimizers and the learning rate's schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minillm.log import UserError
from minillm.train import parallel
from minillm.train.eight_bit import adamw_8bit, from_plain, to_plain
from minillm.train.settings import OptimSettings

# Newton-Schulz: each round maps singular values s to a*s + b*s^3 + c*s^5; five rounds bring them near one.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
GRAM_STEPS = {torch.float32: (NEWTON_SCHULZ_STEPS,), torch.bfloat16: (3, 2)}  # on one Gram matrix, then on the next
MUON_ELEMENTS = 1 << 25  # of the matrices that are taken together: four such tensors exist at a time


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest (semi-)orthogonal matrix to each of [N, rows, columns], roughly, in `dtype` arithmetic
    (Muon: K. Jordan and others, 2024)."""
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    if x.shape[-1] < 2 * x.shape[-2]:
        x = _newton_schulz(x)
    else:
        for steps in GRAM_STEPS[dtype]:
            x = _newton_schulz_by_gram(x, steps)
    return x.mT if tall else x


def _newton_schulz(x: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _newton_schulz_by_gram(x: Tensor, steps: int) -> Tensor:
    """Such rounds on the small Gram matrix alone: each multiplies x from the left by a polynomial of the
    Gram matrix, and polynomials of one matrix commute, so their product is kept and applied to x once. For
    columns = 4 * rows all five are 0.55 of the arithmetic.

    Rounding makes small eigenvalues of the Gram matrix negative, and each round makes these up to twelve times as
    large: all five in bfloat16 end at singular values in the thousands. Three and two are about as near to the truth as
    the plain form.
    """
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT
    eye = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
    product: Tensor | None = None
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c).add_(eye, alpha=a)
        product = polynomial if product is None else polynomial @ product
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    assert product is not None
    return product @ x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: for the matrices inside the layers. Everything else belongs to AdamW.

    The update's RMS is matched to AdamW's (0.2 * sqrt(max(rows, columns)), arXiv 2502.16982), so both
    share one learning rate. Same arithmetic as torch.optim.Muon with adjust_lr_fn="match_rms_adamw", which
    always iterates in bfloat16; this one does so on GPUs and where `dtype` says so, and takes matrices of one shape
    together.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(parameter.shape)].append(parameter)
            for parameters in by_shape.values():
                at_once = max(1, MUON_ELEMENTS // parameters[0].numel())
                for start in range(0, len(parameters), at_once):
                    self._step_shape(parameters[start : start + at_once], group)

    def _step_shape(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer, grad = state["momentum_buffer"], parameter.grad
            assert grad is not None
            buffer.lerp_(grad, 1 - momentum)
            updates.append(parallel.gathered(grad.lerp(buffer, momentum)))  # Nesterov's look ahead
        dtype = torch.bfloat16 if parameters[0].is_cuda else self.dtype
        rows, columns = parameters[0].shape
        scale = lr * 0.2 * math.sqrt(max(rows, columns))
        for parameter, update in zip(parameters, orthogonalise(torch.stack(updates), dtype)):
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(parallel.like(update.to(parameter.dtype), parameter), alpha=-scale)


class Optimizers:
    """The optimizers of a run as one, by name: they share the schedule, and are saved together."""

    def __init__(self, by_name: dict[str, torch.optim.Optimizer], peaks: dict[str, float], peak: float) -> None:
        self.by_name, self.peaks, self.peak = by_name, peaks, peak

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return list(self.by_name.values())

    def set_lr(self, lr: float) -> None:
        """The model's learning rate; an optimizer whose peak is another keeps its proportion to it."""
        for name, optimizer in self.by_name.items():
            for group in optimizer.param_groups:
                value = lr * self.peaks[name] / self.peak if self.peaks[name] != self.peak else lr
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(value)  # torchao's compiled step reads it
                else:
                    group["lr"] = value

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {name: to_plain(optimizer.state_dict()) for name, optimizer in self.by_name.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError where the saved run used other optimizers, or for other parameters."""
        for name, optimizer in self.by_name.items():
            if name not in state:
                raise UserError(
                    f"the checkpoint has no state of the optimizer {name}, but of {' and '.join(state)}: "
                    "repeat the run's --optimizer and --learning_rate (they stand in its training_config.json)"
                )
            try:
                optimizer.load_state_dict(from_plain(_divided(state[name], optimizer)))
                moments = [
                    (tuple(value.shape), tuple(parameter.shape))
                    for parameter, values in optimizer.state.items()
                    for value in values.values()
                    if isinstance(value, torch.Tensor) and value.ndim
                ]
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"the optimizer_state_dict of {name} cannot be used ({error})") from None
            for found, wanted in moments:
                if found != wanted:
                    raise UserError(f"the optimizer_state_dict of {name} holds {found} for a parameter of {wanted}")


def _divided(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A saved state of whole parameters with the parts of it that this process holds."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        index: {
            key: parallel.like(value, parameters[index]) if value.shape == parameters[index].shape else value
            for key, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": parts}


def build_optimizers(
    model: nn.Module,
    settings: OptimSettings,
    beside: Mapping[str, nn.Module] | None = None,
    rates: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Optimizers:
    """AdamW alone (with moments of 32 or 8 bits), or Muon for the matrices inside the layers and AdamW for embeddings,
    head, router and norms. Weight decay falls on matrices only.

    Args:
        beside: modules that learn beside the model, by name. rates: their peak learning rates, where not the model's.
        dtype: of the run's matrix products; in bfloat16 Muon iterates in it, too.
    """
    by_name = _optimizers_of(model, settings, settings.learning_rate, dtype)
    peaks = dict.fromkeys(by_name, settings.learning_rate)
    for name, module in (beside or {}).items():
        rate = (rates or {}).get(name, settings.learning_rate)
        for kind, optimizer in _optimizers_of(module, settings, rate, dtype).items():
            by_name[f"{name}.{kind}"], peaks[f"{name}.{kind}"] = optimizer, rate
    return Optimizers(by_name, peaks, settings.learning_rate)


def _optimizers_of(
    model: nn.Module, settings: OptimSettings, lr: float, dtype: torch.dtype
) -> dict[str, torch.optim.Optimizer]:
    muon: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = ".layers." in name and parameter.ndim == 2 and not name.endswith("mlp.gate.weight")
        if settings.optimizer == "muon" and inside:
            muon.append(parameter)
        else:
            (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if muon:
        optimizers["muon"] = Muon(muon, lr=lr, weight_decay=settings.weight_decay, dtype=dtype)
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw8bit":
        optimizers["adamw8bit"] = adamw_8bit(groups, lr=lr, betas=betas)
    else:
        optimizers["adamw"] = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    return optimizers


def learning_rate(step: int, *, total: int, warmup: int, peak: float, final_ratio: float) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to peak * final_ratio.
    `step` counts from 0; the first step is already above zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (final_ratio + (1.0 - final_ratio) * cosine)


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """The joint norm of tensors on one device: []. A CPU's kernel adds squares up one after another, in float32, and is
    2e-4 wrong for 3 million of them; row by row it takes the same time and is right."""
    if not grads or grads[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(grads)
    rows = [torch.linalg.vector_norm(grad, dim=-1).view(-1) for grad in grads]
    return torch.linalg.vector_norm(torch.cat(rows), dtype=torch.float64)


@torch.profiler.record_function("part: gradient clipping")  # for train/profile.py
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `limit` (0: leave them); returns the norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    grads = [parallel.local(gradient) for gradient in gradients]
    norm = parallel.joint_norm(total_norm(grads), gradients).float()
    if limit > 0:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        if norm.is_cuda or bool(scale < 1.0):
            torch._foreach_mul_(grads, scale)
    return norm
