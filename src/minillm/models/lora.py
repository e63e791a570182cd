"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W^T + scale * (x A^T) B^T with W frozen.

An adapter is a pair of matrices beside a linear layer's weight. The weights keep their names, an adapter's matrices are
called `{layer}.lora_A.{adapter}` and `{layer}.lora_B.{adapter}`. Several adapters may lie on a model; those that are
active count, each with its own weight. What is merged costs nothing when the model runs.

N tokens, R rank, I and O the layer's inputs and outputs: A [R, I], B [O, R].
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.models.config import LINEAR_LAYERS
from minillm.models.linear import Linear, multiply
from minillm.models.transformer import LanguageModel

DEFAULT = "default"  # the adapter that training makes
TRAINED_TOO = "score."  # a value head is new: it is trained beside the adapter
_KEY = re.compile(r"(.+)\.lora_([AB])\.(\w+)")


@dataclass(frozen=True)
class LoraConfig:
    """How an adapter is shaped: the layers whose last name is in `targets` get one of this rank."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = LINEAR_LAYERS

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        return cls(values["rank"], values["alpha"], tuple(values["targets"]))


class Pair(NamedTuple):
    """What an adapter adds to one layer: B A, before the scale."""

    a: Tensor  # [R, I]
    b: Tensor  # [O, R]


class _Adapted(torch.autograd.Function):
    """The layer and its adapter in one: products add to what is there, and the frozen weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = torch.mm(flat, a.t())
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return multiply(flat, weight).addmm_(low, b.t(), alpha=scale).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, weight, a, b, low = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        low_grad = torch.mm(flat, b).mul_(ctx.scale)
        a_grad = torch.mm(low_grad.t(), x.reshape(-1, x.shape[-1]))
        b_grad = torch.mm(flat.t(), low).mul_(ctx.scale)
        if not ctx.needs_input_grad[0]:
            return None, None, a_grad, b_grad, None
        return multiply(flat, weight.t()).addmm_(low_grad, a).view_as(x), None, a_grad, b_grad, None


