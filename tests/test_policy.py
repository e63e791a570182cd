"""PPO, GRPO and SPO: losses and advantages against slow NumPy versions written from the papers."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import random_model, tiny_config

from minillm.families.autoregressive import Autoregressive
from minillm.families.base import Family, SpecialIds
from minillm.families.diffusion import Diffusion
from minillm.families.sdd import SparseDistributionDiffusion
from minillm.families.settings import FamilyConfig
from minillm.methods.grpo import GroupRelative, group_advantages
from minillm.methods.policy import (
    Credit,
    ExperienceBatch,
    PolicyMethod,
    Written,
    k3,
    policy_terms,
    rows_of,
    unit_log_probs,
)
from minillm.methods.ppo import ProximalPolicy, generalised_advantages, value_terms, whitened
from minillm.methods.settings import CriticSettings, GroupSettings, PolicySettings, TrackerSettings
from minillm.methods.spo import SingleStream, Tracker, draw_without_replacement
from minillm.models.config import ModelConfig
from minillm.models.transformer import LanguageModel
from minillm.models.value import add_value_head

CPU = torch.device("cpu")
IDS = SpecialIds(50, 4, 5, (0, 2, 4))
SETTINGS = PolicySettings(reward=("number",), max_completion_length=8)
PROMPTS = [[11, 12, 13], [11, 12, 13], [21, 22], [21, 22]]
COMPLETIONS = [[31, 32, 33, 34], [35, 3], [36, 37, 3], [38]]


def family(name: str) -> tuple[Family, ModelConfig]:
    if name == "ar":
        return Autoregressive(), tiny_config()
    config = FamilyConfig(name, denoiser="aggregate" if name == "sdd" else "")
    kind = {"diffusion": Diffusion, "sdd": SparseDistributionDiffusion}[name]
    return kind(config, IDS), tiny_config(causal=False, denoiser=config.denoiser)


FAMILIES = pytest.mark.parametrize("name", ["ar", "diffusion", "sdd"])


def written(rewards: Any = (1.0, 0.0, 0.0, 1.0), failed: Any = (0, 0, 0, 0), **changes: Any) -> Written:
    count = len(rewards)
    result = Written(
        PROMPTS[:count], COMPLETIONS[:count], np.arange(count), None, np.array([False, True, True, False])[:count],
        np.array(rewards, np.float32), {"number": np.array(rewards, np.float32)}, np.array(failed, bool),
        [("question", "answer", "right")] * count,
    )  # fmt: skip
    return replace(result, **changes)


class NobodyWrites:
    elsewhere = False

    def write(self, *_: Any, **__: Any) -> Written:
        return written()

    def close(self) -> None: ...


def batch_of(kept: Written, credit: Credit) -> ExperienceBatch:
    return ExperienceBatch(kept.prompts, kept.completions, kept.ids, credit.values, credit.log)


def slow_log_probs(model: LanguageModel, prompt: list[int], completion: list[int]) -> np.ndarray:
    """log p of each token of the completion, one at a time, through all logits."""
    result = []
    for end in range(len(completion)):
        tokens = torch.tensor([prompt + completion[:end]])
        with torch.no_grad():
            logits = model.logits(model(tokens).hidden)[0, -1].double().numpy()
        result.append(logits[completion[end]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    return np.array(result)


def slow_term(new: float, old: float, advantage: float, low: float, high: float, cispo: bool) -> float:
    ratio = math.exp(new - old)
    if cispo:
        return -min(ratio, 1 + high) * advantage * new
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


# -- the clipped loss


@pytest.mark.parametrize("cispo", [False, True])
def test_terms_are_the_papers_formulas_one_unit_at_a_time(cispo: bool) -> None:
    generator = np.random.default_rng(0)
    new, old, advantages = (generator.normal(size=(5, 7)) * 0.5 for _ in range(3))
    terms, _ = policy_terms(
        torch.tensor(new), torch.tensor(old), torch.tensor(advantages), low=0.2, high=0.3, cispo=cispo
    )
    for index in np.ndindex(5, 7):
        slow = slow_term(new[index], old[index], advantages[index], 0.2, 0.3, cispo)
        assert float(terms[index]) == pytest.approx(slow, rel=1e-9)


def test_a_unit_beyond_its_bound_has_no_gradient_and_counts_as_clipped() -> None:
    new = torch.log(torch.tensor([[1.5, 0.5, 1.5, 0.5]])).requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    terms, clipped = policy_terms(new, torch.zeros(1, 4), advantages, low=0.2, high=0.2)
    terms.sum().backward()
    assert clipped.tolist() == [[True, True, False, False]]
    assert new.grad is not None and (new.grad[0, :2] == 0).all() and (new.grad[0, 2:] != 0).all()


def test_cispo_keeps_the_gradient_of_log_p_where_the_ratio_is_clipped() -> None:
    new = torch.log(torch.tensor([[2.0, 1.1]])).requires_grad_()
    terms, clipped = policy_terms(new, torch.zeros(1, 2), torch.tensor([[3.0, 3.0]]), low=0.2, high=0.2, cispo=True)
    terms.sum().backward()
    assert clipped.tolist() == [[True, False]] and new.grad is not None
    assert new.grad[0].tolist() == pytest.approx([-1.2 * 3.0, -1.1 * 3.0])


def test_k3_is_the_divergence_on_average_and_never_negative() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    estimates = k3(torch.log(torch.tensor(q / p)))
    assert (estimates >= 0).all() and float(k3(torch.zeros(1))) == 0.0
    assert float((torch.tensor(p) * estimates).sum()) == pytest.approx(float((p * np.log(p / q)).sum()))


# -- units


def test_token_log_probs_are_those_of_the_model_read_token_by_token() -> None:
    ar, config = family("ar")
    model = random_model(config)
    rows = rows_of(PROMPTS, COMPLETIONS, np.arange(4), ar, seed=0, device=CPU)
    units = unit_log_probs(ar, model, rows).detach().numpy()
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
        np.testing.assert_allclose(units[row, : len(completion)], slow_log_probs(model, prompt, completion), atol=1e-4)
        assert (units[row, len(completion) :] == 0).all()
    assert rows.weights.sum(1).tolist() == [4, 2, 3, 1]


@pytest.mark.parametrize("name", ["diffusion", "sdd"])
def test_without_an_order_a_completion_is_one_unit_of_its_mean_log_probability(name: str) -> None:
    unordered, config = family(name)
    model = random_model(config)
    rows = rows_of(PROMPTS, COMPLETIONS, np.arange(4), unordered, seed=3, device=CPU)
    units = unit_log_probs(unordered, model, rows)
    score = unordered.score(model, rows.batch, rows.noise)
    assert units.shape == (4, 1) and rows.weights[:, 0].tolist() == [4, 2, 3, 1]
    np.testing.assert_allclose(units[:, 0].detach() * torch.tensor([4, 2, 3, 1]), score.total.detach(), rtol=1e-5)


@FAMILIES
def test_a_completion_has_the_same_log_probability_alone_and_in_a_batch(name: str) -> None:
    some, config = family(name)
    model = random_model(config)
    together = unit_log_probs(some, model, rows_of(PROMPTS, COMPLETIONS, np.arange(4), some, seed=3, device=CPU))
    for row in range(4):
        alone = rows_of(PROMPTS[row : row + 1], COMPLETIONS[row : row + 1], np.array([row]), some, seed=3, device=CPU)
        units = unit_log_probs(some, model, alone)
        np.testing.assert_allclose(units[0].detach(), together[row, : units.shape[1]].detach(), atol=2e-5)


# -- the whole loss


def method_of(name: str, settings: PolicySettings = SETTINGS, reference: LanguageModel | None = None) -> GroupRelative:
    return GroupRelative(family(name)[0], NobodyWrites(), reference, settings, 3, GroupSettings(num_generations=2))


def slow_grpo(
    new: list[np.ndarray], old: list[np.ndarray], reference: list[np.ndarray], advantages: np.ndarray, kind: str,
    beta: float, low: float, high: float, longest: int,
) -> float:  # fmt: skip
    """Equation 3 of 2402.03300 with k3 as its KL, under the three ways to average."""
    sums = []
    for row in range(len(new)):
        terms = []
        for n, o, r in zip(new[row], old[row], reference[row]):
            kl = math.exp(r - n) - (r - n) - 1.0
            terms.append(slow_term(n, o, advantages[row], low, high, kind == "cispo") + beta * kl)
        sums.append(terms)
    if kind == "grpo":
        return float(np.mean([np.mean(terms) for terms in sums]))
    if kind == "dr_grpo":
        return sum(map(sum, sums)) / (len(sums) * longest)
    return sum(map(sum, sums)) / sum(map(len, sums))


@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo", "cispo"])
def test_the_loss_of_a_step_is_the_papers(kind: str) -> None:
    settings = replace(
        SETTINGS, loss_type=kind, beta=0.3, epsilon=0.1, epsilon_high=0.25, num_iterations=2, log_completions=0
    )
    _, config = family("ar")
    policy, before, reference = (random_model(config, seed) for seed in range(3))
    method = method_of("ar", settings, reference)
    kept = written()
    batch = batch_of(kept, method.learn(before, kept, 0, np.array([0, 0, 1, 1])))
    prepared = method.prepare(policy, batch, CPU, 1, 4)
    loss = float(method.loss(policy, prepared.data).loss) / prepared.count
    logs = [
        [slow_log_probs(model, prompt, tokens) for prompt, tokens in zip(PROMPTS, COMPLETIONS)]
        for model in (policy, before, reference)
    ]
    advantages = np.array([0.5, -0.5, -0.5, 0.5]) / (math.sqrt(0.5) + 1e-4)
    assert loss == pytest.approx(slow_grpo(*logs, advantages, kind, 0.3, 0.1, 0.25, 8), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "level"),
    [(kind, "token") for kind in ("dapo", "grpo", "dr_grpo", "cispo")]
    + [(kind, "sequence") for kind in ("dapo", "grpo", "dr_grpo")],
)
def test_the_loss_is_that_of_trl(kind: str, level: str) -> None:
    """TRL's own _compute_loss on the same log-probabilities; a sequence ratio of theirs is a unit of ours. (Theirs of
    sequences under cispo weighs each token's own log-probability.)"""
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer

    generator = torch.Generator().manual_seed(1)
    new, old, reference = (torch.randn(3, 5, generator=generator) * 0.3 - 2.0 for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    advantages = torch.tensor([1.2, -0.7, 0.4])
    beta = 0.0 if level == "sequence" else 0.3
    trainer: Any = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda value: value, reduce=lambda value, **_: value, sync_gradients=True
        ),
        args=SimpleNamespace(
            use_bias_correction_kl=False, delta=None, steps_per_generation=1, top_entropy_quantile=1.0,
        ),
        model=SimpleNamespace(training=True), aux_loss_enabled=False, top_entropy_quantile=1.0, beta=beta,
        off_policy_mask_threshold=None, importance_sampling_level=level, loss_type=kind, epsilon_low=0.2,
        epsilon_high=1.3 if kind == "cispo" else 0.3, use_vllm=False, vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1, max_completion_length=8, _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(3, 2, dtype=torch.int64), "prompt_mask": torch.ones(3, 2, dtype=torch.int64),
        "completion_ids": torch.zeros(3, 5, dtype=torch.int64), "completion_mask": mask, "advantages": advantages,
        "old_per_token_logps": old, "ref_per_token_logps": reference, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    theirs = float(GRPOTrainer._compute_loss(trainer, None, inputs))
    lengths = mask.sum(1, keepdim=True)
    if level == "sequence":
        ours_new, ours_old = ((each * mask).sum(1, keepdim=True) / lengths for each in (new, old))
        weights, units = lengths.float(), advantages[:, None]
    else:
        ours_new, ours_old, weights, units = new, old, mask.float(), advantages[:, None] * mask
    terms, _ = policy_terms(ours_new, ours_old, units, low=0.2, high=0.3, cispo=kind == "cispo")
    if beta:
        terms = terms + beta * k3(reference - new)
    count = {"grpo": 3, "dr_grpo": 24}.get(kind, int(mask.sum()))
    weights = weights / lengths if kind == "grpo" else weights
    assert float((terms * weights).sum()) / count == pytest.approx(theirs, rel=1e-5)


