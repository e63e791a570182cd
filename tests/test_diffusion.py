"""Masked diffusion: what is hidden, what it weighs, and that the weighted loss is the bound it says it is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from denoisers import (
    CPU,
    IGNORE,
    LEAST,
    MASK,
    PACKED,
    POSITIONS,
    SEGMENTS,
    TRAINED,
    batch_of,
    belief,
    both_ways,
    check_mean,
    copies,
    diffusion,
    fix_level,
    likelihood_losses,
    model_for,
    noise_of,
    subset_weight,
)

from minillm.data.batches import Batch
from minillm.families import noise
from minillm.families.base import SpecialIds, TokenBatch, View
from minillm.families.diffusion import Diffusion
from minillm.families.sdd import SparseDistributionDiffusion
from minillm.methods.likelihood import Likelihood
from minillm.models.candidates import Candidates
from minillm.models.transformer import LanguageModel

ANY = both_ways()  # diffusion asks no model for its view
FAMILIES = pytest.mark.parametrize(
    "family",
    [diffusion(), diffusion(diffusion_block=4), belief(belief_share=0.0), belief(belief_share=1.0)],
    ids=["diffusion", "blocks", "sdd-uncertain", "sdd-own"],
)
SCHEDULES = pytest.mark.parametrize("schedule", ["linear", "cosine"])


def inputs_of(view: View) -> list[torch.Tensor]:
    return list(view.inputs) if isinstance(view.inputs, Candidates) else [view.inputs]


def hidden_at(view: View) -> torch.Tensor:
    """Which positions of the row do not show their token: bool [B, L]."""
    length = 14
    if isinstance(view.inputs, Candidates):
        return ~view.inputs.probabilities[..., 0].eq(1.0)
    return view.inputs[:, :length] != view.targets[:, :length]


@FAMILIES
def test_at_level_zero_nothing_is_hidden(
    family: Diffusion | SparseDistributionDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_level(monkeypatch, 1e-12)
    view = family.view(model_for(family), PACKED, noise_of(PACKED))
    assert not hidden_at(view).any() and not view.weights.any()
    shown = view.inputs.tokens[..., 0] if isinstance(view.inputs, Candidates) else view.inputs[:, :14]
    assert torch.equal(shown, PACKED.tokens)


@FAMILIES
@pytest.mark.parametrize("step", [0, -1])
def test_at_level_one_all_trained_tokens_are_hidden_and_the_model_sees_nothing_of_them(
    family: Diffusion | SparseDistributionDiffusion, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_level(monkeypatch, 1.0)
    model, mask = model_for(family), PACKED.loss_mask
    view = family.view(model, PACKED, noise_of(PACKED, step=step))
    assert torch.equal(hidden_at(view), mask | (PACKED.tokens == IGNORE))
    tokens = PACKED.tokens.clone()
    tokens[mask] = tokens[mask].flip(0)
    permuted = PACKED._replace(tokens=tokens)
    assert not torch.equal(tokens, PACKED.tokens)
    other = family.view(model, permuted, noise_of(permuted, step=step))
    for one, two in zip(inputs_of(view), inputs_of(other)):
        # the clean row of the block-wise model stays clean: what may look at it is tested below
        assert torch.equal(one[:, :14], two[:, :14])
    assert torch.equal(view.weights, other.weights)
    assert not torch.equal(view.targets, other.targets)


@FAMILIES
def test_only_trained_tokens_and_what_follows_an_end_are_ever_hidden(
    family: Diffusion | SparseDistributionDiffusion,
) -> None:
    batch = copies(PACKED, 300)
    view = family.view(model_for(family), batch, noise_of(batch))
    hidden = hidden_at(view)
    often = hidden.float().mean(0)
    may = PACKED.loss_mask[0] | (PACKED.tokens[0] == IGNORE)
    assert (often[may] > 0.35).all() and (often[~may] == 0).all()  # prompts and padding stay as they are
    weights = view.weights[:, :14]
    assert torch.equal(weights != 0, hidden)
    assert often[5] > 0 and weights[:, 5].sum() > 0  # the end of the turn is learned
    assert view.count == 300 * sum(TRAINED)
    assert view.extra is not None and torch.equal(view.extra[0, :14], PACKED.tokens[0] == IGNORE)


@FAMILIES
def test_padding_is_never_seen_and_conversations_do_not_see_each_other(
    family: Diffusion | SparseDistributionDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_level(monkeypatch, 1.0 if isinstance(family, Diffusion) else 0.6)
    model = model_for(family)

    def states(tokens: torch.Tensor) -> torch.Tensor:
        batch = PACKED._replace(tokens=tokens)
        return family.view(model, batch, noise_of(batch, step=-1)).through(model).hidden[0, :14]

    tokens = PACKED.tokens.clone()
    before = states(tokens)
    tokens[0, 12:], tokens[0, 9] = 33, 17  # padding, and the second prompt
    after = states(tokens)
    torch.testing.assert_close(after[:8], before[:8], atol=1e-6, rtol=0)
    assert (after[10:12] - before[10:12]).abs().max() > 1e-3


@FAMILIES
@SCHEDULES
def test_the_weights_of_a_row_are_in_expectation_its_trained_tokens(
    family: Diffusion | SparseDistributionDiffusion, schedule: str
) -> None:
    config = type(family.config)(**{**family.config.__dict__, "noise_schedule": schedule, "belief_share": 0.0})
    family = type(family)(config, family.ids)
    sums, tails = [], []
    for seed in range(4):
        batch = copies(PACKED, 2000, first_id=10_000 * seed)
        view = family.view(ANY, batch, noise_of(batch, seed=seed))
        assert view.extra is not None
        sums.append(view.weights.masked_fill(view.extra, 0.0).sum(1))
        tails.append(view.weights.masked_fill(~view.extra, 0.0).sum(1))
    for values, expected in ((torch.cat(sums), sum(TRAINED)), (torch.cat(tails), 2 * tail_weight(schedule))):
        error = float(values.std()) / math.sqrt(len(values))
        assert error < 0.05 * expected
        assert abs(float(values.mean()) - expected) < 4 * error


def tail_weight(schedule: str) -> float:
    """The integral of m'(t) (1 - t)^2: what an ignore token weighs on average."""
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    slope = noise.hidden_share(schedule, t) * noise.level_weight(schedule, t)
    return float((slope * (1 - t).square()).mean())


