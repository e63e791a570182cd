"""The divergences of distillation equal the papers' formulas, in value and gradient, and never hold all logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_heads import LargestTensor

from minillm.models import heads
from minillm.models.divergence import DIVERGENCES, Distilled, Objective, States, TopK, distillation_loss, top_k

VOCABULARY = 37
BETA = 0.3
EVERY = pytest.mark.parametrize(
    "objective", [Objective(name, BETA, temperature) for name in DIVERGENCES for temperature in (1.0, 2.5)],
    ids=lambda each: f"{each.divergence}-T{each.temperature:g}",
)  # fmt: skip


class Inputs:
    """Student, teacher of another width, targets, weights of which a third is zero, a share of cross-entropy a row."""

    def __init__(self, rows: int = 3, length: int = 70) -> None:
        generator = torch.Generator().manual_seed(5)
        self.hidden = torch.randn(rows, length, 8, generator=generator).requires_grad_()
        self.head = torch.randn(VOCABULARY, 8, generator=generator).requires_grad_()
        self.teacher_hidden = torch.randn(rows, length, 12, generator=generator)
        self.teacher_head = torch.randn(VOCABULARY, 12, generator=generator)
        self.targets = torch.randint(VOCABULARY, (rows, length), generator=generator)
        self.weights = torch.rand(rows, length, generator=generator) * 2
        self.weights[torch.rand(rows, length, generator=generator) < 0.3] = 0.0
        self.share = torch.rand(rows, 1, generator=generator)

    @property
    def states(self) -> States:
        return States(self.teacher_hidden[self.weights != 0], self.teacher_head)

    def loss(self, objective: Objective, teacher: States | TopK | None = None) -> torch.Tensor:
        return self.both(objective, teacher).loss

    def both(self, objective: Objective, teacher: States | TopK | None = None) -> Distilled:
        teacher = self.states if teacher is None else teacher
        return distillation_loss(
            self.hidden, self.head, teacher, self.targets, self.weights, self.share, objective
        )  # fmt: skip


@pytest.fixture(params=[1 << 21, 2 * 64 * VOCABULARY], ids=["one-chunk", "many-chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(heads.CHUNK_ELEMENTS, "cpu", request.param)
    return request.param


def softmax(logits: np.ndarray) -> np.ndarray:
    values = np.exp(logits - logits.max())
    return values / values.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0))


def slow_divergence(p: np.ndarray, q: np.ndarray, objective: Objective) -> float:
    """arXiv 2306.13649, section 2."""
    if objective.divergence == "forward_kl":
        return kl(p, q)
    if objective.divergence == "reverse_kl":
        return kl(q, p)
    m = objective.beta * p + (1 - objective.beta) * q
    return objective.beta * kl(p, m) + (1 - objective.beta) * kl(q, m)


def slow_loss(inputs: Inputs, objective: Objective, known: int = VOCABULARY) -> float:
    """Token by token; `known` tokens of the teacher are told apart, the others are one outcome."""
    student = (inputs.hidden.detach().double() @ inputs.head.detach().double().T).numpy()
    teacher = (inputs.teacher_hidden.double() @ inputs.teacher_head.double().T).numpy()
    total = 0.0
    for row, column in np.argwhere(inputs.weights.numpy() != 0):
        p = softmax(teacher[row, column] / objective.temperature)
        q = softmax(student[row, column] / objective.temperature)
        if known < VOCABULARY:
            best = np.argsort(-p)[:known]
            p, q = (np.append(each[best], 1 - each[best].sum()) for each in (p, q))
        cross_entropy = -math.log(softmax(student[row, column])[inputs.targets[row, column]])
        share = float(inputs.share[row])
        divergence = objective.temperature**2 * slow_divergence(p, q, objective)
        total += float(inputs.weights[row, column]) * (share * cross_entropy + (1 - share) * divergence)
    return total


def exact_gradients(inputs: Inputs, objective: Objective, known: int = VOCABULARY) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, from the formula written with torch."""
    hidden, head = (each.detach().double().requires_grad_() for each in (inputs.hidden, inputs.head))
    logits = hidden @ head.T
    log_q = (logits / objective.temperature).log_softmax(-1)
    log_p = ((inputs.teacher_hidden.double() @ inputs.teacher_head.double().T) / objective.temperature).log_softmax(-1)
    if known < VOCABULARY:
        best = log_p.topk(known, dim=-1).indices

        def merged(values: torch.Tensor) -> torch.Tensor:
            picked = values.gather(-1, best)
            return torch.cat((picked, torch.log1p(-picked.exp().sum(-1, keepdim=True))), -1)

        log_p, log_q = merged(log_p), merged(log_q)
    p, q = log_p.exp(), log_q.exp()
    if objective.divergence == "forward_kl":
        divergence = (p * (log_p - log_q)).sum(-1)
    elif objective.divergence == "reverse_kl":
        divergence = (q * (log_q - log_p)).sum(-1)
    else:
        log_m = (objective.beta * p + (1 - objective.beta) * q).log()
        divergence = (objective.beta * p * (log_p - log_m) + (1 - objective.beta) * q * (log_q - log_m)).sum(-1)
    cross_entropy = -logits.log_softmax(-1).gather(-1, inputs.targets[..., None])[..., 0]
    mixed = inputs.share * cross_entropy + (1 - inputs.share) * objective.temperature**2 * divergence
    (inputs.weights * mixed).sum().backward()
    assert hidden.grad is not None and head.grad is not None
    return hidden.grad, head.grad


