"""The AR view and score, the seeds of noise, likelihood and DPO, by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import random_model, tiny_config

from minillm.data.batches import Batch
from minillm.families import FAMILIES, get_family
from minillm.families.autoregressive import Autoregressive
from minillm.families.base import Noise, TokenBatch
from minillm.families.noise import noise_seeds
from minillm.families.settings import ARCHITECTURES, FamilyConfig
from minillm.log import UserError
from minillm.methods.base import real_tokens
from minillm.methods.dpo import DirectPreference
from minillm.methods.likelihood import Likelihood
from minillm.methods.settings import PreferenceSettings
from minillm.models.transformer import LanguageModel
from minillm.text.tokenizer import Tokenizer

AR = Autoregressive()
NOISE = Noise(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 0, 0)
ANY = random_model(tiny_config())  # AR asks no model for its view
CPU = torch.device("cpu")


def small_model(seed: int, **changes: object) -> LanguageModel:
    sizes: dict = {"vocab_size": 20, "num_hidden_layers": 1, "num_experts": 2, "num_experts_per_tok": 1}
    return random_model(tiny_config(**{**sizes, **changes}), seed, scale=0.5)


def row(tokens: list[int], mask: list[int], segments: list[int] | None = None) -> TokenBatch:
    parts = None if segments is None else torch.tensor([segments])
    return TokenBatch(torch.tensor([tokens]), torch.tensor([mask]).bool(), None, parts, torch.tensor([0]))


def test_the_view_is_a_shift_by_one() -> None:
    view = AR.view(ANY, row([5, 6, 7, 8], [1, 0, 1, 1]), NOISE)
    assert view.inputs.tolist() == [[5, 6, 7, 8]]
    assert view.targets[0, :3].tolist() == [6, 7, 8]
    assert view.weights.tolist() == [[0, 1, 1, 0]]  # the first token has nothing before it, the last nothing after
    assert view.count == 2


def test_the_view_never_crosses_segments_or_reaches_padding() -> None:
    view = AR.view(ANY, row([1, 2, 3, 4, 5, 0], [1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, -1]), NOISE)
    assert view.weights.tolist() == [[1, 0, 1, 1, 0, 0]]
    assert view.count == 3


def test_the_view_leaves_the_batch_as_it_was() -> None:
    batch = row([1, 2, 3], [1, 1, 1], [0, 0, 1])
    AR.view(ANY, batch, NOISE)
    assert batch.loss_mask.all() and batch.tokens.tolist() == [[1, 2, 3]]


def test_the_score_is_the_summed_log_softmax() -> None:
    model = small_model(0)
    batch = row([4, 9, 2, 7, 7, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, -1])
    score = AR.score(model, batch, NOISE)
    log_probs = model.logits(model(batch.tokens[:, :5]).hidden)[0].log_softmax(-1)
    wanted = log_probs[1, 2] + log_probs[2, 7] + log_probs[3, 7]
    assert score.total.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert score.count.tolist() == [3]
    assert score.per_token is not None and score.per_token.ne(0).tolist() == [[False, True, True, True, False, False]]


def test_likelihood_is_the_mean_over_trained_tokens() -> None:
    model = small_model(1)
    batch = Batch(np.array([[3, 4, 5, 6]]), np.array([[False, False, True, True]]), None, None, np.array([0]))
    part = Likelihood(AR, 0).prepare(model, batch, CPU, 0, 0)
    loss, metrics = Likelihood(AR, 0).loss(model, part.data)
    log_probs = model.logits(model(torch.tensor([[3, 4, 5, 6]])).hidden)[0].log_softmax(-1)
    assert (part.count, part.tokens) == (2, 4)
    assert loss.item() == pytest.approx(-(log_probs[1, 5] + log_probs[2, 6]).item(), rel=1e-5)
    assert metrics["loss"][1] == metrics["accuracy"][1] == 2.0


def test_padding_is_not_counted_among_the_tokens_read() -> None:
    masks = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)
    batch = TokenBatch(torch.zeros(2, 5, dtype=torch.int64), masks, None, None, torch.arange(2))
    assert real_tokens(batch) == 3 + 5  # a row ends with its last trained token
    segments = torch.tensor([[0, 0, 0, 1, -1], [0, 0, 1, 1, 1]])
    assert real_tokens(batch._replace(segments=segments)) == 4 + 5


def test_the_router_loss_joins_the_training_loss_but_not_the_reported_one() -> None:
    model = small_model(1, use_moe=True).train()
    batch = Batch(np.array([[3, 4, 5, 6]]), np.ones((1, 4), bool), None, None, np.array([0]))
    part = Likelihood(AR, 0).prepare(model, batch, CPU, 0, 0)
    loss, metrics = Likelihood(AR, 0).loss(model, part.data)
    router = model(torch.tensor([[3, 4, 5, 6]])).router_loss
    assert router is not None
    # coefficient 0.01, times 3 trained tokens because the step divides by them
    assert (loss - metrics["loss"][0]).item() == pytest.approx(0.01 * 3 * router.item(), rel=1e-3)


def pairs() -> SimpleNamespace:
    generator = np.random.default_rng(0)

    def side(mask_from: int) -> Batch:
        mask = np.zeros((3, 8), bool)
        mask[:, mask_from:7] = True
        segments = np.zeros((3, 8), np.int32)
        segments[:, 7] = -1
        positions = np.tile(np.arange(8), (3, 1))
        return Batch(generator.integers(0, 20, (3, 8)), mask, positions, segments, np.arange(3))

    return SimpleNamespace(chosen=side(3), rejected=side(4), sample_ids=np.arange(3))


def test_equal_policies_have_a_dpo_loss_of_log_two() -> None:
    model = small_model(2)
    method = DirectPreference(AR, model, PreferenceSettings(beta=0.1), seed=0)
    part = method.prepare(model, pairs(), CPU, 0, 0)
    loss, metrics = method.loss(model, part.data)
    assert (part.count, part.tokens) == (3, 2 * 3 * 7)
    assert loss.item() == pytest.approx(3 * math.log(2), rel=1e-6)
    assert metrics["rewards/margins"][0].item() == 0
    assert metrics["rewards/accuracies"][0].item() == 0  # a tie is not a win


def test_dpo_compares_each_chosen_with_its_own_rejected() -> None:
    model, reference, data = small_model(3), small_model(4), pairs()
    method = DirectPreference(AR, reference, PreferenceSettings(beta=0.3), seed=0)
    loss, metrics = method.loss(model, method.prepare(model, data, CPU, 0, 0).data)
    loss.backward()
    assert all(p.grad is None for p in reference.parameters())
    total, margins = 0.0, 0.0
    for index in range(3):
        score = {}
        for side in ("chosen", "rejected"):
            batch = getattr(data, side)
            tokens, mask = torch.from_numpy(batch.tokens[index, :7]), torch.from_numpy(batch.loss_mask[index, :7])
            for name, each in (("policy", model), ("reference", reference)):
                log_probs = each.logits(each(tokens[None]).hidden)[0].log_softmax(-1)
                picked = log_probs[:-1].gather(1, tokens[1:, None])[:, 0]
                score[name, side] = picked[mask[1:]].sum().item()
        chosen = 0.3 * (score["policy", "chosen"] - score["reference", "chosen"])
        rejected = 0.3 * (score["policy", "rejected"] - score["reference", "rejected"])
        total += math.log(1 + math.exp(rejected - chosen))
        margins += chosen - rejected
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert metrics["rewards/margins"][0].item() == pytest.approx(margins, rel=1e-4)


@pytest.mark.parametrize("seed", [0, 42, 12_345, 2**31, 2**62])
def test_noise_seeds_belong_to_samples_not_to_batches(seed: int) -> None:
    ids = torch.tensor([7, 0, 123_456_789, 3])
    together = noise_seeds(seed, ids, 5)
    alone = torch.cat([noise_seeds(seed, ids[i : i + 1], 5) for i in range(4)])
    assert torch.equal(together, alone)
    assert torch.equal(together.flip(0), noise_seeds(seed, ids.flip(0), 5))
    assert together.min() >= 0


def test_noise_seeds_differ_by_seed_sample_and_step_in_all_their_bits() -> None:
    ids = torch.arange(500)
    table = torch.cat([noise_seeds(seed, ids, step) for seed in (0, 1, 42) for step in (-1, 0, 1, 1000)])
    assert len(table.unique()) == len(table)
    bits = (table[:, None] >> torch.arange(62)) & 1
    assert bits.float().mean(0).sub(0.5).abs().max() < 0.05
    # neighbours differ in half of their bits: nothing of the counter is left
    assert bits.diff(dim=0).abs().float().sum(1).mean().item() == pytest.approx(31, abs=1)


def test_families_are_found_by_name() -> None:
    tokenizer = Tokenizer.load()
    assert tuple(FAMILIES) == ARCHITECTURES
    for name in FAMILIES:
        assert get_family(FamilyConfig(name), tokenizer).name == name
    with pytest.raises(UserError, match="'gpt' does not exist; there is: ar"):
        get_family(FamilyConfig("gpt"), tokenizer)
