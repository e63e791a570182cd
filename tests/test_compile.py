"""Compiled layers: the whole step is captured, once. On a CPU and without code generation, which is what dynamo and
autograd's tracer need; the counters are theirs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from denoisers import CPU, IDS, belief, diffusion
from tiny import tiny_config
from torch._dynamo.utils import counters

from minillm.data.batches import Batch
from minillm.families.autoregressive import Autoregressive
from minillm.methods.likelihood import Likelihood
from minillm.models import attention, experts, transformer
from minillm.models.config import ModelConfig
from minillm.models.transformer import LanguageModel
from minillm.train.precision import compile_layers
from minillm.train.recompute import checkpoint_layers

LENGTH = 24
BOTH_WAYS = {"causal": False}


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def packed_batch(number: int) -> Batch:
    """Two rows with two documents and padding, the cuts elsewhere in each batch."""
    generator = np.random.default_rng(number)
    cuts = generator.integers(3, LENGTH - 6, size=2)
    segments = np.zeros((2, LENGTH), np.int32)
    positions = np.zeros((2, LENGTH), np.int64)
    for row, cut in enumerate(cuts):
        segments[row, cut:], segments[row, -2:] = 1, -1
        positions[row] = np.concatenate([np.arange(cut), np.arange(LENGTH - cut)])
    tokens = generator.integers(5, IDS.vocabulary, (2, LENGTH))
    return Batch(tokens, segments >= 0, positions, segments, np.arange(2) + 2 * number)


def gradients(config: ModelConfig, method: Likelihood, *, compiled: bool, steps: int, kind: str = "none") -> list[int]:
    """Train a few packed batches; the number of graphs that were compiled until after each."""
    model = LanguageModel(config).train()
    model.init_weights(0)
    checkpoint_layers(model, kind)
    if compiled:
        compile_layers(model, backend="aot_eager")
    graphs = []
    for number in range(steps):
        part = method.prepare(model, packed_batch(number), CPU, number, 2 * number)
        (method.loss(model, part.data).loss / part.count).backward()
        graphs.append(counters["stats"]["unique_graphs"])
    method.found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])  # type: ignore[attr-defined]
    return graphs


@pytest.mark.parametrize(
    ("family", "changes", "kind"),
    [
        pytest.param(Autoregressive(), {}, "none", id="ar"),
        pytest.param(diffusion(), BOTH_WAYS, "none", id="diffusion"),
        pytest.param(belief(), {**BOTH_WAYS, "denoiser": "aggregate"}, "none", id="sdd"),
        pytest.param(Autoregressive(), {"use_moe": True}, "none", id="ar-experts"),
        pytest.param(Autoregressive(), {"use_moe": True, "pad": True}, "none", id="ar-experts-padded"),
        pytest.param(belief(), {**BOTH_WAYS, "denoiser": "bilateral"}, "none", id="bilateral", marks=pytest.mark.slow),
        pytest.param(Autoregressive(), {}, "selective", id="ar-selective", marks=pytest.mark.slow),
        pytest.param(Autoregressive(), {}, "full", id="ar-full", marks=pytest.mark.slow),
        pytest.param(Autoregressive(), {"use_moe": True}, "full", id="ar-experts-full", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_layers_compile_once_without_a_graph_break_and_learn_the_same(family, changes, kind, monkeypatch):
    if changes.get("pad"):
        changes = {"use_moe": True}
        monkeypatch.setattr(experts, "by_shape", lambda x: True)
        monkeypatch.setattr(experts, "MANY_ROWS", 0)
    config, method = tiny_config(**changes), Likelihood(family, seed=0)
    graphs = gradients(config, method, compiled=True, steps=3, kind=kind)
    compiled = method.found
    assert not counters["graph_break"], counters["graph_break"]
    # One graph for all layers (and one without gradient, where the family asks the model first); none later.
    assert 1 <= graphs[0] <= (2 if family.name == "sdd" else 1) and graphs[-1] == graphs[0], graphs
    gradients(config, method, compiled=False, steps=3, kind=kind)
    torch.testing.assert_close(compiled, method.found, atol=1e-5, rtol=1e-3)


def random_segments(rows: int, length: int, seed: int) -> torch.Tensor:
    """Documents of any length, one after another, and padding at the end of some rows."""
    generator = np.random.default_rng(seed)
    segments = np.cumsum(generator.random((rows, length)) < 0.02, axis=1)
    segments[1:, -int(generator.integers(1, 40)) :] = -1
    return torch.from_numpy(segments)


@pytest.mark.filterwarnings("ignore:flex_attention called without")  # as it is on a CPU
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [40, 300])
def test_block_masks_of_packed_rows_attend_as_dense_masks_do(length, causal):
    segments = random_segments(3, length, seed=length)
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, length, 16) for heads in (4, 2, 2))
    blocks = attention.segment_blocks(segments, causal)
    expected = attention.attend(q, k, v, attention.segment_mask(segments, causal), causal)
    torch.testing.assert_close(attention.attend(q, k, v, blocks, causal), expected, atol=1e-5, rtol=1e-4)


def test_blocks_in_which_nobody_may_look_at_anybody_are_left_out():
    segments = torch.arange(4).repeat_interleave(attention.BLOCK)[None]  # four documents of one block each
    blocks = attention.segment_blocks(segments, causal=False)
    assert blocks.kv_num_blocks.flatten().tolist() == [1, 1, 1, 1]
    assert blocks.kv_indices[0, 0, :, 0].tolist() == [0, 1, 2, 3]


def test_a_model_reads_packed_rows_through_block_masks_and_compiles_them_once(monkeypatch):
    model = LanguageModel(tiny_config(head_dim=16, max_position_embeddings=160))
    model.init_weights(0)
    tokens = torch.randint(50, (3, 150))
    several = [random_segments(3, 150, seed) for seed in range(3)]
    with torch.no_grad():
        expected = [model(tokens, segments=segments).hidden for segments in several]
        # as on a GPU; FlexAttention has no backward pass on a CPU
        monkeypatch.setattr(
            transformer, "packed_mask", lambda segments, causal, *_, **__: attention.segment_blocks(segments, causal)
        )
        compile_layers(model, backend="eager")
        for segments, dense in zip(several, expected):
            torch.testing.assert_close(model(tokens, segments=segments).hidden, dense, atol=1e-5, rtol=1e-4)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
