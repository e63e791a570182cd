"""Each preference loss against its paper, written out slowly, and against TRL's."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minillm.methods.preference_losses import (
    bradley_terry_loss,
    ipo_loss,
    kto_loss,
    log_odds_ratio,
    orpo_loss,
    sigmoid_loss,
    simpo_loss,
)

RANDOM = np.random.default_rng(0)
ONE, TWO = (torch.from_numpy(RANDOM.normal(0, 3, 7)).float() for _ in range(2))  # ratios, or rewards
MEAN_ONE, MEAN_TWO = (torch.from_numpy(-RANDOM.exponential(1.0, 7)).float() for _ in range(2))  # nats a token, below 0


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def by_hand(function: Any, *rows: Tensor) -> list[float]:
    """A formula of numbers, row by row."""
    return [function(*values) for values in zip(*(row.tolist() for row in rows))]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_sigmoid_is_the_dpo_paper_s_loss(smoothing: float) -> None:
    def paper(chosen: float, rejected: float) -> float:
        difference = 0.3 * (chosen - rejected)
        return -(1 - smoothing) * math.log(sigmoid(difference)) - smoothing * math.log(1 - sigmoid(difference))

    assert sigmoid_loss(ONE, TWO, 0.3, smoothing).tolist() == pytest.approx(by_hand(paper, ONE, TWO), rel=1e-4)


def test_sigmoid_pulls_chosen_up_and_rejected_down_and_never_overflows() -> None:
    chosen, rejected = (torch.tensor(values, requires_grad=True) for values in ([0.0, -1e4], [0.0, 1e4]))
    losses = sigmoid_loss(chosen, rejected, 0.1)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([math.log(2), 2000.0])
    assert chosen.grad is not None and chosen.grad.tolist() == pytest.approx([-0.05, -0.1])
    assert rejected.grad is not None and rejected.grad.tolist() == pytest.approx([0.05, 0.1])


def test_ipo_is_the_paper_s_square() -> None:
    paper = by_hand(lambda chosen, rejected: (chosen - rejected - 1 / (2 * 0.25)) ** 2, ONE, TWO)
    assert ipo_loss(ONE, TWO, 0.25).tolist() == pytest.approx(paper, rel=1e-5)


def test_simpo_is_the_paper_s_loss_with_a_margin() -> None:
    def paper(chosen: float, rejected: float) -> float:
        return -math.log(sigmoid(2.5 * chosen - 2.5 * rejected - 0.8))

    losses = simpo_loss(MEAN_ONE, MEAN_TWO, 2.5, 0.8)
    assert losses.tolist() == pytest.approx(by_hand(paper, MEAN_ONE, MEAN_TWO), rel=1e-4)


def test_orpo_is_the_paper_s_likelihood_and_odds_ratio() -> None:
    def odds(mean: float) -> float:
        return math.exp(mean) / (1 - math.exp(mean))

    def paper(chosen: float, rejected: float) -> float:
        return -chosen + 0.4 * -math.log(sigmoid(math.log(odds(chosen) / odds(rejected))))

    assert orpo_loss(MEAN_ONE, MEAN_TWO, 0.4).tolist() == pytest.approx(by_hand(paper, MEAN_ONE, MEAN_TWO), rel=1e-4)


def test_the_odds_of_what_is_certain_are_finite() -> None:
    sure = torch.zeros(1, requires_grad=True)
    ratio = log_odds_ratio(sure, torch.tensor([-1e-3]))
    ratio.sum().backward()
    assert sure.grad is not None and math.isfinite(ratio.item()) and math.isfinite(sure.grad.item())


def test_kto_weighs_gains_and_losses_against_the_baseline() -> None:
    wanted = torch.tensor([True, False, True, True, False, False, True])

    def paper(ratio: float, is_wanted: bool) -> float:
        value = 1.5 * sigmoid(0.2 * (ratio - 0.7)) if is_wanted else 0.6 * sigmoid(0.2 * (0.7 - ratio))
        return (1.5 if is_wanted else 0.6) - value

    losses = kto_loss(ONE, wanted, torch.tensor(0.7), 0.2, 1.5, 0.6)
    assert losses.tolist() == pytest.approx(by_hand(paper, ONE, wanted), rel=1e-4)


def test_bradley_terry_prefers_what_was_chosen_and_keeps_the_mean_at_zero() -> None:
    def paper(chosen: float, rejected: float) -> float:
        return -math.log(sigmoid(chosen - rejected)) + 0.01 * (chosen + rejected) ** 2

    assert bradley_terry_loss(ONE, TWO, 0.01).tolist() == pytest.approx(by_hand(paper, ONE, TWO), rel=1e-4)
    shift = torch.zeros(1, requires_grad=True)
    bradley_terry_loss(ONE + shift, TWO + shift, 0.01).sum().backward()
    assert shift.grad is not None and shift.grad.item() == pytest.approx(0.04 * (ONE + TWO).sum().item(), rel=1e-3)


# TRL, whose losses are methods of trainers: called with a stand-in for the trainer, so that none has to be built.
# They are slow only because importing it takes so long.

ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def trainer(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(
        accelerator=ACCELERATOR, model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, use_weighting=False, label_smoothing=0.0, f_divergence_type="reverse_kl",
        loss_weights=[1.0], _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **values,
    )  # fmt: skip


def answers(rows: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, 9] of tokens behind the first, 0 where the mask [B, 10] has none of an answer."""
    lengths = torch.from_numpy(RANDOM.integers(2, 8, rows))
    mask = (torch.arange(10) >= 2) & (torch.arange(10) < 2 + lengths[:, None])
    return -torch.from_numpy(RANDOM.exponential(1.0, (rows, 9))).float() * mask[:, 1:], mask.long()