@EVERY
def test_the_loss_is_that_of_the_papers(objective: Objective, chunks: int) -> None:
    inputs = Inputs()
    assert inputs.loss(objective).item() == pytest.approx(slow_loss(inputs, objective), rel=1e-5)


@EVERY
@pytest.mark.parametrize("known", [VOCABULARY, 5], ids=["exact", "top-5"])
def test_gradients_are_those_of_float64(objective: Objective, known: int, chunks: int) -> None:
    inputs = Inputs()
    teacher = inputs.states if known == VOCABULARY else top_k(inputs.states, known, objective.temperature)
    (inputs.loss(objective, teacher) * 0.25).backward()
    hidden, head = exact_gradients(inputs, objective, known)
    torch.testing.assert_close(inputs.hidden.grad, 0.25 * hidden, check_dtype=False, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(inputs.head.grad, 0.25 * head, check_dtype=False, atol=1e-5, rtol=1e-4)


@EVERY
def test_of_a_cached_teacher_the_others_are_one_outcome(objective: Objective, chunks: int) -> None:
    inputs = Inputs()
    kept = inputs.both(objective, top_k(inputs.states, 5, objective.temperature))
    assert kept.loss.item() == pytest.approx(slow_loss(inputs, objective, known=5), rel=1e-5)
    exact = inputs.both(objective)
    assert (kept.divergence <= exact.divergence + 1e-5).all() and kept.divergence.sum() < exact.divergence.sum()
    torch.testing.assert_close(kept.cross_entropy, exact.cross_entropy)
    assert torch.equal(kept.agreements, exact.agreements)


@EVERY
@pytest.mark.parametrize("count", [VOCABULARY, VOCABULARY + 10])
def test_a_cache_of_the_whole_vocabulary_is_exact(objective: Objective, count: int, chunks: int) -> None:
    one, two = Inputs(), Inputs()
    exact, kept = one.loss(objective), two.loss(objective, top_k(two.states, count, objective.temperature))
    exact.backward()
    kept.backward()
    assert kept.item() == pytest.approx(exact.item(), rel=1e-6)
    torch.testing.assert_close(one.hidden.grad, two.hidden.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.head.grad, two.head.grad, atol=1e-5, rtol=1e-4)


@EVERY
def test_nothing_is_to_be_learned_from_an_equal_teacher(objective: Objective) -> None:
    inputs = Inputs()
    inputs.share = torch.zeros(1, 1)
    same = States(inputs.hidden.detach()[inputs.weights != 0], inputs.head.detach())
    for teacher in (same, top_k(same, 5, objective.temperature)):
        inputs.hidden.grad = inputs.head.grad = None
        out = inputs.both(objective, teacher)
        out.loss.backward()
        assert abs(out.loss.item()) < 1e-4 and torch.equal(out.agreements, inputs.weights != 0)
        assert inputs.hidden.grad is not None and inputs.head.grad is not None
        assert inputs.hidden.grad.abs().max() < 1e-5 and inputs.head.grad.abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("beta", "objective"), [(0.0, "forward_kl"), (1.0, "reverse_kl"), (0.3, "jsd")])