def test_conversations_of_a_row_and_blocks_have_levels_of_their_own() -> None:
    length = 400
    segments = torch.arange(length)[None] // 200
    positions = torch.arange(length)[None] % 200
    batch = TokenBatch(torch.full((1, length), 30), torch.ones(1, length).bool(), positions, segments, torch.arange(1))
    for family, size in ((diffusion(), 200), (belief(belief_share=0.0), 200), (diffusion(diffusion_block=100), 100)):
        weights = family.view(ANY, batch, noise_of(batch, slot=3)).weights[0, :length]
        seen = [set(part[part != 0].tolist()) for part in weights.split(size)]
        assert all(len(values) == 1 for values in seen)  # one level, so one weight
        assert len(set().union(*seen)) == length // size


def test_noise_does_not_depend_on_the_batch() -> None:
    batch = copies(PACKED, 8, first_id=40)
    noised = noise_of(batch, seed=1, step=5, slot=100)
    for family in (diffusion(), diffusion(diffusion_block=4), belief()):
        model = model_for(family)
        whole = family.view(model, batch, noised)
        for row in range(8):
            alone = TokenBatch(*(None if part is None else part[row : row + 1] for part in batch))  # type: ignore[arg-type]
            view = family.view(model, alone, noise_of(alone, seed=1, step=5, slot=100 + row))
            for one, two in zip(inputs_of(whole), inputs_of(view)):
                torch.testing.assert_close(one[row], two[0], atol=1e-6, rtol=0)
            assert torch.equal(whole.weights[row], view.weights[0])


def test_attention_opens_to_what_follows_over_the_annealing_steps() -> None:
    batch = batch_of([list(range(5, 37))], segments=[[0] * 20 + [1] * 12])
    family = diffusion(anneal_steps=100)
    same = batch.segments[:, :, None] == batch.segments[:, None, :]  # type: ignore[index]
    ahead = same[0] & torch.ones(32, 32).triu(1).bool()
    shares = []
    for step in (0, 50, 99):
        mask = family.view(ANY, batch, noise_of(batch, step=step)).mask
        assert mask is not None
        open_ = mask[0, 0]
        assert torch.equal(open_ & ~ahead, same[0] & ~ahead)  # what lies behind is always open, other texts never
        shares.append(float(open_[ahead].float().mean()))
    assert shares[0] == 0 and shares[1] == pytest.approx(0.5, abs=0.12) and shares[2] > 0.95
    for step in (100, -1):
        assert family.view(ANY, batch, noise_of(batch, step=step)).mask is None