class AdaptedLinear(Linear):
    """A linear layer with adapters beside its weight, which is that of the layer it replaces."""

    def __init__(self, layer: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scales: dict[str, float] = {}
        self.active: dict[str, float] = {}  # adapter -> weight
        self.unmerged: Tensor | None = None  # the weight, while adapters are merged into another in its place

    def add(self, name: str, pair: Pair, scale: float) -> None:
        """Lay an adapter beside the weight. Raises ValueError for shapes that do not fit or a name that is taken."""
        rank = len(pair.a)
        if pair.a.shape != (rank, self.in_features) or pair.b.shape != (self.out_features, rank):
            raise ValueError(
                f"A {tuple(pair.a.shape)} and B {tuple(pair.b.shape)} do not fit a layer of {self.in_features} inputs "
                f"and {self.out_features} outputs"
            )
        if name in self.scales:
            raise ValueError(f"there is an adapter {name!r} already")
        self.lora_A[name] = nn.Parameter(pair.a.to(self.weight))
        self.lora_B[name] = nn.Parameter(pair.b.to(self.weight))
        self.scales[name] = scale

    def _active(self) -> tuple[Tensor, Tensor, float]:
        """The active adapters as one of their joint rank: A, B and scale."""
        names = list(self.active)
        scales = [self.scales[name] * self.active[name] for name in names]
        if len(names) == 1:
            return self.lora_A[names[0]], self.lora_B[names[0]], scales[0]
        a = torch.cat([self.lora_A[name] for name in names])
        return a, torch.cat([self.lora_B[name] * scale for name, scale in zip(names, scales)], dim=1), 1.0

    def forward(self, x: Tensor) -> Tensor:
        product = self._product(x)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def _product(self, x: Tensor) -> Tensor:
        if not self.active or self.unmerged is not None:
            return super().forward(x)
        a, b, scale = self._active()
        by_hand = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if by_hand and not self.weight.requires_grad and not torch.compiler.is_compiling():
            return _Adapted.apply(x, self.weight, a, b, scale)
        return torch.add(super().forward(x), F.linear(F.linear(x, a), b), alpha=scale)

    @torch.no_grad()
    def merge(self) -> None:
        if self.unmerged is None and self.active:
            a, b, scale = self._active()
            self.unmerged = self.weight.data
            self.weight.data = merged(self.unmerged, Pair(a, b), scale)

    def unmerge(self) -> None:
        if self.unmerged is not None:
            self.weight.data, self.unmerged = self.unmerged, None


def merged(weight: Tensor, pair: Pair, scale: float) -> Tensor:
    """weight + scale * B A, in float32."""
    return torch.addmm(weight.float(), pair.b.float(), pair.a.float(), alpha=scale).to(weight.dtype)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """The layers with adapters, by name."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, AdaptedLinear))


def _adapted(model: nn.Module, path: str) -> AdaptedLinear:
    """The layer of this name, made ready for adapters. Raises ValueError where there is no linear layer."""
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if isinstance(layer, AdaptedLinear):
        return layer
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"the model has no linear layer {path}")
    parent, _, last = path.rpartition(".")
    new = AdaptedLinear(layer).train(layer.training)
    setattr(model.get_submodule(parent), last, new)
    return new


def add_adapter(model: LanguageModel, config: LoraConfig, seed: int, name: str = DEFAULT) -> None:
    """Give every target layer a new adapter, let it be the active one, and let it alone be trained.

    A begins uniform in +-1 / sqrt(inputs), as in peft; its values follow from the seed and the layer's name. B begins
    with zeros: the model says what it said. The router of experts, the embedding and the head have no adapter.

    Raises:
        ValueError: no layer of the model is a target, or the name is taken.
    """
    paths = [path for path, module in model.named_modules()
             if isinstance(module, nn.Linear) and path.rpartition(".")[2] in config.targets]  # fmt: skip
    if not paths:
        raise ValueError(f"the model has none of the layers {', '.join(config.targets)}")
    model.requires_grad_(False)
    for path in paths:
        layer = _adapted(model, path)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {path}.lora_A".encode()))
        bound = 1.0 / math.sqrt(layer.in_features)
        a = torch.empty(config.rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        layer.add(name, Pair(a, torch.zeros(layer.out_features, config.rank)), config.scale)
    for key, parameter in model.named_parameters():
        if key.startswith(TRAINED_TOO):
            parameter.requires_grad_(True)
    activate(model, {name: 1.0})


def adapter_size(model: nn.Module) -> int:
    """Number of parameters in adapters."""
    return sum(value.numel() for key, value in model.named_parameters() if _KEY.fullmatch(key))


def summary(model: nn.Module, config: LoraConfig) -> str:
    """An adapter in a line, for people."""
    size = adapter_size(model)
    total = sum(parameter.numel() for parameter in model.parameters()) - size
    on = "all linear layers" if set(config.targets) == set(LINEAR_LAYERS) else " ".join(config.targets)
    return (
        f"LoRA of rank {config.rank}, alpha {config.alpha:g}, on {on}: {size:,} parameters, {size / total:.2%} of the "
        "model's"
    )


def lay_adapter(model: nn.Module, pairs: Mapping[str, Pair], scale: float, name: str) -> None:
    """Lay an adapter that was trained beside the layers it names; `activate` switches it on.

    Raises:
        ValueError: a layer is not there or has other sizes, or the name is taken.
    """
    for path, pair in pairs.items():
        layer = _adapted(model, path)
        try:
            layer.add(name, pair, scale)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        layer.lora_A[name].requires_grad_(False)
        layer.lora_B[name].requires_grad_(False)


def activate(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Let these adapters count, each times its weight; {}: the model as it was without them.

    Raises:
        ValueError: there is no such adapter, or adapters are merged (`unmerge` first).
    """
    known = {name for _, layer in adapted_layers(model) for name in layer.scales}
    if unknown := sorted(set(weights) - known):
        raise ValueError(f"there is no adapter {unknown[0]!r}; there are {', '.join(sorted(known)) or 'none'}")
    for _, layer in adapted_layers(model):
        if layer.unmerged is not None:
            raise ValueError("adapters are merged into the weights: unmerge them first")
        layer.active = {name: weight for name, weight in weights.items() if name in layer.scales and weight}


def merge(model: nn.Module) -> None:
    """Add the active adapters to the weights, which are kept: the model gets faster and needs more memory."""
    for _, layer in adapted_layers(model):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Put the weights back that `merge` found, bit for bit."""
    for _, layer in adapted_layers(model):
        layer.unmerge()


def pairs_of(weights: Mapping[str, Tensor], name: str = DEFAULT) -> dict[str, Pair]:
    """The adapter of this name in a state dict, by layer."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        match = _KEY.fullmatch(key)
        if match and match[3] == name:
            found.setdefault(match[1], {})[match[2]] = value
    return {path: Pair(parts["A"], parts["B"]) for path, parts in found.items()}


def without_adapters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the matrices of adapters."""
    return {key: value for key, value in weights.items() if not _KEY.fullmatch(key)}


def folded(weights: Mapping[str, Tensor], pairs: Mapping[str, Pair], scale: float) -> dict[str, Tensor]:
    """A state dict with an adapter merged into it; the given tensors stay as they are.

    Raises:
        ValueError: a layer is not there or has other sizes.
    """
    result = dict(weights)
    for path, pair in pairs.items():
        weight = result.get(f"{path}.weight")
        if weight is None:
            raise ValueError(f"the model has no linear layer {path}")
        if weight.ndim != 2 or pair.a.shape != (len(pair.a), weight.shape[1]) or pair.b.shape != (
            len(weight), len(pair.a)
        ):  # fmt: skip
            raise ValueError(f"{path} is {tuple(weight.shape)}, the adapter has A {tuple(pair.a.shape)} and B "
                             f"{tuple(pair.b.shape)}")  # fmt: skip
        result[f"{path}.weight"] = merged(weight, pair, scale)
    return result


def base_of(model: LanguageModel) -> LanguageModel:
    """The model without its adapters, around the very same tensors: it costs no second copy of them."""
    with torch.device("meta"):
        base = LanguageModel(model.config)
    for path, module in base.named_modules():
        own = model.get_submodule(path)
        for name in module._parameters:
            setattr(module, name, getattr(own, name))
        module._buffers.update({name: own._buffers[name] for name in module._buffers})
    return base.train(model.training)
