"""Chunked cross-entropy and log-probabilities equal the plain ones, and never hold all logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.models import heads
from minillm.models.heads import token_log_probs, weighted_cross_entropy

VOCABULARY = 37


def inputs(rows: int = 3, length: int = 70, width: int = 8) -> tuple[torch.Tensor, ...]:
    """hidden, head, targets, weights; about a third of the weights are zero."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(rows, length, width, generator=generator)
    head = torch.randn(VOCABULARY, width, generator=generator)
    targets = torch.randint(VOCABULARY, (rows, length), generator=generator)
    weights = torch.rand(rows, length, generator=generator) * 2
    weights[torch.rand(rows, length, generator=generator) < 0.3] = 0.0
    return hidden.requires_grad_(), head.requires_grad_(), targets, weights


def plain(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of every token [B, L] in float64."""
    logits = hidden @ head.T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


@pytest.fixture(params=[1 << 21, 64 * VOCABULARY], ids=["one-chunk", "many-chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(heads.CHUNK_ELEMENTS, "cpu", request.param)
    return request.param


def test_weighted_cross_entropy_is_the_plain_one(chunks: int) -> None:
    hidden, head, targets, weights = inputs()
    hidden64, head64 = (t.detach().double().requires_grad_() for t in (hidden, head))
    ours = weighted_cross_entropy(hidden, head, targets, weights)
    losses = plain(hidden64, head64, targets)
    reference = (losses * weights).sum()
    (ours.loss * 0.25).backward()
    (reference * 0.25).backward()
    assert ours.loss.item() == pytest.approx(reference.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, hidden64.grad, check_dtype=False, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head.grad, head64.grad, check_dtype=False, atol=1e-5, rtol=1e-4)
    right = ((hidden64 @ head64.T).argmax(-1) == targets) & (weights != 0)
    assert torch.equal(ours.hits, right)
    torch.testing.assert_close(ours.losses.sum(), ours.loss.detach())


def test_token_log_probs_are_the_plain_ones(chunks: int) -> None:
    hidden, head, targets, weights = inputs()
    mask = weights != 0
    hidden64, head64 = (t.detach().double().requires_grad_() for t in (hidden, head))
    ours = token_log_probs(hidden, head, targets, mask)
    reference = -plain(hidden64, head64, targets) * mask
    torch.testing.assert_close(ours, reference, check_dtype=False, atol=1e-5, rtol=1e-5)
    assert ours[~mask].eq(0).all()
    (ours * weights).sum().backward()
    (reference * weights).sum().backward()
    torch.testing.assert_close(hidden.grad, hidden64.grad, check_dtype=False, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head.grad, head64.grad, check_dtype=False, atol=1e-5, rtol=1e-4)


def test_a_case_worked_by_hand() -> None:
    # logits (ln 1, ln 3): probabilities 1/4 and 3/4. Two tokens: target 0 with weight 2, target 1 with weight 1.
    hidden = torch.ones(1, 2, 1, requires_grad=True)
    head = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    out = weighted_cross_entropy(hidden, head, torch.tensor([[0, 1]]), torch.tensor([[2.0, 1.0]]))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(2 * math.log(4) + math.log(4 / 3))
    assert out.hits.sum() == 1
    # d loss / d logits: 2 * (1/4 - 1, 3/4) and (1/4, 3/4 - 1)
    assert head.grad is not None and hidden.grad is not None
    assert head.grad.flatten().tolist() == pytest.approx([-1.25, 1.25])
    assert hidden.grad.flatten().tolist() == pytest.approx([1.5 * math.log(3), -0.25 * math.log(3)])


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_huge_logits_do_not_overflow(scale: float) -> None:
    hidden = torch.tensor([[[scale]], [[-scale]]], requires_grad=True)
    head = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    targets, weights = torch.tensor([[1], [1]]), torch.ones(2, 1)
    out = weighted_cross_entropy(hidden, head, targets, weights)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(2 * scale)
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    log_probs = token_log_probs(hidden, head, targets, weights.bool())
    assert log_probs.flatten().tolist() == pytest.approx([-2 * scale, 0.0])


def test_no_weight_at_all_is_a_loss_of_zero_with_zero_gradients() -> None:
    hidden, head, targets, weights = inputs()
    out = weighted_cross_entropy(hidden, head, targets, torch.zeros_like(weights))
    out.loss.backward()
    assert out.loss.item() == 0 and not out.hits.any()
    assert hidden.grad is not None and not hidden.grad.any()
    assert head.grad is not None and not head.grad.any()
    assert not token_log_probs(hidden, head, targets, torch.zeros_like(weights, dtype=torch.bool)).any()


def test_a_weight_of_zero_hides_even_a_broken_position() -> None:
    hidden, head, targets, weights = inputs()
    broken = hidden.detach().clone()
    broken[weights == 0] = float("nan")
    with torch.no_grad():
        clean = weighted_cross_entropy(hidden, head, targets, weights)
        assert torch.equal(weighted_cross_entropy(broken, head, targets, weights).loss, clean.loss)


def test_a_frozen_head_still_gives_the_hidden_gradient() -> None:
    hidden, head, targets, weights = inputs()
    weighted_cross_entropy(hidden, head, targets, weights).loss.backward()
    wanted, hidden.grad = hidden.grad, None
    weighted_cross_entropy(hidden, head.detach(), targets, weights).loss.backward()
    assert hidden.grad is not None and wanted is not None and torch.equal(hidden.grad, wanted)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


@pytest.mark.parametrize(("rows", "parts"), [(0, 0), (1, 1), (64, 1), (65, 2), (640, 10), (650, 11)])
def test_the_rows_are_cut_into_even_parts(rows: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads.CHUNK_ELEMENTS, "cpu", 64 * VOCABULARY)
    at_once = heads.chunk_rows(torch.empty(rows, 8), VOCABULARY)
    sizes = [min(at_once, rows - start) for start in range(0, rows, at_once)]
    assert len(sizes) == parts and sum(sizes) == rows
    assert not sizes or (max(sizes) <= 64 and max(sizes) - min(sizes) < parts)


@pytest.mark.parametrize("which", ["weighted_cross_entropy", "token_log_probs"])
def test_the_full_logits_never_exist(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets, weights = inputs(rows=8, length=160)
    monkeypatch.setitem(heads.CHUNK_ELEMENTS, "cpu", 64 * VOCABULARY)
    with LargestTensor() as largest:
        if which == "weighted_cross_entropy":
            weighted_cross_entropy(hidden, head, targets, weights).loss.backward()
        else:
            token_log_probs(hidden, head, targets, weights != 0).sum().backward()
    assert largest.elements <= hidden.numel() < 8 * 160 * VOCABULARY
