"""Attention by batched products says what attention says, and hands back its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import random_model, tiny_config
from torch import Tensor

from minillm.models import attention_products
from minillm.models.attention import attend, segment_mask
from minillm.models.heads import weighted_cross_entropy

WIDTH = 16
KINDS = ("causal", "documents", "documents, both ways", "all")


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_products, "AMD", True)


def inputs(length: int, heads: int, shared: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v as layers have them, [B, H, L, E] laid out as [B, L, H, E], and a gradient."""
    generator = torch.Generator().manual_seed(length)
    counts = (heads, heads // shared, heads // shared, heads)
    made = [torch.randn(2, length, count, WIDTH, generator=generator).to(dtype).transpose(1, 2) for count in counts]
    return *(tensor.requires_grad_() for tensor in made[:3]), made[3]


def mask_of(kind: str, length: int) -> Tensor | None:
    if not kind.startswith("documents"):
        return None
    segments = torch.stack([torch.arange(length) // 11, torch.arange(length) // (length // 2 + 1)])
    return segment_mask(segments, causal="both" not in kind)


def both(kind: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What is said and the three gradients: by products, and by PyTorch in float64."""
    mask = mask_of(kind, q.shape[2])
    out = attention_products.attend(q, k, v, mask, kind == "causal")
    wide = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*wide, attn_mask=mask, is_causal=kind == "causal", enable_gqa=True)
    found = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    return found, [wanted, *torch.autograd.grad(wanted, wide, grad.double())]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "heads", "shared"), [(2, 2, 1), (33, 4, 2), (64, 3, 3), (150, 2, 1)])
def test_words_and_gradients_are_those_of_float64(kind: str, length: int, heads: int, shared: int) -> None:
    for found, wanted in zip(*both(kind, *inputs(length, heads, shared)), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_they_are_as_near_as_those_of_the_kernel(kind: str) -> None:
    q, k, v, grad = inputs(150, 4, 2, torch.bfloat16)
    mask = mask_of(kind, 150)
    by_kernel = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind == "causal", enable_gqa=True)
    kernel = [by_kernel, *torch.autograd.grad(by_kernel, (q, k, v), grad)]
    for found, wanted, theirs in zip(*both(kind, q, k, v, grad), kernel, strict=True):
        assert found.dtype == torch.bfloat16
        distance, usual = (((tensor - wanted).norm() / wanted.norm()).item() for tensor in (found, theirs))
        assert distance < 2.5 * usual and distance < 0.01


def test_who_may_see_nothing_says_nothing_infinite_and_moves_no_other() -> None:
    """A row's padding, if a mask hides even itself."""
    q, k, v, grad = inputs(70, 2, 1)
    mask = torch.ones(2, 1, 70, 70, dtype=torch.bool).tril()
    mask[0, :, :40], mask[0, :, :, :40] = False, False
    grad[0, :, :40] = 0.0  # nobody asks what padding says
    out = attention_products.attend(q, k, v, mask, causal=False)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    assert out.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    assert all(not gradient[0, :, :40].any() for gradient in gradients)
    alone = attention_products.attend(*(tensor[:1, :, 40:] for tensor in (q, k, v)), None, causal=True)
    torch.testing.assert_close(out[:1, :, 40:], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_without_a_gradient_they_say_the_same_bits(dtype: torch.dtype) -> None:
    q, k, v, _ = inputs(70, 4, 2, dtype)
    with torch.no_grad():
        said = attention_products.attend(q, k, v, None, causal=True)
    assert torch.equal(said, attention_products.attend(q, k, v, None, causal=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_compiler_is_told_the_shapes_and_layouts_that_come_out(dtype: torch.dtype, masked: bool) -> None:
    q, k, v, grad = (tensor.detach() for tensor in inputs(70, 4, 2, dtype))
    mask = mask_of("documents", 70) if masked else None
    _, kept = attention_products._forward(q, k, v, mask, not masked, True)
    checks = ("test_schema", "test_faketensor")
    for keep in (True, False):
        torch.library.opcheck(
            attention_products._forward_compiled, (q, k, v, mask, not masked, keep), test_utils=checks
        )
    arguments = (grad, q, k, v, kept, mask, not masked)
    torch.library.opcheck(attention_products._backward_compiled, arguments, test_utils=checks)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_a_model_learns_the_same_with_them(low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.arange(80).view(2, 40) * 7 % 50
    segments = torch.arange(40).expand(2, 40) // 15
    asked: list[bool] = []
    multiply = attention_products.attend
    monkeypatch.setattr(attention_products, "attend", lambda *given: (asked.append(given[-1]), multiply(*given))[1])
    losses, gradients = [], []
    for fast in (False, True):
        monkeypatch.setattr(attention_products, "AMD", fast)
        model = random_model(tiny_config(), scale=0.3).train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            hidden = [model(tokens).hidden, model(tokens, segments=segments).hidden]
            parts = [
                weighted_cross_entropy(one, model.head_weight, tokens.roll(-1, 1), torch.ones(2, 40)).loss
                for one in hidden
            ]
        loss = parts[0] + parts[1]
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        assert len(asked) == (2 * model.config.num_hidden_layers if fast else 0)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if low else 1e-6)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < (0.03 if low else 1e-5)


@pytest.mark.usefixtures("amd")
def test_they_are_taken_where_they_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = inputs(40, 2, 1)
    low = [tensor.bfloat16() for tensor in (q, k, v)]
    mask = mask_of("documents", 40)
    suit = attention_products.suit
    assert suit(q, k, v, None, True) and suit(q, k, v, mask, False) and suit(*low, None, False)
    assert not suit(q, k, v, None, False)  # in float32 the kernel is faster where everybody sees everything
    assert not suit(q[:, :, -1:], k, v, None, False)  # a step of generation
    assert not suit(*(tensor.double() for tensor in (q, k, v)), None, True)
    long = [torch.zeros(1, 1, attention_products.LONGEST + 1, 2, requires_grad=True)] * 3
    assert not suit(*long, None, True)
    monkeypatch.setattr(attention_products, "AMD", False)
    assert not suit(q, k, v, None, True)
    assert attend(q, k, v, None, True).grad_fn.name().startswith("ScaledDotProduct")