# The bound, by enumeration: 5 trained tokens behind a prompt of one, over a vocabulary of 9.

SMALL = SpecialIds(vocabulary=9, mask=1, ignore=2, control=(0, 1))
ROW = [[3, 7, 4, 4, 8, 5]]
SMALL_MODEL = both_ways(vocab_size=9, scale=0.5)


def subsets(places: list[int]) -> list[tuple[int, ...]]:
    return [s for size in range(1, len(places) + 1) for s in itertools.combinations(places, size)]


def test_over_all_levels_subsets_weigh_one_by_their_size() -> None:
    for schedule, size in itertools.product(("linear", "cosine"), range(1, 6)):
        assert subset_weight(size, 5, schedule) == pytest.approx(1 / size / math.comb(5, size), rel=1e-4)


@torch.no_grad()
def exact_bound(
    model: LanguageModel, tokens: list[int], places: list[int], schedule: str = "linear", least: float = 0.0
) -> float:
    """The sum over all hidden subsets of what their tokens cost, under the subsets' weights."""
    chosen = subsets(places)
    rows = torch.tensor([tokens] * len(chosen))
    for row, subset in zip(rows, chosen):
        row[list(subset)] = MASK
    log_probs = model.logits(model(rows).hidden).double().log_softmax(-1)
    total = 0.0
    for index, subset in enumerate(chosen):
        cost = -sum(float(log_probs[index, place, tokens[place]]) for place in subset)
        total += cost * subset_weight(len(subset), len(places), schedule, least)
    return total


