"""Gradient checkpointing keeps less and changes nothing: the same losses and gradients, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from denoisers import CPU, belief, diffusion
from tiny import random_model, tiny_config
from torch import Tensor

from minillm.data.batches import Batch, PairBatch
from minillm.families.autoregressive import Autoregressive
from minillm.methods.base import Method
from minillm.methods.dpo import DirectPreference
from minillm.methods.likelihood import Likelihood
from minillm.methods.settings import PreferenceSettings
from minillm.models.transformer import LanguageModel
from minillm.train.recompute import checkpoint_layers

FAMILIES: dict[str, Any] = {
    "ar": Autoregressive(), "diffusion": diffusion(), "aggregate": belief(), "bilateral": belief(denoiser="bilateral"),
}  # fmt: skip
KINDS = ["selective", "full"]


def model_of(family: str, **changes: Any) -> LanguageModel:
    traits = FAMILIES[family]
    return random_model(tiny_config(causal=traits.causal, denoiser=traits.denoiser, **changes)).train()


def rows(seed: int) -> Batch:
    tokens = np.random.default_rng(seed).integers(5, 50, (3, 12))
    segments = np.repeat([[0] * 7 + [1] * 5], 3, axis=0).astype(np.int32)
    return Batch(tokens, np.ones(tokens.shape, bool), None, segments, np.arange(3))


def learned(method: Method, model: LanguageModel, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of every parameter."""
    loss = method.loss(model, method.prepare(model, batch, CPU, 0, 0).data).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_same(method: Method, batch: Any, family: str, kind: str, **changes: Any) -> None:
    plain, checkpointed = model_of(family, **changes), model_of(family, **changes)
    checkpoint_layers(checkpointed, kind)
    (loss, gradients), (again, other) = (learned(method, model, batch) for model in (plain, checkpointed))
    assert torch.equal(loss, again) and gradients.keys() == other.keys()
    assert all(torch.equal(gradients[name], other[name]) for name in gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_of_every_family_are_the_same_bits(family: str, experts: bool, kind: str) -> None:
    check_same(Likelihood(FAMILIES[family], seed=0), rows(0), family, kind, use_moe=experts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_learns_the_same_bits(family: str, kind: str) -> None:
    method = DirectPreference(FAMILIES[family], model_of(family).eval(), PreferenceSettings(), seed=0)
    check_same(method, PairBatch(rows(1), rows(2)), family, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_products_beside_float32_weights_learn_the_same_bits(kind: str) -> None:
    results = []
    for each in ("none", kind):
        model = model_of("ar")
        checkpoint_layers(model, each)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            method = Likelihood(FAMILIES["ar"], seed=0)
            summed = method.loss(model, method.prepare(model, rows(0), CPU, 0, 0).data).loss
        summed.backward()  # outside of autocast, as in the loop
        results.append((summed.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    (loss_plain, plain), (loss_again, again) = results
    assert torch.equal(loss_plain, loss_again)
    assert all(torch.equal(one, two) and one.dtype == torch.float32 for one, two in zip(plain, again))


def test_gpt2_layers_learn_the_same_bits() -> None:
    changes = {"model_type": "gpt2", "num_key_value_heads": 4}
    check_same(Likelihood(FAMILIES["ar"], seed=0), rows(0), "ar", "full", **changes)


def kept_bytes(model: LanguageModel) -> int:
    """What a forward pass keeps for its gradient, beside the weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.arange(48).view(4, 12))
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


@pytest.mark.usefixtures("plain_products")  # they keep attention's weights, which are much of so small a model
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "moe"])
def test_selective_keeps_less_than_none_and_full_less_than_selective(experts: bool) -> None:
    sizes = []
    for kind in ("none", *KINDS):
        model = model_of("ar", use_moe=experts, num_hidden_layers=6)
        checkpoint_layers(model, kind)
        sizes.append(kept_bytes(model))
    assert sizes[1] < 0.75 * sizes[0] and sizes[2] < 0.3 * sizes[0]


def test_nothing_is_computed_twice_where_there_is_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("checkpointed without need")

    monkeypatch.setattr("minillm.train.recompute.checkpoint", forbidden)
    model = model_of("ar")
    checkpoint_layers(model, "full")
    with torch.no_grad():
        model(torch.arange(12).view(1, 12))
    with pytest.raises(AssertionError, match="without need"):
        model(torch.arange(12).view(1, 12))


def test_names_of_parameters_stay() -> None:
    plain, model = model_of("bilateral"), model_of("bilateral")
    checkpoint_layers(model, "full")
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_layers_learn_the_same_bits(alone: None, kind: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, method = model_of("ar"), Likelihood(FAMILIES["ar"], seed=0)
    loss, gradients = learned(method, model_of("ar"), rows(0))
    checkpoint_layers(model, kind)
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    again, other = learned(method, model, rows(0))
    assert torch.equal(loss, again)
    for name, gradient in other.items():
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        assert torch.equal(gradients[name], whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_learn_the_same_without_a_break_in_the_graph(kind: str) -> None:
    from torch._dynamo.utils import counters

    method, results = Likelihood(FAMILIES["ar"], seed=0), []
    for each in ("none", kind):
        model = model_of("ar")
        checkpoint_layers(model, each)
        for layer in model.model.layers:
            layer.compile()
        results.append(learned(method, model, rows(0)))
    (loss, gradients), (again, other) = results
    torch.testing.assert_close(loss, again)
    torch.testing.assert_close(gradients, other)
    assert not counters["graph_break"]
