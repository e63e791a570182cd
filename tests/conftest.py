"""Fixtures that several files use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from nursery import Nursery

# Before torch is imported: on a busy machine two threads of one small test mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of generated data: pretrain, sft and dpo, with validation files."""
    from minillm.data.demo import generate_demo

    folder = tmp_path_factory.mktemp("demo")
    generate_demo(folder, size=120, seed=3)
    return folder


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts Python programs without importing torch anew."""
    with closing(Nursery(tmp_path_factory.mktemp("nursery"))) as one:
        yield one


@pytest.fixture
def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own matrix products and attention on every processor, for tests that compare with others who take these
    (what AMD's get rounds otherwise, by some 1e-5 of the largest logits) or count what they do."""
    from minillm.models import attention_products, linear

    monkeypatch.setattr(linear, "_CHOSEN", None)
    monkeypatch.setattr(attention_products, "AMD", False)