@FAMILIES
def test_ratios_begin_at_one_and_zero_advantages_teach_nothing(name: str) -> None:
    settings = replace(SETTINGS, num_iterations=2)
    model = random_model(family(name)[1])
    method = method_of(name, settings)
    kept = written(rewards=(1.0, 1.0, 0.0, 0.0))
    batch = batch_of(kept, method.learn(model, kept, 0, np.array([0, 0, 1, 1])))
    loss, metrics = method.loss(model, method.prepare(model, batch, CPU, 0, 0).data)
    assert float(metrics["approx_kl"][0]) == pytest.approx(0.0, abs=1e-6)
    assert float(metrics["clip_ratio"][0]) == 0.0 and float(metrics["zero_spread"][0]) == 4.0
    loss.backward()
    assert all(float(p.grad.abs().max()) == 0.0 for p in model.parameters() if p.grad is not None)


@FAMILIES
def test_a_step_makes_the_rewarded_completions_more_probable(name: str) -> None:
    some, config = family(name)
    model = random_model(config)
    method = method_of(name)
    kept = written()
    batch = batch_of(kept, method.learn(model, kept, 0, np.array([0, 0, 1, 1])))
    data = method.prepare(model, batch, CPU, 0, 0).data

    def likelihood() -> torch.Tensor:
        return (unit_log_probs(some, model, data.rows) * data.rows.weights).sum(1).detach()

    before = likelihood()
    loss, _ = method.loss(model, data)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    change = likelihood() - before
    assert float((change * torch.tensor([1.0, -1.0, -1.0, 1.0])).sum()) > 0