@SCHEDULES
@torch.no_grad()
def test_score_and_loss_are_the_bound_that_all_subsets_give(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = exact_bound(SMALL_MODEL, ROW[0], [1, 2, 3, 4, 5])
    batch = copies(batch_of(ROW, [[0, 1, 1, 1, 1, 1]]), 2048)
    family = diffusion(SMALL, noise_schedule=schedule, score_samples=4)
    score = family.score(SMALL_MODEL, batch, noise_of(batch))
    assert score.per_token is None and score.count.tolist() == [5] * 2048
    check_mean(-score.total, expected)
    monkeypatch.setattr(noise, "LEAST_LEVEL", LEAST)
    expected = exact_bound(SMALL_MODEL, ROW[0], [1, 2, 3, 4, 5], schedule, LEAST)
    check_mean(likelihood_losses(family, SMALL_MODEL, batch), expected)


def test_more_samples_and_spreading_them_make_the_score_steadier() -> None:
    batch = copies(batch_of(ROW, [[0, 1, 1, 1, 1, 1]]), 512)
    with torch.no_grad():
        one, eight = (
            diffusion(SMALL, score_samples=n).score(SMALL_MODEL, batch, noise_of(batch)).total.var() for n in (1, 8)
        )
    assert eight < one / 8


def test_the_score_is_differentiable_and_of_ignore_tokens_costs_nothing() -> None:
    for family in (diffusion(), diffusion(diffusion_block=4), belief()):
        model = model_for(family)
        score = family.score(model, PACKED, noise_of(PACKED))
        score.total.sum().backward()
        assert score.total < 0 and score.count.tolist() == [sum(TRAINED)]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_ignore_tokens_are_trained_but_not_reported() -> None:
    family = diffusion()
    part = Batch(*(None if each is None else each.numpy() for each in copies(PACKED, 64)))  # type: ignore[arg-type]
    prepared = Likelihood(family, 0).prepare(ANY, part, CPU, 0, 0)
    loss, metrics = Likelihood(family, 0).loss(ANY, prepared.data)
    hidden = prepared.data.weights != 0
    log_probs = ANY.logits(prepared.data.through(ANY).hidden).log_softmax(-1)
    costs = -log_probs.gather(2, prepared.data.targets[..., None]).squeeze(2) * prepared.data.weights
    extra = prepared.data.extra
    assert loss.item() == pytest.approx(costs.sum().item(), rel=1e-4)
    assert metrics["loss"][0].item() == pytest.approx(costs[~extra].sum().item(), rel=1e-4)
    assert costs[extra].sum() > 1
    hits = log_probs.argmax(-1) == prepared.data.targets
    assert metrics["accuracy"][1] == (hidden & ~extra).sum()
    assert metrics["ignore_acc"][1] == (hidden & extra).sum()
    assert metrics["ignore_acc"][0].item() == (hits & hidden & extra).sum()
    assert prepared.count == 64 * sum(TRAINED) and prepared.tokens == 64 * 12


# Blocks that are autoregressive among each other.


def block_rows(model: LanguageModel, tokens: torch.Tensor, block: int) -> torch.Tensor:
    """Hidden states of rows whose positions see their block and those before: what blocks mean, in one row."""
    number = torch.arange(tokens.shape[1]) // block
    mask = number[:, None] >= number[None, :]
    return model(tokens, mask=mask.expand(len(tokens), 1, *mask.shape)).hidden


@torch.no_grad()
def test_noised_blocks_see_themselves_noised_and_earlier_blocks_clean() -> None:
    tokens = torch.randint(5, 50, (1, 10), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(tokens, torch.ones(1, 10).bool(), None, None, torch.arange(1))
    view = diffusion(diffusion_block=4).view(ANY, batch, noise_of(batch))
    assert isinstance(view.inputs, torch.Tensor) and view.inputs.shape == (1, 20)
    states = view.through(ANY).hidden
    noised, clean = view.inputs.chunk(2, dim=1)
    assert torch.equal(clean, tokens) and (noised == MASK).any()
    for start in (0, 4, 8):
        row = torch.cat((clean[:, :start], noised[:, start : start + 4]), dim=1)
        torch.testing.assert_close(
            states[:, start : start + 4][:, : row.shape[1] - start], block_rows(ANY, row, 4)[:, start:],
            atol=1e-5, rtol=0,
        )  # fmt: skip


@torch.no_grad()
def test_a_clean_token_never_reaches_predictions_of_its_own_or_earlier_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_level(monkeypatch, 1.0)
    family = diffusion(diffusion_block=3)
    batch = batch_of([list(range(10, 19))])

    def predictions(tokens: torch.Tensor) -> torch.Tensor:
        changed = batch._replace(tokens=tokens)
        return family.view(ANY, changed, noise_of(changed)).through(ANY).hidden[0, :9]

    before = predictions(batch.tokens)
    for place in range(9):
        tokens = batch.tokens.clone()
        tokens[0, place] = 40
        moved = (predictions(tokens) - before).abs().amax(1) > 1e-6
        assert moved.tolist() == [position // 3 > place // 3 for position in range(9)]


@torch.no_grad()
def test_blocks_of_one_token_are_conditionals_on_the_prefix_and_their_bound_is_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(noise, "LEAST_LEVEL", LEAST)
    tokens = torch.tensor(ROW)
    batch = batch_of(ROW)
    family = diffusion(SMALL, diffusion_block=1, score_samples=1)
    exact = 0.0
    for place in range(6):
        row = tokens[:, : place + 1].clone()
        row[0, place] = MASK
        state = block_rows(SMALL_MODEL, row, 1)[0, place]
        exact += float(SMALL_MODEL.logits(state).log_softmax(-1)[ROW[0][place]])
    many = copies(batch, 1024)
    score = family.score(SMALL_MODEL, many, noise_of(many))
    check_mean(-score.total, -exact)


@torch.no_grad()
def test_the_bound_of_blocks_is_the_sum_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "LEAST_LEVEL", LEAST)
    expected = 0.0
    for start in (0, 3):
        for subset in subsets(list(range(start, start + 3))):
            row = torch.tensor([ROW[0][: start + 3]])
            row[0, list(subset)] = MASK
            log_probs = SMALL_MODEL.logits(block_rows(SMALL_MODEL, row, 3)).log_softmax(-1)[0]
            cost = -sum(float(log_probs[place, ROW[0][place]]) for place in subset)
            expected += cost * subset_weight(len(subset), 3, least=LEAST)
    batch = copies(batch_of(ROW), 1024)
    family = diffusion(SMALL, diffusion_block=3)
    check_mean(-family.score(SMALL_MODEL, batch, noise_of(batch)).total, expected)
    check_mean(likelihood_losses(family, SMALL_MODEL, batch), expected)


def test_views_of_blocks_keep_packed_conversations_apart() -> None:
    view = diffusion(diffusion_block=4).view(ANY, PACKED, noise_of(PACKED))
    assert view.mask is not None and view.positions is not None and view.segments is not None
    mask = view.mask[0, 0].numpy()
    where = np.array(SEGMENTS * 2)
    assert not (mask & (where[:, None] != where[None, :])).any()
    assert mask.diagonal().all()  # nobody's softmax is empty
    assert not mask[14:, :14].any()  # the clean row sees nothing noised
    assert view.positions[0].tolist() == POSITIONS * 2
