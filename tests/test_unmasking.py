"""Writing in no order: batches, padding and caches change nothing; each setting does what it says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from denoisers import IDS, IGNORE, MASK, belief, both_ways, diffusion, model_for

from minillm.families.base import Progress, Sampling, SpecialIds
from minillm.families.diffusion import Diffusion
from minillm.families.sdd import SparseDistributionDiffusion
from minillm.families.unmasking import Block, Writer
from minillm.models.candidates import Candidates
from minillm.models.decoding import PackedDecoder
from minillm.models.transformer import LanguageModel

PROMPTS = [[13, 21, 34, 21, 35, 39, 22], [16], [25, 43, 15, 28], [29, 37], []]
# An id that is never written stands for IGNORE where all new tokens are to be counted.
PLAIN = SpecialIds(vocabulary=50, mask=1, ignore=0, control=(0, 1, 3))
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
FREE = replace(GREEDY, temperature=1.0, seed=5)
FAMILIES = pytest.mark.parametrize(
    "family",
    [diffusion(PLAIN), diffusion(PLAIN, diffusion_block=4), belief(PLAIN), belief(PLAIN, denoiser="bilateral")],
    ids=["diffusion", "blocks", "sdd", "bilateral"],
)
AnyFamily = Diffusion | SparseDistributionDiffusion


def watched(
    family: AnyFamily, model: LanguageModel, prompts: list[list[int]], sampling: Sampling
) -> tuple[list[list[int]], list[Progress]]:
    seen: list[Progress] = []
    return family.generate(model, prompts, sampling, seen.append), seen


@FAMILIES
@pytest.mark.parametrize("changes", [{}, {"block_length": 5}, {"steps": 4}, {"threshold": 0.3}], ids=str)
def test_prompts_of_different_lengths_are_written_together_as_alone(family: AnyFamily, changes: dict[str, Any]) -> None:
    model, seen = model_for(family), set()
    for sampling in (replace(GREEDY, **changes), replace(FREE, order="random", **changes)):
        together = family.generate(model, PROMPTS, sampling)
        alone = [
            family.generate(model, [prompt], replace(sampling, seed=sampling.seed + row))[0]
            for row, prompt in enumerate(PROMPTS)
        ]
        assert together == alone
        seen |= {tuple(row) for row in together}
    assert len(seen) > 3


@FAMILIES
@pytest.mark.parametrize("block_length", [0, 5])
def test_exactly_so_many_tokens_are_written_and_never_a_control_token(family: AnyFamily, block_length: int) -> None:
    model = model_for(family)
    for seed in range(5):
        written = family.generate(model, PROMPTS, replace(FREE, seed=seed, block_length=block_length))
        assert all(len(row) == 12 for row in written)
        assert not set(itertools.chain(*written)) & set(PLAIN.control)


@FAMILIES
def test_control_tokens_are_not_written_however_probable(family: AnyFamily) -> None:
    model = model_for(family)
    with torch.no_grad():
        model.head_weight[[0, 1, 3]] *= 20
    written = family.generate(model, PROMPTS, GREEDY)
    assert not set(itertools.chain(*written)) & {0, 1, 3} and all(len(row) == 12 for row in written)


@FAMILIES
@pytest.mark.parametrize("block_length", [0, 5])
def test_stop_tokens_end_the_text_without_disturbing_others(family: AnyFamily, block_length: int) -> None:
    model = model_for(family)
    sampling = replace(FREE, block_length=block_length)
    whole = family.generate(model, PROMPTS, sampling)
    for stop in ((whole[0][3],), (whole[1][0], whole[2][7]), tuple(range(4, 45))):
        stopped = family.generate(model, PROMPTS, replace(sampling, stop_ids=stop))
        for row, free in zip(stopped, whole):
            end = next((i for i, token in enumerate(free) if token in stop), len(free))
            assert row == free[:end]  # without the stop token


def test_ignore_tokens_are_left_out_of_the_text() -> None:
    for family, plain in ((diffusion(), diffusion(PLAIN)), (belief(), belief(PLAIN))):
        model = model_for(family)
        with torch.no_grad():
            model.head_weight[IGNORE] *= 4
        with_them = plain.generate(model, PROMPTS, FREE)
        assert any(IGNORE in row for row in with_them)
        without = family.generate(model, PROMPTS, FREE)
        assert without == [[token for token in row if token != IGNORE] for row in with_them]


@torch.inference_mode()
def unmask_by_hand(model: LanguageModel, prompt: list[int], count: int, steps: int, causal: int = 0) -> list[int]:
    """Greedy writing as simply as it can be said: the whole row is read again at each step."""
    row = torch.tensor([prompt + [MASK] * count])
    mask = None
    if causal:
        number = torch.arange(row.shape[1]) // causal
        mask = (number[:, None] >= number[None, :])[None, None]
    for step in range(steps):
        hidden = (row[0] == MASK).nonzero()[:, 0].tolist()
        logits = model.logits(model(row, mask=mask).hidden)[0]
        logits[:, [0, 1, 3]] = -torch.inf
        sure = logits.softmax(-1).max(-1)
        best = sorted(hidden, key=lambda place: -float(sure.values[place]))
        keep_hidden = round(count * (1 - (step + 1) / steps))
        for place in best[: len(hidden) - keep_hidden]:
            row[0, place] = sure.indices[place]
    return row[0, len(prompt) :].tolist()


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_a_canvas_is_revealed_by_confidence(steps: int) -> None:
    family, model = diffusion(PLAIN), both_ways()
    written = family.generate(model, PROMPTS, replace(GREEDY, steps=steps))
    assert written == [unmask_by_hand(model, prompt, 12, steps) for prompt in PROMPTS]


def test_the_cache_of_block_wise_models_is_exact() -> None:
    family, model = diffusion(PLAIN, diffusion_block=4), both_ways()
    written = family.generate(model, PROMPTS, replace(GREEDY, max_new_tokens=11))
    for prompt, row in zip(PROMPTS, written):
        text, end = list(prompt), len(prompt) + 11
        while len(text) < end:  # to the next multiple of 4, as the model's blocks lie
            new = min(4 - len(text) % 4, end - len(text))
            text += unmask_by_hand(model, text, new, new, causal=4)
        assert row == text[len(prompt) :]


@FAMILIES
def test_steps_are_the_number_of_times_the_model_is_asked(family: AnyFamily) -> None:
    model = model_for(family)
    block = family.config.diffusion_block
    for steps, per_canvas in ((0, 12), (12, 12), (6, 6), (3, 3)):
        _, seen = watched(family, model, [[20, 21, 22, 23]], replace(GREEDY, steps=steps))
        assert len(seen) == per_canvas
        counts = [12 - sum(row.count(MASK) for row in progress.tokens) for progress in seen]
        if not block:
            assert counts == [12 * (step + 1) // per_canvas for step in range(per_canvas)]
    if not block:
        assert len(watched(family, model, [[20]], replace(GREEDY, steps=1))[1]) == 1
        assert len(watched(family, model, [[20]], replace(GREEDY, steps=99))[1]) == 12


@FAMILIES
def test_a_threshold_reveals_all_that_is_sure_and_at_least_one(family: AnyFamily) -> None:
    model = model_for(family)
    one_each = watched(family, model, [[20, 21, 22, 23]], replace(GREEDY, threshold=1.0))
    assert len(one_each[1]) == 12
    blocks = 3 if family.config.diffusion_block else 1
    assert len(watched(family, model, [[20, 21, 22, 23]], replace(GREEDY, threshold=1e-6))[1]) == blocks
    counts = {len(watched(family, model, [prompt], replace(GREEDY, threshold=0.2))[1]) for prompt in PROMPTS}
    assert all(blocks <= count <= 12 for count in counts) and min(counts) < 12
    assert len(watched(family, model, PROMPTS, replace(FREE, threshold=0.3))[0][0]) == 12


@FAMILIES
@pytest.mark.parametrize("block_length", [0, 6])
def test_tokens_are_thought_over_and_writing_still_ends(family: AnyFamily, block_length: int) -> None:
    model = model_for(family)
    sampling = replace(FREE, remask=0.5, steps=6, block_length=block_length)
    written, seen = watched(family, model, PROMPTS, sampling)
    assert all(len(row) == 12 for row in written)
    assert all(MASK not in row for row in seen[-1].tokens)
    changed = 0
    for before, after in itertools.pairwise(seen):
        for old, new in zip(before.tokens, after.tokens):
            changed += sum(a not in (MASK, b) for a, b in zip(old, new))
    assert changed > 0
    assert written != family.generate(model, PROMPTS, replace(sampling, remask=0.0))


@FAMILIES
def test_random_order_differs_by_seed_and_is_reproducible(family: AnyFamily) -> None:
    model = model_for(family)
    orders = []
    for seed in (1, 1, 2):
        _, seen = watched(family, model, [[20]], replace(GREEDY, order="random", seed=seed))
        orders.append([tuple(place for place, token in enumerate(p.tokens[0]) if token == MASK) for p in seen])
    assert orders[0] == orders[1] != orders[2]
    free = replace(FREE, order="random")
    assert family.generate(model, PROMPTS, free) == family.generate(model, PROMPTS, free)
    assert family.generate(model, PROMPTS, free) != family.generate(model, PROMPTS, replace(free, seed=77))


@FAMILIES
def test_blocks_are_written_from_left_to_right(family: AnyFamily) -> None:
    model = model_for(family)
    size = family.config.diffusion_block or 5
    written, seen = watched(family, model, PROMPTS[:1], replace(FREE, block_length=size))
    prompt = len(PROMPTS[0]) if family.config.diffusion_block else 0  # its blocks count from the first token
    lengths = []
    for progress in seen:
        row = progress.tokens[0]
        first_hidden = row.index(MASK) if MASK in row else len(row)
        started = (len(row) + prompt - 1) // size * size - prompt  # the block under way
        assert first_hidden >= started
        lengths.append(len(row))
    assert lengths == sorted(lengths) and lengths[0] < 12 == lengths[-1]
    assert seen[-1].tokens == written


@pytest.mark.parametrize("family", [diffusion(PLAIN), belief(PLAIN)], ids=["diffusion", "sdd"])
def test_the_first_step_of_a_block_reads_all_and_the_following_reuse_the_prefix(
    family: AnyFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_for(family)
    lengths, answers = [], []
    read = PackedDecoder.read

    def spied(self: PackedDecoder, inputs: Any, cache: Any) -> Any:
        hidden = read(self, inputs, cache)
        states = inputs.tokens if isinstance(inputs, Candidates) else inputs
        lengths.append(states.shape[1])
        if states.shape[1] > 4:  # the whole row: the same again without a cache
            answers.append((hidden - self.model(inputs).hidden).abs().max())
        return hidden

    monkeypatch.setattr(PackedDecoder, "read", spied)
    family.generate(model, [[20, 21, 22]], replace(GREEDY, block_length=4))
    more = [4] * bool(family.denoiser)  # a pass that forms beliefs and reveals nothing
    assert lengths == [7, *more, 4, 4, 4, 11, *more, 4, 4, 4, 15, *more, 4, 4, 4]
    assert len(answers) == 3 and max(answers) < 1e-5


@pytest.mark.parametrize("denoiser", ["aggregate", "bilateral"])
@pytest.mark.parametrize("block_length", [0, 4])
def test_those_who_watch_see_beliefs_sharpen(denoiser: str, block_length: int) -> None:
    family, model = belief(PLAIN, denoiser=denoiser), both_ways(denoiser)
    _, seen = watched(family, model, PROMPTS, replace(GREEDY, block_length=block_length))
    new = block_length or 12
    for progress in seen:
        assert progress.candidates is not None
        tokens, probabilities = progress.candidates
        assert tokens.shape == probabilities.shape == (len(PROMPTS), new, 4)
        assert (probabilities >= 0).all() and (probabilities.sum(-1) <= 1 + 1e-5).all()
        assert (probabilities.diff(dim=-1) <= 0).all()  # the most probable first
        assert (probabilities.sum(-1) < 0.999).any()  # of the whole vocabulary
    assert not torch.equal(seen[0].candidates.probabilities, seen[1].candidates.probabilities)  # type: ignore[union-attr]


@torch.inference_mode()
def test_the_next_step_reads_the_beliefs_of_a_step_faded_by_a_tenth() -> None:
    family, model = belief(PLAIN), both_ways("aggregate")
    _, seen = watched(family, model, [[20, 21]], replace(GREEDY, max_new_tokens=5))
    prompt = Candidates.known(torch.tensor([[20, 21]]), 4)
    for before, after in itertools.pairwise(seen):
        assert before.candidates is not None and after.candidates is not None
        shown = torch.tensor([before.tokens[0]])
        faded = Candidates(before.candidates.tokens, 0.9 * before.candidates.probabilities)
        row = faded.where(shown == MASK, Candidates.known(shown, 4))
        row = Candidates(*(torch.cat(pair, dim=1) for pair in zip(prompt, row)))
        logits = model.logits(model(row).hidden)[0, 2:]
        logits[:, [0, 1, 3]] = -torch.inf
        hidden = shown[0] == MASK
        best = logits[hidden].softmax(-1).topk(4)
        torch.testing.assert_close(after.candidates.probabilities[0][hidden], best.values, atol=1e-5, rtol=1e-4)


def test_repetition_is_penalised_by_what_stands_in_the_row() -> None:
    family, model = diffusion(PLAIN), both_ways()
    plain = family.generate(model, [[20]], GREEDY)[0]
    penalised = family.generate(model, [[20]], replace(GREEDY, repetition_penalty=50.0))[0]
    assert len(set(plain)) < len(plain)
    assert len(set(penalised)) > len(set(plain))


def test_nothing_to_write_and_impossible_prompts() -> None:
    for family in (diffusion(), belief()):
        model = model_for(family)
        assert family.generate(model, [], GREEDY) == []
        assert family.generate(model, PROMPTS, replace(GREEDY, max_new_tokens=0)) == [[] for _ in PROMPTS]
        with pytest.raises(ValueError, match="56 prompt tokens and 12 new ones exceed the 64 positions"):
            family.generate(model, [[5] * 56], GREEDY)
        assert IDS.ignore not in family.generate(model, [[5] * 52], GREEDY)[0]  # exactly full


def test_sdd_reveals_nothing_from_total_uncertainty(monkeypatch: pytest.MonkeyPatch) -> None:
    family = belief(PLAIN)
    seen: list[torch.Tensor] = []
    reveal = Writer._reveal

    def spied(self: Writer, block: Block, states: torch.Tensor, stay_hidden: int) -> None:
        assert block.beliefs is not None
        seen.append(block.beliefs.probabilities[block.hidden].clone())
        reveal(self, block, states, stay_hidden)

    monkeypatch.setattr(Writer, "_reveal", spied)
    family.generate(model_for(family), PROMPTS[:1], replace(GREEDY, steps=2))
    assert len(seen) == 2
    assert all(float((each == 1 / family.ids.vocabulary).float().mean()) == 0.0 for each in seen)
