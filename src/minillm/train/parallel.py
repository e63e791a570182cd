"""One run on several processes: who holds which part of the weights, and how gradients become one sum.

The model's code knows one device; everything here is laid around it. R replicas times S shards are the processes of a
run. The S processes of a replica share one copy of weights, gradients and optimizer state (PyTorch's `fully_shard`);
with S = 1 each has a whole copy, and gradients are added up after the last micro-batch. With R, S > 1 it is both
("HSDP"): the processes of a replica should be those of one machine, as they exchange the most.

Gradients are sums over all processes: the loop divides by the count of the whole step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm import processes
from minillm.log import UserError

BUCKET_ELEMENTS = 1 << 23  # 32 MiB of float32 go round at once
# A copy takes 16 bytes a parameter: weight, gradient and two moments of float32. Up to so many bytes everyone has one.
COMFORTABLE = {"cpu": 4 << 30, "cuda": 16 << 30}
BYTES_PER_PARAMETER = 16


def choose_shards(wanted: int, model: nn.Module, device: torch.device) -> int:
    """How many processes share a copy of the weights: as wanted; for 0 each has its own where it fits comfortably, else
    those of a machine share one.

    Raises:
        UserError: the processes cannot be divided into groups of so many.
    """
    size = processes.size()
    if wanted > size or size % max(wanted, 1):
        fitting = [str(number) for number in range(1, size + 1) if size % number == 0]
        raise UserError(
            f"--shards {wanted} does not divide the {size} process{'es' if size > 1 else ''} of this run: give one of "
            f"{', '.join(fitting)}, or 0 to let the size of the model decide"
        )
    if wanted:
        return wanted
    needed = BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in model.parameters())
    return 1 if needed <= COMFORTABLE.get(device.type, COMFORTABLE["cpu"]) else processes.local_size()


def described(shards: int) -> str:
    """The shape of a run, for people."""
    size, on = processes.size(), " share one copy of weights, gradients and optimizer state"
    if shards == 1:
        return f"{size} processes, each with a copy of the weights"
    if shards == size:
        return f"{size} processes{on} (FSDP)"
    return f"{size} processes: {size // shards} groups of {shards}, which{on} (HSDP)"


def distribute(trained: Sequence[nn.Module], shards: int, device: torch.device) -> None:
    """Give every process the main one's weights, and where `shards` > 1 leave each its part of them. The modules are
    models of ours on their device, compiled and with gradient checkpoints where they will be; optimizers come after.
    """
    if processes.size() == 1:
        return
    for module in trained:
        for parameter in module.parameters():
            dist.broadcast(parameter.data, src=0)
    if shards == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    replicas = processes.size() // shards
    sizes, names = ((replicas, shards), ("replicas", "shards")) if replicas > 1 else ((shards,), ("shards",))
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    for module in trained:
        for layer in cast(Any, module).model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        for part in _parts(module):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def _parts(module: nn.Module) -> list[Any]:
    """The modules inside that are gathered one by one, the whole one first."""
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def is_sharded(module: nn.Module) -> bool:
    """Does this process hold only a part of each of the module's parameters?"""
    if processes.size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


# -- gradients


def before_backward(trained: Iterable[nn.Module], *, last: bool) -> None:
    """Shards add up their gradients in the backward pass of the step's last micro-batch, and no earlier."""
    for module in trained:
        if is_sharded(module):
            cast(Any, module).set_requires_gradient_sync(last)


@torch.profiler.record_function("part: communication between processes")  # for train/profile.py
def sum_gradients(trained: Iterable[nn.Module], said: Tensor) -> Tensor:
    """Make gradients sums over all processes, where the backward pass has not; and sum `said` [n] along with it.

    A parameter that has no gradient anywhere keeps none, as with one process; one that has none here gets zeros.
    """
    if processes.size() == 1:
        return said
    parameters = [
        parameter
        for module in trained
        if not is_sharded(module)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    there = said.new_tensor([float(parameter.grad is not None) for parameter in parameters])
    both = processes.summed(torch.cat([said, there]))
    bucket: list[Tensor] = []
    for parameter, found in zip(parameters, both[len(said) :].tolist()):
        if not found:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(map(torch.numel, bucket)) >= BUCKET_ELEMENTS:
            _sum_together(bucket)
            bucket = []
    _sum_together(bucket)
    return both[: len(said)]


def _sum_together(tensors: list[Tensor]) -> None:
    if not tensors:
        return
    flat = processes.summed(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


def joint_norm(norm: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients, from that of what this process holds of them."""
    from torch.distributed.tensor import DTensor

    first = next((gradient for gradient in gradients if isinstance(gradient, DTensor)), None)
    if first is None:
        return norm
    squared = norm.square()
    dist.all_reduce(squared, group=first.device_mesh.get_group(-1))
    return squared.sqrt()


# -- weights


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it: the same memory."""
    if processes.size() == 1:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(value: Any) -> Any:
    """The same containers with whole tensors. All processes ask for the same."""
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item) for item in value)
    return value


def like(value: Tensor, other: Tensor) -> Tensor:
    """This process's part of a whole tensor that all of them have, divided as `other` is."""
    if processes.size() == 1:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor):
        return value
    whole = value.to(other.to_local().device)
    return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Within it every process has all weights of the module, and forward passes without gradient exchange nothing: each
    may make as many as it likes. All processes enter and leave together."""
    if not is_sharded(module) or getattr(module, "is_whole", False):
        yield
        return
    parts = _parts(module)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    parts[0].is_whole = True
    try:
        yield
    finally:
        parts[0].is_whole = False
        for part in parts:
            part.set_reshard_after_forward(part is not parts[0], recurse=False)
            part.reshard()