@FAMILIES
@pytest.mark.parametrize("kind", ["dapo", "grpo"])
def test_the_loss_does_not_depend_on_how_a_step_is_cut(name: str, kind: str) -> None:
    model = random_model(family(name)[1])
    method = method_of(name, replace(SETTINGS, loss_type=kind))
    kept = written()
    credit = method.learn(model, kept, 0, np.array([0, 0, 1, 1]))
    whole = method.prepare(model, batch_of(kept, credit), CPU, 0, 0)
    parts = []
    for row in range(4):
        one = ExperienceBatch(
            kept.prompts[row : row + 1], kept.completions[row : row + 1], kept.ids[row : row + 1],
            {key: value[row : row + 1] for key, value in credit.values.items()},
            {key: value[row : row + 1] for key, value in credit.log.items()},
        )  # fmt: skip
        parts.append(method.prepare(model, one, CPU, 0, row))
    assert sum(part.count for part in parts) == whole.count
    cut = sum(float(method.loss(model, part.data).loss) for part in parts)
    assert cut == pytest.approx(float(method.loss(model, whole.data).loss), rel=1e-4, abs=1e-5)


def test_without_beta_there_is_no_reference_and_with_it_the_pull_is_counted() -> None:
    model, reference = random_model(family("ar")[1]), random_model(family("ar")[1], 1)
    assert method_of("ar").frozen() == {}
    method = method_of("ar", replace(SETTINGS, beta=0.5), reference)
    assert method.frozen() == {"reference": reference}
    kept = written()
    batch = batch_of(kept, method.learn(model, kept, 0, np.array([0, 0, 1, 1])))
    metrics = method.loss(model, method.prepare(model, batch, CPU, 0, 0).data).metrics
    assert float(metrics["kl"][0]) > 0


