"""PPO, GRPO and SPO learn from rewards alone (benchmarks/proofs/rewards.py as a test)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "proofs" / "rewards.py"


@pytest.fixture(scope="module")
def proof() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rewards_proof", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rewards_proof"] = module
    spec.loader.exec_module(module)
    return module


def test_held_out_sums_are_never_learned_from(proof: ModuleType) -> None:
    held_out = set(proof.sums(of_held_out=True))
    assert len(held_out) > 1000 and held_out.isdisjoint(proof.sums(of_held_out=False))
    # Every digit occurs in every place on both sides: what is held out is a pair, not a digit.
    for pairs in (held_out, proof.sums(of_held_out=False)):
        assert {(a % 10, b % 10) for a, b in pairs} == {(a, b) for a in range(10) for b in range(10)}


def test_the_careless_pupil_is_right_only_where_there_is_a_carry(proof: ModuleType) -> None:
    assert (proof.careless(27, 38), proof.careless(21, 34)) == (65, 65)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ar", "diffusion", "sdd"])
def test_accuracy_on_held_out_sums_rises_from_one_of_three_starts(proof: ModuleType, name: str) -> None:
    cells = [cell for cell in proof.CELLS if cell.startswith(f"{name}:")]
    said: list[str] = []
    for seed in range(3):  # other rounding is another draw, and some starts never learned to add
        start = proof.fine_tuned(name, seed, proof.TUNING_STEPS[name])
        results = [proof.prove(cell, start, seed) for cell in cells]
        if all(map(proof.passed, results)):
            return
        said += [proof.line(result) for result in results]
    pytest.fail("\n".join(said))
