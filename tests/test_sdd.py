"""SDD: candidates are read as the formula says, beliefs know nothing of the answer, and the loss is a bound."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from denoisers import (
    IDS,
    LEAST,
    PACKED,
    TRAINED,
    batch_of,
    belief,
    both_ways,
    check_mean,
    copies,
    fix_level,
    likelihood_losses,
    noise_of,
    subset_weight,
)

from minillm.families import noise
from minillm.families.base import SpecialIds
from minillm.families.masking import LATER_SHARE
from minillm.families.settings import FamilyConfig, FamilySettings
from minillm.log import UserError
from minillm.models.candidates import Candidates
from minillm.models.heads import weighted_cross_entropy
from minillm.models.transformer import LanguageModel

DENOISERS = pytest.mark.parametrize("denoiser", ["aggregate", "bilateral"])


def some_candidates(rows: int = 2, length: int = 7, count: int = 3, seed: int = 0) -> Candidates:
    """Beliefs that leave some mass to the rest."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, (rows, length, count), generator=generator)
    return Candidates(tokens, torch.rand(rows, length, count + 2, generator=generator).softmax(-1)[..., :count])


@torch.no_grad()
def test_candidates_are_summed_under_their_probabilities_and_the_rest_has_an_embedding_of_its_own() -> None:
    model, state = both_ways("aggregate"), some_candidates()
    table, rest = model.head_weight.double(), model.model.candidates.rest.double()[0]
    ours = model.embed(state)
    for row, position in itertools.product(range(2), range(7)):
        p = state.probabilities[row, position].double()
        by_hand = sum(p[j] * table[state.tokens[row, position, j]] for j in range(3)) + (1 - p.sum()) * rest
        torch.testing.assert_close(ours[row, position].double(), by_hand, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_known_token_is_its_plain_embedding() -> None:
    model, tokens = both_ways("aggregate"), torch.arange(5, 14)[None]
    for count in (1, 4):
        state = Candidates.known(tokens, count)
        assert torch.equal(model.embed(state), model.embed(tokens))
        assert torch.equal(model(state).hidden, model(tokens).hidden)
        assert not state.rest.any()


@DENOISERS
def test_gradients_reach_every_parameter_and_rest(denoiser: str) -> None:
    model = both_ways(denoiser)
    model(some_candidates()).hidden.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_gradients_of_the_sum_are_those_of_the_formula() -> None:
    model, state = both_ways("aggregate"), some_candidates()
    slope = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    (model.embed(state) * slope).sum().backward()
    by_hand = torch.zeros(50, 16).index_add_(
        0, state.tokens.flatten(), (state.probabilities[..., None] * slope[:, :, None]).reshape(-1, 16)
    )
    torch.testing.assert_close(model.head_weight.grad, by_hand, atol=1e-5, rtol=0)
    rest = (state.rest[..., None] * slope).sum((0, 1))
    torch.testing.assert_close(model.model.candidates.rest.grad, rest[None], atol=1e-5, rtol=0)


@torch.no_grad()
def test_bilateral_ignores_empty_places_and_the_order_of_candidates() -> None:
    model, tokens = both_ways("bilateral"), torch.arange(5, 14)[None]
    one, four = (model(Candidates.known(tokens, count)).hidden for count in (1, 4))
    assert one.isfinite().all()
    torch.testing.assert_close(one, four, atol=1e-4, rtol=0)
    state = some_candidates()
    turned = Candidates(state.tokens.flip(-1), state.probabilities.flip(-1))
    torch.testing.assert_close(model(state).hidden, model(turned).hidden, atol=1e-4, rtol=0)
    other = Candidates(state.tokens, state.probabilities * 0.5)
    assert (model(state).hidden - model(other).hidden).abs().max() > 1e-2  # probabilities matter


def test_bilateral_adds_what_the_layers_say_in_full_precision() -> None:
    model, state = both_ways("bilateral", scale=0.1), some_candidates()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        parts = model.model.candidates
        candidates, log_probabilities = parts.separate(state, model.head_weight)
        assert candidates.dtype == parts.pool(candidates, log_probabilities).dtype == torch.float32


def test_the_curriculum_shares_the_warmup_and_evaluation_has_all_candidates() -> None:
    growing = belief(k_schedule=(1, 2, 4, 8), k_warmup_steps=100)
    assert [growing.candidates_at(step) for step in (0, 24, 25, 49, 50, 74, 75, 99, 100, 5000, -1)] == [
        1, 1, 2, 2, 4, 4, 8, 8, 8, 8, 8
    ]  # fmt: skip
    model = both_ways("aggregate")
    view = growing.view(model, PACKED, noise_of(PACKED, step=30))
    assert isinstance(view.inputs, Candidates)
    assert view.inputs.tokens.shape[-1] == 2 and view.log == {"k": 2.0}
    assert belief(k_schedule=(1, 8)).candidates_at(0) == 8
    fixed = FamilySettings(fixed_k=5).resolve(FamilyConfig("sdd"))
    assert fixed.k_schedule == (5,)
    assert FamilySettings(k_schedule="2,6").resolve(FamilyConfig("sdd")).k_schedule == (2, 6)
    assert FamilySettings().resolve(FamilyConfig("sdd", k_schedule=(3,))).k_schedule == (3,)
    for wrong in ("a", "0,1", "1,,2"):
        with pytest.raises(UserError, match="numbers of candidates"):
            FamilySettings(k_schedule=wrong)


def own_rows(share: float, step: int, rows: int = 400) -> torch.Tensor:
    """Which rows hold beliefs other than total uncertainty at their hidden positions: bool [rows that hide]."""
    family = belief(belief_share=share)
    batch = copies(PACKED, rows)
    view = family.view(both_ways("aggregate"), batch, noise_of(batch, step=step))
    assert isinstance(view.inputs, Candidates)
    hidden = view.weights != 0
    unsure = (view.inputs.probabilities == 1 / IDS.vocabulary).all(-1)
    some = hidden.any(1)
    own = (hidden & ~unsure).any(1)[some]
    assert torch.equal(own, (hidden <= ~unsure).all(1)[some])  # all hidden positions of a row, or none
    return own


def test_a_share_of_the_rows_gets_the_models_own_beliefs() -> None:
    assert not own_rows(0.0, 0).any() and own_rows(1.0, 0).all()
    assert float(own_rows(0.3, 0).float().mean()) == pytest.approx(0.3, abs=0.08)
    assert own_rows(0.0, -1).all()  # in evaluation all, as in writing


@DENOISERS
@torch.no_grad()
def test_own_beliefs_are_the_most_probable_tokens_of_a_first_pass_from_uncertainty(denoiser: str) -> None:
    model = both_ways(denoiser, scale=0.2)
    batch = copies(PACKED, 20)
    first = belief(belief_share=0.0, denoiser=denoiser).view(model, batch, noise_of(batch))
    second = belief(belief_share=1.0, denoiser=denoiser).view(model, batch, noise_of(batch))
    assert isinstance(first.inputs, Candidates) and isinstance(second.inputs, Candidates)
    everywhere = first.weights != 0
    # In these rows beliefs are as old as what is shown; the others come below.
    same_age = noise.uniform(noise_of(batch).seeds, LATER_SHARE, 1) < 0.75
    assert 3 < same_age.sum() < 19
    hidden = everywhere & same_age
    probabilities = model.logits(first.through(model).hidden)[hidden].softmax(-1)
    best = probabilities.topk(4)
    ours = second.inputs.probabilities[hidden]
    torch.testing.assert_close(ours, best.values, atol=1e-5, rtol=1e-4)
    picked = probabilities.gather(1, second.inputs.tokens[hidden])
    torch.testing.assert_close(picked, ours, atol=1e-5, rtol=1e-4)  # of all the vocabulary, not of the four
    assert (ours.sum(1) < 0.999).all()
    assert torch.equal(second.inputs.tokens[~everywhere], first.inputs.tokens[~everywhere])
    assert torch.equal(second.inputs.probabilities[~everywhere], first.inputs.probabilities[~everywhere])
    assert torch.equal(second.weights, first.weights)
    older = everywhere & ~same_age
    gap = model.logits(first.through(model).hidden)[older].softmax(-1).topk(4).values
    assert (second.inputs.probabilities[older] - gap).abs().amax(1).gt(1e-3).float().mean() > 0.3


@torch.no_grad()
def test_older_beliefs_saw_some_of_the_tokens_that_are_shown_and_evaluation_has_none() -> None:
    family, model = belief(belief_share=1.0), both_ways("aggregate")
    batch = copies(PACKED, 400)
    later = family._revealed_later(batch, noise_of(batch))
    may = PACKED.loss_mask[0] | (PACKED.tokens[0] == IDS.ignore)
    assert not later[:, ~may].any()
    shares = later[:, may].float().mean(1)
    assert float((shares == 0).float().mean()) == pytest.approx(0.77, abs=0.06)  # and few draws hide nothing
    assert shares.max() == 1 and float(shares.mean()) == pytest.approx(0.125, abs=0.04)
    # By hand: the first pass sees neither, the second sees what was revealed later.
    view = family.view(model, batch, noise_of(batch))
    assert isinstance(view.inputs, Candidates)
    hidden = view.weights != 0
    unsure = family._total_uncertainty(noise_of(batch).seeds, len(may), 4)
    before = unsure.where(hidden | later, Candidates.known(batch.tokens, 4))
    best = model.logits(model(before, positions=batch.positions, segments=batch.segments).hidden).softmax(-1).topk(4)
    torch.testing.assert_close(view.inputs.probabilities[hidden], best.values[hidden], atol=1e-5, rtol=1e-4)
    assert (view.inputs.probabilities[~hidden, 0] == 1).all() and (later & ~hidden).any()
    evaluated = family.view(model, batch, noise_of(batch, step=-1))
    assert isinstance(evaluated.inputs, Candidates)
    hidden = evaluated.weights != 0
    unsure = family._total_uncertainty(noise_of(batch, step=-1).seeds, len(may), 4)
    before = unsure.where(hidden, Candidates.known(batch.tokens, 4))
    best = model.logits(model(before, positions=batch.positions, segments=batch.segments).hidden).softmax(-1).topk(4)
    torch.testing.assert_close(evaluated.inputs.probabilities[hidden], best.values[hidden], atol=1e-5, rtol=1e-4)


@DENOISERS
def test_beliefs_depend_on_what_is_visible_only(denoiser: str) -> None:
    family, model = belief(belief_share=1.0, denoiser=denoiser), both_ways(denoiser)
    batch = copies(PACKED, 20)
    view = family.view(model, batch, noise_of(batch))
    hidden, shown = view.weights != 0, view.weights == 0
    assert isinstance(view.inputs, Candidates)
    tokens = batch.tokens.clone()
    other = hidden & batch.loss_mask
    tokens[other] = (tokens[other] + 11) % 40 + 5
    again = family.view(model, batch._replace(tokens=tokens), noise_of(batch)).inputs
    assert isinstance(again, Candidates)
    assert other.any() and (tokens != batch.tokens).any()
    assert torch.equal(again.tokens, view.inputs.tokens)
    assert torch.equal(again.probabilities, view.inputs.probabilities)
    trained = shown & batch.loss_mask
    tokens = torch.where(trained, (batch.tokens + 11) % 40 + 5, batch.tokens)
    changed = family.view(model, batch._replace(tokens=tokens), noise_of(batch)).inputs
    assert isinstance(changed, Candidates)
    assert (changed.probabilities - view.inputs.probabilities)[hidden].abs().max() > 1e-3


def test_weights_have_gradients_though_their_casts_made_beliefs_before() -> None:
    family, model = belief(belief_share=1.0), both_ways("aggregate")
    batch = copies(PACKED, 8)
    grads = []
    for together in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            view = family.view(model, batch, noise_of(batch))
            if not together:
                torch.clear_autocast_cache()
            loss = weighted_cross_entropy(view.through(model).hidden, model.head_weight, view.targets, view.weights)
        loss.loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None and grad.any(), name
        torch.testing.assert_close(grad, grads[1][name])


# The bound, by enumeration of hidden subsets and of the random tokens that stand for uncertainty.

SMALL = SpecialIds(vocabulary=4, mask=99, ignore=99, control=())
ROW = [2, 0, 3, 1]


@torch.no_grad()
def exact_bound(model: LanguageModel, tokens: list[int], count: int, own: bool, least: float = 0.0) -> float:
    """As for masked diffusion, and the mean over all fillings of the hidden positions by `count` tokens."""
    length, vocabulary = len(tokens), SMALL.vocabulary
    total = 0.0
    for size in range(1, length + 1):
        for subset in itertools.combinations(range(length), size):
            fillings = torch.tensor(list(itertools.product(range(vocabulary), repeat=size * count)))
            state = Candidates.known(torch.tensor([tokens] * len(fillings)), count)
            state = Candidates(state.tokens.clone(), state.probabilities)
            state.tokens[:, subset] = fillings.view(-1, size, count)
            state.probabilities[:, subset] = 1.0 / vocabulary
            if own:
                best = model.logits(model(state).hidden)[:, subset].softmax(-1).sort(-1, descending=True)
                state.tokens[:, subset] = best.indices[..., :count]
                state.probabilities[:, subset] = best.values[..., :count]
            log_probs = model.logits(model(state).hidden).log_softmax(-1)
            cost = -sum(log_probs[:, place, tokens[place]].mean().item() for place in subset)
            total += cost * subset_weight(size, length, least=least)
    return total


@pytest.mark.parametrize(("count", "length"), [(1, 4), (2, 3)])
@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_the_loss_of_beliefs_is_the_bound_that_all_subsets_give(
    count: int, length: int, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = both_ways("aggregate", vocab_size=4, scale=0.5), ROW[:length]
    batch = copies(batch_of([tokens]), 2048)
    family = belief(SMALL, k_schedule=(count,), belief_share=float(own))
    expected = exact_bound(model, tokens, count, own)
    assert abs(expected - exact_bound(model, tokens, count, not own)) > 0.05 * expected  # can be told apart
    if own:
        check_mean(-family.score(model, batch, noise_of(batch)).total, expected)
    monkeypatch.setattr(noise, "LEAST_LEVEL", LEAST)
    expected = exact_bound(model, tokens, count, own, LEAST)
    # evaluation always asks twice, and its beliefs are as old as what is shown
    check_mean(likelihood_losses(family, model, batch, step=-1 if own else 0), expected)


# The published recipe.


def test_swapping_follows_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    t = 0.6
    amount = 1 - math.cos(t * math.pi / 2)
    fix_level(monkeypatch, t)
    family = belief(noise="swap")
    batch = copies(PACKED, 3000)
    view = family.view(both_ways("aggregate"), batch, noise_of(batch))
    assert isinstance(view.inputs, Candidates)
    trained = PACKED.loss_mask[0] | (PACKED.tokens[0] == IDS.ignore)
    tokens, probabilities = view.inputs.tokens[:, trained], view.inputs.probabilities[:, trained]
    # The certain candidate is swapped with probability n (1 - (1 - n)) = n^2, empty ones with n.
    answer = batch.tokens[:, trained].unsqueeze(-1)
    swapped = (tokens != answer).float().mean((0, 1)) * IDS.vocabulary / (IDS.vocabulary - 1)
    assert swapped[0].item() == pytest.approx(amount**2, abs=0.015)
    assert probabilities[..., 0].unique().tolist() == pytest.approx([1 - amount + amount / IDS.vocabulary])
    assert probabilities[..., 1:].unique().tolist() == pytest.approx([amount / IDS.vocabulary])
    assert torch.equal(view.inputs.tokens[:, ~trained], Candidates.known(batch.tokens, 4).tokens[:, ~trained])
    assert (view.inputs.probabilities[:, ~trained, 0] == 1).all()
    # All trained positions count once, ignore tokens (1 - t)^2.
    weights = view.weights.unique(dim=0)[0]
    assert weights[PACKED.loss_mask[0]].eq(1).all() and not weights[~trained].any()
    assert weights[6:8].tolist() == pytest.approx([(1 - t) ** 2] * 2)
    assert view.count == 3000 * sum(TRAINED)


def test_the_loss_of_swapping_is_no_likelihood() -> None:
    assert belief(noise="swap").likelihood == "none" and belief().likelihood == "upper_bound"
    score = belief(noise="swap").score(both_ways("aggregate"), PACKED, noise_of(PACKED))
    assert score.total.isfinite().all()


@DENOISERS
def test_experts_denoise_too(denoiser: str) -> None:
    model = both_ways(denoiser, use_moe=True).train()
    view = belief(denoiser=denoiser).view(model, PACKED, noise_of(PACKED))
    output = view.through(model)
    assert output.router_loss is not None and output.hidden.isfinite().all()
