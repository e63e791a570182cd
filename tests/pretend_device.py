"""A second device that is not there: `pretend`, on which every operation is the CPU's.

    python tests/pretend_device.py < commands.json        a list of minillm commands, each a list of words

Its tensors say that they are on it, and an operation on one of them and one of the CPU's is refused, as a GPU would
(a CPU tensor of no dimension may be mixed in, as there; a CPU index may not, since it would be copied each time). Like
Apple's GPU it has no float64. So a program that runs here leaves no tensor on the wrong side. What it cannot show is
what a GPU computes.

It must have its process to itself: PyTorch knows such a device until the process ends.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
BETWEEN = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}  # these lead from one device to the other


class Elsewhere(torch.Tensor):
    """A tensor on the device: a shell around one on the CPU."""

    held: torch.Tensor
    made = 0  # how many there have been

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        shell = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        shell.held = held
        cls.made += 1
        return shell

    def tolist(self) -> Any:  # PyTorch has none for subclasses
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Within it tensors can be made on the device, and brought there."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {})


def compute(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU, its result where the device's own would be.

    Raises:
        RuntimeError: tensors of both devices meet.
    """
    if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd"):
        with Pretend():  # made of others, which come here one by one
            return operation.decompose(*args, **kwargs)
    name = operation._schema.name
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    shells = [each for each in tensors if isinstance(each, Elsewhere)]
    strangers = [tuple(each.shape) for each in tensors if not isinstance(each, Elsewhere) and each.dim()]
    if shells and strangers and name not in BETWEEN:
        raise RuntimeError(f"{name}: tensors of shapes {strangers} are on the CPU, others on the device")
    there = bool(shells)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif name == "aten::copy_":
        there = isinstance(args[0], Elsewhere)
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    args, kwargs = tree_map(_held, (args, kwargs))
    result = operation(*args, **kwargs)
    known = {id(shell.held): shell for shell in shells}  # an operation in place gives back what it was given
    # A view of a normal tensor is a normal one, also where new tensors are made for inference.
    inference = torch.is_inference_mode_enabled() and all(shell.is_inference() for shell in shells)

    def place(each: Any) -> Any:
        if id(each) in known:
            return known[id(each)]
        if not there or not isinstance(each, torch.Tensor) or isinstance(each, Elsewhere):
            return each
        if each.dtype == torch.float64:
            raise TypeError(f"{name}: the device has no float64")
        with torch.inference_mode(inference):
            return Elsewhere(each)

    return tree_map(place, result)


def _held(each: Any) -> Any:
    return each.held if isinstance(each, Elsewhere) else each


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> torch.library.Library:
    """Make the device known. What it returns must be kept."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    original = torch.tensor

    def tensor(data: Any, *, device: Any = None, **named: Any) -> torch.Tensor:
        made = original(data, **named)  # it would make it on the device without asking the mode
        return made if device is None else made.to(device)

    torch.tensor = tensor  # type: ignore[assignment]

    # Indexing with lists asks for these below the mode.
    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
        return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))

    def empty(size: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
        return Elsewhere(torch.empty(size, dtype=dtype))

    def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        _held(target).copy_(_held(source))
        return target

    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


if __name__ == "__main__":
    from minillm.cli import main
    from minillm.train import job

    job.gemm_flops = lambda *_: 1e12  # what is not a CPU is asked for products of a GPU's size
    kept = register()
    with Pretend():
        for words in json.load(sys.stdin):
            before = Elsewhere.made
            if status := main(words):
                sys.exit(f"minillm {' '.join(words)}: {status}")
            if Elsewhere.made < before + 100:
                sys.exit(f"minillm {' '.join(words)}: only {Elsewhere.made - before} tensors were on the device")
