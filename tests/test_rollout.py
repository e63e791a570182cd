"""The engine writes what the model would write alone, and says how probable that was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import BOTH, DENSE, MOE, random_model, tiny_config

from minillm.families.autoregressive import Autoregressive
from minillm.families.base import Family, Noise, Sampling, SpecialIds, TokenBatch
from minillm.families.diffusion import Diffusion
from minillm.families.sdd import SparseDistributionDiffusion
from minillm.families.settings import FamilyConfig
from minillm.log import UserError
from minillm.models.cache import Cache
from minillm.models.config import ModelConfig
from minillm.models.decoding import PackedDecoder
from minillm.models.lora import LoraConfig, add_adapter
from minillm.models.transformer import LanguageModel
from minillm.rollout.base import Completion
from minillm.rollout.engine import ModelEngine, completion_seeds, draw

AR = Autoregressive()
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8], [4], [11, 12, 13, 14]]
IDS = SpecialIds(50, 4, 5, (0, 2, 4))
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
FREE = Sampling(max_new_tokens=12, seed=5)
STOPPING = replace(FREE, stop_ids=(7, 8, 9, 21, 22, 23, 30))


def scored(family: Family, model: LanguageModel, prompt: Sequence[int], completion: Completion) -> list[float]:
    """What `score` says of each new token."""
    tokens = torch.tensor([[*prompt, *completion.tokens]])
    mask = torch.arange(tokens.shape[1])[None] >= len(prompt)
    batch = TokenBatch(tokens, mask, None, None, torch.tensor([0]))
    per_token = family.score(model, batch, Noise.of(0, batch, -1, 0)).per_token
    assert per_token is not None
    return per_token[0, len(prompt) - 1 : -1].tolist()


def tokens_of(written: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.tokens for completion in group] for group in written]


@BOTH
def test_greedy_is_what_the_family_writes(config: ModelConfig) -> None:
    model = random_model(config)
    free = AR.generate(model, PROMPTS, GREEDY)
    for stops in ((), (free[0][3], free[1][5])):
        sampling = replace(GREEDY, stop_ids=stops)
        written = ModelEngine(AR, model, rows=3).generate(PROMPTS, count=1, sampling=sampling)
        for (completion,), wanted in zip(written, AR.generate(model, PROMPTS, sampling)):
            assert completion.tokens[: len(wanted)] == wanted
            assert completion.finished == (len(wanted) < 12)
            assert completion.tokens[len(wanted) :] == ([completion.tokens[-1]] if completion.finished else [])
            assert not completion.finished or completion.tokens[-1] in stops


@BOTH
@pytest.mark.parametrize(
    "sampling",
    [STOPPING, replace(STOPPING, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.3), GREEDY],
    ids=["plain", "filtered", "greedy"],
)
def test_log_probs_are_those_of_score_whatever_the_sampling(config: ModelConfig, sampling: Sampling) -> None:
    model = random_model(config)
    written = ModelEngine(AR, model, rows=5).generate(PROMPTS, count=3, sampling=sampling)
    for prompt, group in zip(PROMPTS, written):
        for completion in group:
            assert completion.log_probs is not None
            assert len(completion.log_probs) == len(completion.tokens)
            assert completion.log_probs == pytest.approx(scored(AR, model, prompt, completion), abs=1e-4)


@BOTH
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 64])
def test_the_number_of_rows_changes_nothing(config: ModelConfig, rows: int) -> None:
    model = random_model(config)
    wanted = ModelEngine(AR, model, rows=7).generate(PROMPTS, count=3, sampling=STOPPING)
    written = ModelEngine(AR, model, rows=rows).generate(PROMPTS, count=3, sampling=STOPPING)
    assert tokens_of(written) == tokens_of(wanted)
    lengths = {len(completion.tokens) for group in wanted for completion in group}
    assert len(lengths) > 3 and 12 in lengths  # they end at different times, and some at the limit
    assert all(len(group) == 3 for group in written)


def test_other_prompts_and_their_order_change_nothing() -> None:
    engine = ModelEngine(AR, random_model(DENSE), rows=4)
    together = engine.generate(PROMPTS, count=2, sampling=STOPPING)
    backwards = engine.generate(PROMPTS[::-1], count=2, sampling=STOPPING)
    assert tokens_of(backwards) == tokens_of(together)[::-1]
    for prompt, group in zip(PROMPTS, together):
        assert tokens_of(engine.generate([prompt], count=2, sampling=STOPPING)) == tokens_of([group])
    assert tokens_of(engine.generate(PROMPTS, count=2, sampling=replace(STOPPING, seed=6))) != tokens_of(together)


def test_the_same_prompt_twice_gets_other_completions() -> None:
    engine = ModelEngine(AR, random_model(DENSE))
    first, second = tokens_of(engine.generate([[1, 2], [1, 2]], count=2, sampling=FREE))
    assert len({tuple(tokens) for tokens in first + second}) == 4
    assert len(np.unique(completion_seeds([[1], [1], [1, 2], []], 4, 3))) == 16


def test_a_prompt_is_read_once_for_all_its_completions() -> None:
    model = random_model(DENSE)
    read: list[int] = []
    model.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    sampling = replace(FREE, max_new_tokens=1)
    written = ModelEngine(AR, model, rows=2).generate([PROMPTS[0]], count=5, sampling=sampling)
    assert read == [7]
    alone = ModelEngine(AR, model).generate([PROMPTS[0]], count=1, sampling=sampling)
    assert written[0][0].log_probs == pytest.approx(alone[0][0].log_probs)


def test_finished_rows_make_room_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(DENSE)
    sizes: list[int] = []
    step = PackedDecoder.step

    def watched(self: PackedDecoder, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        sizes.append(len(tokens))
        return step(self, tokens, cache)

    monkeypatch.setattr(PackedDecoder, "step", watched)
    sampling = replace(STOPPING, max_new_tokens=40)
    written = ModelEngine(AR, model, rows=4).generate(PROMPTS, count=8, sampling=sampling)
    steps = [len(completion.tokens) - 1 for group in written for completion in group]
    assert sum(sizes) == sum(steps)  # no row runs on after its end
    assert max(sizes) == 4
    waves = sum(max(steps[start : start + 4]) for start in range(0, len(steps), 4))  # if all waited for the longest
    assert len(sizes) < 0.7 * waves


def test_sampling_follows_the_model() -> None:
    model = random_model(DENSE)
    engine = ModelEngine(AR, model, rows=500)
    counts = np.zeros(50)
    for group in engine.generate([[3, 1]], count=3000, sampling=replace(FREE, max_new_tokens=1)):
        for completion in group:
            counts[completion.tokens[0]] += 1
    wanted = model.logits(model(torch.tensor([[3, 1]])).hidden[0, -1]).softmax(-1).detach().numpy()
    assert np.abs(counts / 3000 - wanted).max() < 0.03


def test_a_draw_never_takes_what_has_no_mass() -> None:
    masses = torch.tensor([[0.0, 2.0, 0.0, 2.0, 0.0]])
    for number, token in ((0.0, 1), (0.49, 1), (0.5, 3), (0.99999994, 3), (1.0, 3)):
        assert int(draw(masses, torch.tensor([number]))) == token


def test_training_mode_comes_back_and_no_gradient_is_kept() -> None:
    model = random_model(MOE).train()
    ModelEngine(AR, model).generate([[1, 2]], count=2, sampling=FREE)
    assert model.training
    ModelEngine(AR, model).generate([[1, 2]], count=2, sampling=FREE)
    score = scored(AR, model, [1, 2], Completion([3, 4], None, False))
    assert np.isfinite(score).all()


@BOTH
def test_an_adapter_is_merged_while_it_writes_and_leaves_no_trace(config: ModelConfig) -> None:
    model = random_model(config)
    add_adapter(model, LoraConfig(rank=2, alpha=4.0), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    written = ModelEngine(AR, model).generate(PROMPTS, count=2, sampling=STOPPING)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for prompt, group in zip(PROMPTS, written):
        for completion in group:
            assert completion.log_probs == pytest.approx(scored(AR, model, prompt, completion), abs=1e-4)
    plain = ModelEngine(AR, random_model(config)).generate(PROMPTS, count=2, sampling=STOPPING)
    assert tokens_of(plain) != tokens_of(written)


def test_new_weights_are_used_after_update() -> None:
    first, second = random_model(DENSE), random_model(DENSE, seed=1)
    engine = ModelEngine(AR, first)
    before = tokens_of(engine.generate(PROMPTS, count=1, sampling=GREEDY))
    engine.update(second)
    after = tokens_of(engine.generate(PROMPTS, count=1, sampling=GREEDY))
    assert after != before
    assert after == tokens_of(ModelEngine(AR, second).generate(PROMPTS, count=1, sampling=GREEDY))


def test_low_precision_keeps_log_probs_near() -> None:
    model = random_model(DENSE)
    engine = ModelEngine(AR, model, dtype=torch.bfloat16)
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, count=2, sampling=STOPPING)):
        for completion in group:
            exact = scored(AR, model, prompt, completion)
            assert completion.log_probs == pytest.approx(exact, abs=0.5)
            assert completion.log_probs != pytest.approx(exact, abs=1e-5)  # it is another arithmetic


def test_impossible_prompts_are_errors_that_say_so() -> None:
    engine = ModelEngine(AR, random_model(DENSE))
    assert engine.generate([], count=2, sampling=FREE) == []
    with pytest.raises(UserError, match="prompt is empty"):
        engine.generate([[1], []], count=1, sampling=FREE)
    with pytest.raises(
        UserError, match=r"has 60 tokens and 12 new ones .* 64 positions: lower --max_completion_length"
    ):
        engine.generate([[1] * 60], count=1, sampling=FREE)
    with pytest.raises(UserError, match="at least one token"):
        engine.generate([[1]], count=1, sampling=replace(FREE, max_new_tokens=0))


def unordered(name: str, block: int = 0) -> tuple[Family, LanguageModel]:
    config = FamilyConfig(architecture=name, diffusion_block=block)
    if name == "diffusion":
        return Diffusion(config, IDS), random_model(tiny_config(causal=False))
    return SparseDistributionDiffusion(config, IDS), random_model(tiny_config(causal=False, denoiser="aggregate"))


@pytest.mark.parametrize(("name", "block"), [("diffusion", 0), ("diffusion", 4), ("sdd", 0)])
@pytest.mark.parametrize("length", [0, 3])
def test_canvases_are_the_familys_with_their_stop_token(name: str, block: int, length: int) -> None:
    family, model = unordered(name, block)
    sampling = replace(STOPPING, max_new_tokens=8, block_length=length)
    written = ModelEngine(family, model, rows=5).generate(PROMPTS, count=3, sampling=sampling)
    seeds = completion_seeds(PROMPTS, 3, sampling.seed)
    ends = []
    for prompt, own, group in zip(PROMPTS, seeds.tolist(), written):
        for seed, completion in zip(own, group):
            wanted = family.generate(model, [prompt], replace(sampling, seeds=(seed,)))[0]
            assert completion.log_probs is None
            assert completion.tokens[: len(wanted)] == wanted
            if completion.finished:
                assert completion.tokens[-1] in sampling.stop_ids and len(completion.tokens) == len(wanted) + 1
            else:
                assert completion.tokens == wanted and not set(wanted) & set(sampling.stop_ids)
            ends.append(completion.finished)
    assert True in ends and False in ends


def test_canvases_do_not_depend_on_rows_either() -> None:
    family, model = unordered("diffusion")
    sampling = replace(STOPPING, max_new_tokens=6)
    one, all_at_once = (
        tokens_of(ModelEngine(family, model, rows=rows).generate(PROMPTS, count=2, sampling=sampling))
        for rows in (1, 9)
    )
    assert one == all_at_once


@pytest.mark.parametrize(("name", "block"), [("diffusion", 0), ("diffusion", 4), ("sdd", 0)])
def test_canvases_are_written_in_low_precision_too(name: str, block: int) -> None:
    family, model = unordered(name, block)
    sampling = replace(STOPPING, max_new_tokens=8, block_length=3)
    written = ModelEngine(family, model, dtype=torch.bfloat16).generate(PROMPTS, count=2, sampling=sampling)
    assert all(0 < len(completion.tokens) <= 8 for group in written for completion in group)