def test_the_divergences_are_those_of_trl(beta: float, objective: str, temperature: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd", reason="trl is not installed: nothing to compare with")
    inputs = Inputs()
    inputs.share = torch.zeros(1, 1)
    inputs.weights = (inputs.weights != 0).float()
    ours = inputs.loss(Objective(objective, beta or 0.5, temperature))
    labels = torch.where(inputs.weights != 0, inputs.targets, -100)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        inputs.hidden.detach() @ inputs.head.detach().T, inputs.teacher_hidden @ inputs.teacher_head.T, labels=labels,
        beta=beta, temperature=temperature, reduction="sum",
    )  # fmt: skip
    # theirs has no factor T^2
    assert ours.item() == pytest.approx(theirs.item() * temperature**2, rel=1e-5)


def test_a_case_worked_by_hand() -> None:
    # Teacher (1/2, 1/2), student (3/4, 1/4). KL(p || q) = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3);
    # KL(q || p) = 3/4 ln(3/2) + 1/4 ln(1/2).
    hidden, head = torch.ones(1, 1, 1, requires_grad=True), torch.tensor([[math.log(3)], [0.0]], requires_grad=True)
    teacher = States(torch.ones(1, 1), torch.zeros(2, 1))
    none, one, targets = torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    forward = distillation_loss(hidden, head, teacher, targets, one, none, Objective())
    forward.loss.backward()
    assert forward.loss.item() == pytest.approx(0.5 * math.log(4 / 3))
    assert head.grad is not None and head.grad.flatten().tolist() == pytest.approx([0.25, -0.25])  # q - p
    reverse = distillation_loss(hidden, head, teacher, targets, one, none, Objective("reverse_kl"))
    assert reverse.loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_huge_logits_do_not_overflow(name: str) -> None:
    hidden = torch.tensor([[[1e4]], [[-1e4]]], requires_grad=True)
    head = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    for teacher in (States(torch.tensor([[-1e4], [1e4]]), head.detach()), States(torch.zeros(2, 1), head.detach())):
        for known in (teacher, top_k(teacher, 1, 1.0)):
            hidden.grad = None
            targets, weights = torch.tensor([[1], [1]]), torch.ones(2, 1)
            out = distillation_loss(hidden, head, known, targets, weights, torch.zeros(1, 1), Objective(name))
            out.loss.backward()
            assert out.loss.isfinite() and hidden.grad is not None and hidden.grad.isfinite().all()


def test_a_weight_of_zero_costs_nothing() -> None:
    inputs = Inputs()
    inputs.weights = torch.zeros_like(inputs.weights)
    out = inputs.both(Objective())
    out.loss.backward()
    assert out.loss.item() == 0 and not out.hits.any() and not out.divergence.any()
    assert inputs.hidden.grad is not None and not inputs.hidden.grad.any()


def test_a_frozen_head_still_gives_the_hidden_gradient() -> None:
    one, two = Inputs(), Inputs()
    two.head.requires_grad_(False)
    for inputs in (one, two):
        inputs.loss(Objective("jsd")).backward()
    assert one.hidden.grad is not None and two.hidden.grad is not None and two.head.grad is None
    assert torch.equal(one.hidden.grad, two.hidden.grad)


@pytest.mark.parametrize("known", [VOCABULARY, 5], ids=["exact", "top-5"])
def test_the_full_logits_of_neither_model_ever_exist(known: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs(rows=8, length=160)
    monkeypatch.setitem(heads.CHUNK_ELEMENTS, "cpu", 2 * 64 * VOCABULARY)
    with LargestTensor() as largest:
        teacher = inputs.states if known == VOCABULARY else top_k(inputs.states, known, 2.0)
        inputs.loss(Objective("jsd", 0.5, 2.0), teacher).backward()
    assert largest.elements <= max(8 * 160 * 12, 64 * VOCABULARY)