def test_what_the_writer_said_is_the_log_probability_of_then() -> None:
    said = [[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0], [-7.0, -8.0, -9.0], [-0.5]]
    method = method_of("ar", replace(SETTINGS, steps_per_generation=2))
    old = method.learn(random_model(family("ar")[1]), written(log_probs=said), 0, np.arange(4)).values["old"]
    assert [row[: len(own)].tolist() for row, own in zip(old, said)] == said


def test_logged_rewards_leave_out_what_failed() -> None:
    method = method_of("ar")
    kept = written(rewards=(1.0, 0.0, 0.5, 0.0), failed=(0, 1, 0, 0))
    model = random_model(family("ar")[1])
    batch = batch_of(kept, method.learn(model, kept, 0, np.arange(4)))
    metrics = method.loss(model, method.prepare(model, batch, CPU, 0, 0).data).metrics
    total, count = metrics["reward"]
    assert (float(total), count) == (1.5, 3.0) and float(metrics["reward_failed"][0]) == 1.0
    assert float(metrics["completion_length"][0]) == 10.0 and float(metrics["unfinished"][0]) == 2.0


def test_alarms_name_what_to_change_and_only_ring_in_trouble() -> None:
    method = method_of("ar")
    assert method.alarm({"entropy": 1.0, "reward": 0.2, "approx_kl": 0.01}) == ""
    assert method.alarm({"entropy": 0.001, "reward": 0.9}) == ""  # learned, so it may be sure of itself
    assert "--learning_rate" in method.alarm({"entropy": 0.001, "reward": 0.1})
    assert "--beta" in method.alarm({"entropy": 1.0, "reward": 0.5, "kl": 50.0})
    again = method_of("ar")
    again.restore(method.state())
    assert "entropy fell" in again.alarm({"entropy": 0.001, "reward": 0.1})


