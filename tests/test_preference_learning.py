"""Every preference loss and the reward model learn what is preferred (benchmarks/proofs/preference.py as a test)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "proofs" / "preference.py"


@pytest.fixture(scope="module")
def proof() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preference_proof", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_held_out_prompts_are_no_training_prompts_and_answers_are_as_described(proof: ModuleType) -> None:
    seen = {tuple(sorted(each)) for each in proof.prompts(500, 1024, held_out=False)}
    held_out = {tuple(sorted(each)) for each in proof.prompts(7, 256, held_out=True)}
    assert len(held_out) > 100 and not seen & held_out
    pair = proof.pairs([[9, 7, 12]], 0)
    assert pair.chosen.tokens[0][pair.chosen.loss_mask[0]].tolist() == [7, 9, 12, proof.END]
    assert pair.rejected.tokens[0][pair.rejected.loss_mask[0]].tolist() == [12, 9, 7, proof.END]
    rows = proof.labelled([[9, 7, 12], [8, 20, 10]], 0)
    assert rows.labels.tolist() == [True, False]
    assert rows.mismatched.tokens[0][:9].tolist() == [proof.START, 9, 7, 12, proof.ASKED, 20, 10, 8, proof.END]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ar", "diffusion", "sdd"])
def test_every_loss_learns_what_is_preferred_and_keeps_it_likely(family: str, proof: ModuleType) -> None:
    said: list[str] = []
    for seed in range(3):  # other rounding is another draw
        start = proof.tuned(family, seed)
        results = [proof.prove(family, kind, start, seed) for kind in proof.METHODS]
        if all(map(proof.passed, results)):
            return
        said += [proof.line(result) for result in results]
    pytest.fail("\n".join(said))
