"""Weights laid out for a few rows multiply as the weights themselves do, whatever the processor."""

from __future__ import annotations

import pytest
import torch

from minillm.models import products
from minillm.models.products import Product

IN, OUT = 48, (32, 16)


needs_onednn = pytest.mark.skipif(products.ONEDNN is None, reason="this torch has no oneDNN")


@pytest.fixture(params=[pytest.param("AMD", marks=needs_onednn), "others"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "AMD", request.param == "AMD")


any_processor = pytest.mark.usefixtures("processor")


def weights() -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(out, IN, generator=generator) for out in OUT], torch.rand(IN, generator=generator) + 0.5


@any_processor
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 16, 17, 40])
@torch.inference_mode()
def test_products_are_those_of_the_scaled_weights_below_each_other(rows: int) -> None:
    parts, scale = weights()
    product = Product(parts, torch.float32, scale)
    x = torch.randn(rows, IN)
    wanted = (x.double() * scale) @ torch.cat(parts).double().T
    for _ in range(2):  # the second time with the layout of the first
        torch.testing.assert_close(product(x), wanted.float(), rtol=1e-5, atol=1e-5)


@any_processor
@pytest.mark.parametrize("rows", [1, 2, 8, 20])
@torch.inference_mode()
def test_a_product_is_added_to_the_stream(rows: int) -> None:
    (weight, _), _ = weights()
    x, inner = torch.randn(rows, len(weight)), torch.randn(rows, IN)
    torch.testing.assert_close(
        Product([weight], torch.float32).added(x, inner), x + inner @ weight.T, rtol=1e-5, atol=1e-5
    )


@any_processor
@pytest.mark.parametrize("rows", [1, 2, 16])
@torch.inference_mode()
def test_low_precision_stays_near_and_the_stream_keeps_its_width(rows: int) -> None:
    (weight, _), scale = weights()
    product, x = Product([weight], torch.bfloat16, scale), torch.randn(rows, IN)
    wanted = (x * scale) @ weight.T
    found = product(x)
    assert found.dtype == torch.bfloat16
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.02
    assert product.added(wanted, x).dtype == torch.float32


@any_processor
def test_autocast_decides_the_format_of_a_wide_product() -> None:
    (weight, _), _ = weights()
    with torch.autocast("cpu", torch.bfloat16):
        assert Product([weight], torch.float32)(torch.randn(4, IN)).dtype == torch.bfloat16


@any_processor
def test_float64_is_multiplied_in_full() -> None:
    (weight, _), _ = weights()
    x = torch.randn(4, IN, dtype=torch.float64)
    torch.testing.assert_close(Product([weight], torch.float64)(x), x @ weight.double().T, rtol=1e-12, atol=1e-12)


def test_a_single_row_needs_no_second_copy_of_a_weight_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "AMD", True)
    (weight, _), _ = weights()
    product = Product([weight], torch.float32)
    product(torch.randn(1, IN))
    assert product._joined.data_ptr() == weight.data_ptr()