# -- GRPO


def test_group_advantages_by_hand() -> None:
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0], np.float32)
    advantages, spread = group_advantages(rewards, np.zeros(8, bool), 4)
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    np.testing.assert_allclose(advantages, [expected, -expected, -expected, expected, 0, 0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(spread, [math.sqrt(1 / 3)] * 4 + [0.0] * 4, rtol=1e-6)
    plain, _ = group_advantages(rewards, np.zeros(8, bool), 4, "none")
    np.testing.assert_allclose(plain, [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0])
    batch, _ = group_advantages(rewards, np.zeros(8, bool), 4, "batch")
    np.testing.assert_allclose(batch[:2], np.array([0.5, -0.5]) / (rewards.std(ddof=1) + 1e-4), rtol=1e-5)


def test_what_failed_is_worth_nothing_and_moves_no_mean() -> None:
    rewards = np.array([1.0, 0.0, 0.0, 0.0, 9.0, 0.0], np.float32)
    failed = np.array([0, 0, 1, 1, 1, 1], bool)
    advantages, _ = group_advantages(rewards, failed, 3, "none")
    assert advantages.tolist() == [0.5, -0.5, 0.0, 0.0, 0.0, 0.0]


# -- PPO


def test_generalised_advantages_by_hand() -> None:
    values = np.array([[0.5, 0.2, 0.1], [0.3, 0.0, 0.0]], np.float32)
    units = np.array([[1, 1, 1], [1, 0, 0]], np.float32)
    gamma, lam = 0.9, 0.8
    third = 1.0 - 0.1
    second = 0.9 * 0.1 - 0.2 + gamma * lam * third
    first = 0.9 * 0.2 - 0.5 + gamma * lam * second
    advantages, returns = generalised_advantages(np.array([1.0, -1.0]), values, units, gamma=gamma, lam=lam)
    np.testing.assert_allclose(advantages, [[first, second, third], [-1.3, 0, 0]], rtol=1e-5)
    np.testing.assert_allclose(returns, [[first + 0.5, second + 0.2, 1.0], [-1.0, 0, 0]], rtol=1e-5)


def test_with_lambda_one_the_return_is_the_discounted_reward() -> None:
    values = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    units = (np.arange(4) < np.array([[4], [2], [1]])).astype(np.float32)
    _, returns = generalised_advantages(np.array([2.0, 3.0, 4.0]), values * units, units, gamma=0.5, lam=1.0)
    np.testing.assert_allclose(returns, [[0.25, 0.5, 1.0, 2.0], [1.5, 3.0, 0, 0], [4.0, 0, 0, 0]], rtol=1e-5)


def test_value_terms_take_the_larger_of_the_two_errors() -> None:
    terms = value_terms(torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]), 0.2)
    assert terms.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 0.9**2])


