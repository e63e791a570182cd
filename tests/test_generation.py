"""Generation: the cache, the batch and the padding change nothing; each sampling setting does what it says."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from tiny import BOTH, DENSE, random_model

from minillm.families.autoregressive import Autoregressive
from minillm.families.base import Sampling
from minillm.families.sampling import choose, filter_logits, penalise_repetition
from minillm.models.cache import KeyValueCache
from minillm.models.config import ModelConfig
from minillm.models.transformer import LanguageModel

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8], [9, 7]]
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
FREE = Sampling(max_new_tokens=12, temperature=1.0, seed=5)
AR = Autoregressive()


@BOTH
@torch.inference_mode()
def test_cached_logits_are_the_uncached_ones_also_beside_padding(config: ModelConfig) -> None:
    model = random_model(config)
    rows = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5], [4, 3, 2]]
    pad = [8 - len(row) for row in rows]
    tokens = torch.tensor([[0] * p + row for p, row in zip(pad, rows)])
    cache = KeyValueCache(config, batch=3, capacity=8, padding=torch.tensor(pad), dtype=torch.float32)
    # a prompt at once, then several tokens, then one by one
    pieces = [model(part, cache=cache).hidden for part in tokens.split([5, 2, 1], dim=1)]
    cached = model.logits(torch.cat(pieces, 1))
    for row, p, logits in zip(rows, pad, cached):
        alone = model.logits(model(torch.tensor([row])).hidden)[0]
        torch.testing.assert_close(logits[p:], alone, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_cache_without_padding_goes_on_in_pieces_too() -> None:
    model, tokens = random_model(DENSE), torch.arange(9)[None]
    cache = KeyValueCache(DENSE, batch=1, capacity=9, padding=torch.tensor([0]), dtype=torch.float32)
    cached = torch.cat([model(part, cache=cache).hidden for part in tokens.split([4, 4, 1], dim=1)], 1)
    torch.testing.assert_close(cached, model(tokens).hidden, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="holds 9 positions, 10"):
        model(tokens[:, :1], cache=cache)


@torch.inference_mode()
def uncached_greedy(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(model(torch.tensor([tokens])).hidden[0, -1]).argmax()))
    return tokens[len(prompt) :]


@BOTH
def test_batched_single_and_uncached_greedy_are_the_same(config: ModelConfig) -> None:
    model = random_model(config)
    batched = AR.generate(model, PROMPTS, GREEDY)
    assert batched == [AR.generate(model, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert batched == [uncached_greedy(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(row) for row in batched}) > 1


def test_rows_that_stop_leave_without_disturbing_the_others() -> None:
    model = random_model(DENSE)
    free = AR.generate(model, PROMPTS, FREE)
    for stop in ((free[0][3],), (free[1][0], free[2][5]), tuple(range(40))):
        stopped = AR.generate(model, PROMPTS, replace(FREE, stop_ids=stop))
        for row, whole in zip(stopped, free):
            end = next((i for i, token in enumerate(whole) if token in stop), len(whole))
            assert row == whole[:end]  # without the stop token


def test_each_row_draws_from_its_own_seed() -> None:
    model = random_model(DENSE)
    batched = AR.generate(model, PROMPTS, FREE)
    assert batched == AR.generate(model, PROMPTS, FREE)
    assert batched != AR.generate(model, PROMPTS, replace(FREE, seed=99))
    for row, prompt in enumerate(PROMPTS):
        assert AR.generate(model, [prompt], replace(FREE, seed=5 + row)) == [batched[row]]


def test_those_who_watch_see_every_token_as_it_comes() -> None:
    seen: list[list[list[int]]] = []
    sampling = replace(FREE, stop_ids=(7, 8, 9))
    written = AR.generate(
        random_model(DENSE),
        PROMPTS,
        sampling,
        lambda progress: seen.append([list(row) for row in progress.tokens]),
    )
    assert seen[-1] == written
    for before, after in itertools.pairwise(seen):
        assert all(new[: len(old)] == old and len(new) - len(old) in (0, 1) for old, new in zip(before, after))


def test_nothing_to_write_and_impossible_prompts() -> None:
    model = random_model(DENSE)
    assert AR.generate(model, [], GREEDY) == []
    assert AR.generate(model, PROMPTS, replace(GREEDY, max_new_tokens=0)) == [[], [], [], []]
    with pytest.raises(ValueError, match="prompt is empty"):
        AR.generate(model, [[1], []], GREEDY)
    with pytest.raises(ValueError, match="56 prompt tokens and 12 new ones exceed the 64 positions"):
        AR.generate(model, [[1] * 56], GREEDY)
    assert len(AR.generate(model, [[1] * 52], GREEDY)[0]) == 12  # exactly full


LOGITS = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()


def probabilities(sampling: Sampling, logits: torch.Tensor = LOGITS) -> list[float]:
    return filter_logits(logits, sampling).softmax(-1)[0].tolist()


def test_temperature_sharpens_and_flattens() -> None:
    # p^(1/T): at T = 1/2 the squares 16, 9, 4, 1 of 30
    assert probabilities(Sampling(temperature=0.5)) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30])
    assert probabilities(Sampling(temperature=1e4)) == pytest.approx([0.25] * 4, abs=1e-3)


@pytest.mark.parametrize(("top_k", "kept"), [(0, 4), (1, 1), (2, 2), (4, 4), (99, 4)])
def test_top_k_keeps_the_k_most_probable(top_k: int, kept: int) -> None:
    assert sum(p > 0 for p in probabilities(Sampling(top_k=top_k))) == kept


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(top_p: float, kept: int) -> None:
    assert sum(p > 0 for p in probabilities(Sampling(top_p=top_p))) == kept
    shuffled = LOGITS[:, [2, 0, 3, 1]]
    wanted = [p > 0 for p in probabilities(Sampling(top_p=top_p))]
    assert [p > 0 for p in probabilities(Sampling(top_p=top_p), shuffled)] == [wanted[i] for i in (2, 0, 3, 1)]


def test_top_p_counts_after_top_k() -> None:
    # of the two kept, the first alone has 4/7 of the mass
    assert probabilities(Sampling(top_k=2, top_p=0.5)) == pytest.approx([1, 0, 0, 0])


def test_repetition_penalty_lowers_what_was_seen_whatever_its_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    assert penalise_repetition(logits, [[0, 1, 0], []], 2.0).tolist() == [[1.0, -4.0, 1.0], [2.0, -2.0, 1.0]]
    assert logits[0, 0] == 2.0  # the model's own logits stay


def test_a_strong_penalty_never_repeats() -> None:
    written = AR.generate(random_model(DENSE), [[1, 2]], replace(GREEDY, repetition_penalty=1e6))[0]
    assert len({1, 2, *written}) == 2 + len(written)


def test_samples_follow_the_probabilities() -> None:
    generator = [torch.Generator().manual_seed(1)]
    drawn = [int(choose(LOGITS, Sampling(), generator)) for _ in range(3000)]
    shares = [drawn.count(token) / 3000 for token in range(4)]
    assert shares == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.04)
    assert {int(choose(LOGITS, Sampling(top_k=1), generator)) for _ in range(20)} == {0}