def says(log_probs: Tensor) -> Any:
    """A model that gives these log-probabilities."""
    none = torch.zeros_like(log_probs)
    output = SimpleNamespace(log_probs=log_probs, entropy=none, mean_logits=none, is_top1=none.bool())
    return lambda **_: output


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_losses_on_pairs_are_those_of_trl(loss: str) -> None:
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    log_probs, mask = answers(8)
    reference = -torch.from_numpy(RANDOM.exponential(5.0, 8)).float()
    inputs = {
        "input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": reference[:4], "ref_rejected_logps": reference[4:],
    }  # fmt: skip
    theirs = dpo.DPOTrainer._compute_loss(
        trainer(beta=0.3, loss_types=[loss]), says(log_probs), inputs, return_outputs=False
    )
    ratio = log_probs.sum(1) - reference
    ours = ipo_loss(*(ratio / mask.sum(1)).chunk(2), 0.3) if loss == "ipo" else sigmoid_loss(*ratio.chunk(2), 0.3)
    assert ours.mean().item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.slow
def test_simpo_and_orpo_are_those_of_trl() -> None:
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    theirs, *_ = cpo.CPOTrainer.cpo_loss(
        trainer(beta=2.0, alpha=0.0, loss_type="simpo", simpo_gamma=0.7), MEAN_ONE, MEAN_TWO
    )
    assert simpo_loss(MEAN_ONE, MEAN_TWO, 2.0, 0.7).tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    gains, *_ = orpo.ORPOTrainer.odds_ratio_loss(trainer(beta=0.4), MEAN_ONE, MEAN_TWO)
    # It takes the gain off a likelihood loss of prompt and answer, over all tokens; ours is that of the answer.
    assert orpo_loss(MEAN_ONE, MEAN_TWO, 0.4).tolist() == pytest.approx((-MEAN_ONE - gains).tolist(), rel=1e-4)


@pytest.mark.slow
def test_kto_is_that_of_trl() -> None:
    kto = pytest.importorskip("trl.trainer.kto_trainer")
    log_probs, mask = answers(6)
    mismatched, reference, mismatched_reference = (
        -torch.from_numpy(RANDOM.exponential(5.0, 6)).float() for _ in range(3)
    )
    wanted = torch.tensor([True, False, False, True, True, False])
    inputs = {
        "input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask, "label": wanted,
        "ref_logps": reference, "ref_KL_logps": mismatched_reference - 3.0,
    }  # fmt: skip
    theirs = kto.KTOTrainer._compute_loss(
        trainer(
            beta=0.2, loss_type="kto", calculate_KL=True, desirable_weight=1.5, undesirable_weight=0.6,
            _compute_kl_logps=lambda *_: mismatched,
        ),
        says(log_probs), inputs, return_outputs=False,
    )  # fmt: skip
    baseline = (mismatched - (mismatched_reference - 3.0)).mean().clamp(min=0)
    assert baseline > 0
    ours = kto_loss(log_probs.sum(1) - reference, wanted, baseline, 0.2, 1.5, 0.6)
    assert ours.mean().item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.slow
def test_bradley_terry_is_that_of_trl() -> None:
    reward = pytest.importorskip("trl.trainer.reward_trainer")
    theirs = reward.RewardTrainer.compute_loss(
        trainer(args=SimpleNamespace(center_rewards_coefficient=0.01)),
        lambda **_: SimpleNamespace(logits=torch.cat((ONE, TWO))[:, None]),
        {"attention_mask": torch.ones(14, 3)},
    )
    assert bradley_terry_loss(ONE, TWO, 0.01).mean().item() == pytest.approx(theirs.item(), rel=1e-5)