def test_whitened_advantages_have_mean_zero_and_deviation_one_over_tokens() -> None:
    weights = np.array([[1.0, 1.0], [1.0, 0.0]])
    white = whitened(np.array([[1.0, 2.0], [6.0, 99.0]]), weights)
    assert white[1, 1] == 0.0
    assert (white * weights).sum() == pytest.approx(0.0, abs=1e-6)
    assert (white**2 * weights).sum() / 3 == pytest.approx(1.0, rel=1e-5)


def ppo(name: str, settings: PolicySettings = SETTINGS) -> ProximalPolicy:
    critic = add_value_head(random_model(family(name)[1], 5))
    torch.nn.init.normal_(critic.score.weight, generator=torch.Generator().manual_seed(1))
    return ProximalPolicy(family(name)[0], NobodyWrites(), None, settings, 3, critic, CriticSettings())


@FAMILIES
def test_the_critic_sees_only_what_is_known_before_a_unit(name: str) -> None:
    method = ppo(name)
    rows = rows_of(PROMPTS, COMPLETIONS, np.arange(4), method.family, seed=3, device=CPU)
    others = [[*tokens[:-1], 40] for tokens in COMPLETIONS]
    changed = rows_of(PROMPTS, others, np.arange(4), method.family, seed=3, device=CPU)
    with torch.no_grad():
        one, two = method.values(rows), method.values(changed)
    assert torch.allclose(one, two, atol=1e-5)  # the last token is no part of the state it is chosen in
    assert one.shape == rows.mask.shape and len(set(one[rows.mask].tolist())) > 1


@FAMILIES
def test_ppo_trains_policy_and_critic_in_one_step(name: str) -> None:
    model = random_model(family(name)[1])
    method = ppo(name)
    kept = written()
    credit = method.learn(model, kept, 0, np.arange(4))
    loss, metrics = method.loss(model, method.prepare(model, batch_of(kept, credit), CPU, 0, 0).data)
    loss.backward()
    for trained in (model, method.critic):
        assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in trained.parameters())
    assert float(metrics["value_loss"][0]) > 0 and "explained_variance" in metrics
    assert list(method.trained()) == ["ppo_critic"]


def test_a_critic_that_knows_the_rewards_leaves_no_advantage() -> None:
    advantages, _ = generalised_advantages(
        np.array([1.0, 0.0]), np.array([[1.0, 1.0], [0.0, 0.0]]), np.ones((2, 2)), gamma=1.0, lam=0.95
    )
    assert np.abs(advantages).max() == 0.0


# -- SPO


def test_the_tracker_is_the_papers_beta_posterior() -> None:
    """a <- rho a + r, b <- rho b + 1 - r, v = a / (a + b)."""
    tracker = Tracker(1)
    place, a, b = np.array([0]), 0.25, 0.75  # a first guess of 0.25 with the weight of one observation
    for reward, rho in ((1.0, 0.9), (0.0, 0.875), (1.0, 0.96)):
        before = tracker.expected(place, unseen=0.25)
        assert float(before[0]) == pytest.approx(a / (a + b))
        tracker.update(place, np.array([reward]), np.array([rho]), before)
        a, b = rho * a + reward, rho * b + 1.0 - reward
        assert tracker.mean[0] == pytest.approx(a / (a + b)) and tracker.count[0] == pytest.approx(a + b)


def test_prompts_never_seen_are_expected_to_yield_what_the_others_do() -> None:
    tracker = Tracker(3)
    tracker.update(np.array([0]), np.array([1.0]), np.array([1.0]), np.array([1.0]))
    assert tracker.expected(np.array([0, 1, 2])).tolist() == [1.0, 1.0, 1.0]


def test_uncertain_prompts_are_drawn_more_often_and_none_is_lost() -> None:
    tracker = Tracker(3)
    tracker.mean, tracker.count = np.array([0.5, 0.0, 1.0]), np.ones(3)
    assert tracker.priorities().tolist() == pytest.approx([0.55, 0.05, 0.05])
    first = [draw_without_replacement(tracker.priorities(), 1, seed=1, rollout=r)[0] for r in range(2000)]
    shares = np.bincount(first, minlength=3) / 2000
    np.testing.assert_allclose(shares, np.array([0.55, 0.05, 0.05]) / 0.65, atol=0.03)
    many = draw_without_replacement(tracker.priorities(), 7, seed=1, rollout=0)
    assert sorted(np.bincount(many, minlength=3)) == [2, 2, 3]  # all of them before any comes again


def spo(name: str = "ar", **flags: Any) -> SingleStream:
    return SingleStream(family(name)[0], NobodyWrites(), None, SETTINGS, 3, TrackerSettings(**flags))


@FAMILIES
def test_spo_compares_with_what_it_remembers_and_normalises_over_the_batch(name: str) -> None:
    method, model = spo(name), random_model(family(name)[1])
    method.choose(0, 4, 10)
    places = np.array([0, 1, 2, 3])
    method.tracker.mean[:4], method.tracker.count[:4] = [0.5, 0.5, 0.0, 1.0], 8.0
    credit = method.learn(model, written(), 0, places)
    above = np.array([0.5, -0.5, 0.0, 0.0])
    np.testing.assert_allclose(credit.values["advantages"][:, 0], (above - above.mean()) / above.std(), rtol=1e-4)
    assert credit.log["baseline"].tolist() == [0.5, 0.5, 0.0, 1.0]
    assert credit.log["rho"].tolist() == pytest.approx([0.96] * 4)  # never seen before: no distance, the most is kept
    assert method.tracker.count[0] == pytest.approx(0.96 * 8.0 + 1.0)


@FAMILIES
def test_a_policy_that_moved_forgets_more(name: str) -> None:
    method, model = spo(name, rho_min=0.0, rho_max=1.0), random_model(family(name)[1])
    method.choose(0, 4, 10)
    places = np.arange(4)
    method.learn(model, written(), 0, places)
    same = method.learn(model, written(), 1, places).log["rho"]
    moved = method.learn(random_model(family(name)[1], 9), written(), 2, places).log["rho"]
    np.testing.assert_allclose(same, 1.0, atol=1e-4)
    assert (moved < same).all()


def test_the_distance_is_the_k3_of_the_last_completion() -> None:
    method = spo(rho_min=0.0, rho_max=1.0, d_half=0.5)
    one, two = random_model(family("ar")[1]), random_model(family("ar")[1], 1)
    method.choose(0, 4, 10)
    method.learn(one, written(), 0, np.arange(4))
    rho = method.learn(two, written(), 1, np.arange(4)).log["rho"]
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, COMPLETIONS)):
        change = slow_log_probs(two, prompt, tokens) - slow_log_probs(one, prompt, tokens)
        distance = float(np.mean(np.exp(change) - 1.0 - change))
        assert rho[row] == pytest.approx(2.0 ** (-distance / 0.5), rel=1e-2, abs=1e-6)


def test_the_tracker_survives_a_checkpoint() -> None:
    method, model = spo(), random_model(family("ar")[1])
    method.choose(0, 4, 10)
    method.learn(model, written(), 0, np.arange(4))
    again = spo()
    again.restore(method.state())
    assert again.choose(1, 4, 10).tolist() == method.choose(1, 4, 10).tolist()
    moved = random_model(family("ar")[1], 2)
    one, two = (each.learn(moved, written(), 1, np.arange(4)) for each in (method, again))
    for key in one.log:
        np.testing.assert_array_equal(one.log[key], two.log[key])
    for key in one.values:
        np.testing.assert_array_equal(one.values[key], two.values[key])


def test_a_method_that_does_not_say_what_completions_are_worth_is_none() -> None:
    with pytest.raises(NotImplementedError):
        PolicyMethod(family("ar")[0], NobodyWrites(), None, SETTINGS, 0).credit(
            random_model(family("ar")[1]), written(), np.arange(4)
        )
