"""Every family learns: a handful of sentences by heart, and how a Markov chain goes on."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from denoisers import CPU, END, IGNORE, START

from minillm.data.batches import Batch
from minillm.families import FAMILIES
from minillm.families.autoregressive import Autoregressive
from minillm.families.base import Family, Sampling, SpecialIds
from minillm.families.diffusion import Diffusion
from minillm.families.sdd import SparseDistributionDiffusion
from minillm.families.settings import FamilyConfig
from minillm.methods.likelihood import Likelihood
from minillm.models.config import ModelConfig
from minillm.models.transformer import LanguageModel
from minillm.train.optim import OptimSettings, build_optimizers, clip_gradients, learning_rate

SENTENCES = [
    "the old bridge waits for rain that never comes",
    "a small boat drifts past the silent harbour at dawn",
    "my neighbour plants seven pears along the garden wall",
    "nobody hears the clock behind the kitchen door",
    "two foxes share one apple under the yellow moon and sleep",
]
WORDS = sorted({word for sentence in SENTENCES for word in sentence.split()})
TEXTS = [[5 + WORDS.index(word) for word in sentence.split()] for sentence in SENTENCES]
IDS = SpecialIds(5 + len(WORDS), 1, IGNORE, (0, 1, START))
LENGTH = 16


def make(config: FamilyConfig, ids: SpecialIds) -> Family:
    kinds = {"ar": Autoregressive, "diffusion": Diffusion, "sdd": SparseDistributionDiffusion}
    return kinds[config.architecture](config, ids)


def new_model(family: Family, vocabulary: int, width: int) -> LanguageModel:
    model = LanguageModel(
        ModelConfig(
            vocabulary, hidden_size=width, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=width // 4, intermediate_size=2 * width, max_position_embeddings=64, causal=family.causal,
            denoiser=family.denoiser,
        )
    )  # fmt: skip
    model.init_weights(4)
    return model


def train(family: Family, model: LanguageModel, rows: int, steps: int, peak: float, batch: object) -> None:
    """`steps` steps of `rows` rows each; batch(first slot) gives them."""
    method = Likelihood(family, seed=0)
    settings = OptimSettings(optimizer="adamw", learning_rate=peak, weight_decay=0.0)
    optimizers = build_optimizers(model.train(), settings)
    for step in range(steps):
        optimizers.set_lr(learning_rate(step, total=steps, warmup=20, peak=peak, final_ratio=0.02))
        prepared = method.prepare(model, batch(step * rows), CPU, step, step * rows)  # type: ignore[operator]
        (method.loss(model, prepared.data).loss / prepared.count).backward()
        clip_gradients(model.parameters(), 1.0)
        for optimizer in optimizers.optimizers:
            optimizer.step()
        optimizers.zero_grad()
    model.eval()


def sentences_at(first: int) -> Batch:
    """40 rows: each sentence after a first token that is always visible (nothing else would tell a model with
    relative positions where a hidden row begins), with its end and ignore tokens behind it; every other one is cut
    somewhere, as a canvas may end anywhere."""
    tokens, mask = np.zeros((40, LENGTH), dtype=np.int64), np.zeros((40, LENGTH), dtype=bool)
    segments = np.full((40, LENGTH), -1, dtype=np.int32)
    for row in range(40):
        text = [START, *TEXTS[row % 5], END]
        cut = LENGTH if (row + first // 40) % 2 else 4 + (row + 5 * (first // 40) + row // 5) % (LENGTH - 3)
        tokens[row] = (text + [IGNORE] * LENGTH)[:LENGTH]
        mask[row, 1 : min(len(text), cut)] = True
        segments[row, :cut] = 0
        tokens[row, cut:] = 0
    return Batch(tokens, mask, None, segments, np.arange(first, first + 40))


CONFIGS = {
    "ar": FamilyConfig("ar"),
    "diffusion": FamilyConfig("diffusion"),
    "diffusion-cosine": FamilyConfig("diffusion", noise_schedule="cosine"),
    "diffusion-blocks": FamilyConfig("diffusion", diffusion_block=4),
    "sdd": FamilyConfig("sdd", k_schedule=(1, 2, 4), k_warmup_steps=100),
    "sdd-bilateral": FamilyConfig("sdd", k_schedule=(3,), denoiser="bilateral"),
}
STEPS = {"ar": 200, "diffusion": 300, "diffusion-cosine": 300, "diffusion-blocks": 240}  # the others: 400


@lru_cache
def taught(name: str) -> tuple[Family, LanguageModel]:
    family = make(CONFIGS[name], IDS)
    model = new_model(family, IDS.vocabulary, 48)
    train(family, model, 40, STEPS.get(name, 400), 5e-3, sentences_at)
    return family, model


def test_all_families_are_taught() -> None:
    assert {config.architecture for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_sentences_are_learned_by_heart(name: str) -> None:
    family, model = taught(name)
    sampling = Sampling(max_new_tokens=LENGTH - 3, temperature=0.0, stop_ids=(END,))
    prompts = [[START, *text[:2]] for text in TEXTS]
    wanted = [text[2:] for text in TEXTS]
    assert family.generate(model, prompts, sampling) == wanted
    if not family.causal:
        assert family.generate(model, prompts, replace(sampling, order="random", seed=3)) == wanted
        if family.denoiser or name != "diffusion-blocks":
            assert family.generate(model, prompts, replace(sampling, threshold=0.9)) == wanted
            by_twos = family.generate(model, prompts, replace(sampling, block_length=2))
            # Of SDD's 80 trainings (initial weights, processors' rounding) 3 missed one sentence, none two.
            assert sum(found == text for found, text in zip(by_twos, wanted)) >= 4
    # From nothing: sentences as they were taught, and, where tokens come in any order, several of them.
    whole = replace(sampling, max_new_tokens=LENGTH - 1, temperature=0.8, order="random")
    written = [tuple(row) for row in family.generate(model, [[START]] * 60, whole)]
    known = {tuple(text) for text in TEXTS}
    # in the same 80 trainings the least was 30
    assert sum(row in known for row in written) >= 24 and len(known & set(written)) >= 3


# A Markov chain over 64 symbols, whose truth is known.

SYMBOLS = 64
CHAIN = SpecialIds(3 + SYMBOLS, 0, 1, (0, 1, 2))


@lru_cache
def transitions() -> np.ndarray:
    """Probabilities [from, to] of the next symbol: about 2.5 nats of uncertainty."""
    values = np.exp(2.2 * np.random.default_rng(5).standard_normal((SYMBOLS, SYMBOLS)))
    return values / values.sum(1, keepdims=True)


def walks(seed: int, rows: int) -> tuple[Batch, float]:
    """Rows of 32 symbols behind a first token, and the true -log p of a symbol, in nats."""
    rng, chain = np.random.default_rng(seed), transitions()
    symbols = np.empty((rows, 32), dtype=np.int64)
    symbols[:, 0] = rng.integers(SYMBOLS, size=rows)
    for place in range(1, 32):
        drawn = rng.random((rows, 1))
        symbols[:, place] = (chain[symbols[:, place - 1]].cumsum(1) < drawn).sum(1).clip(max=SYMBOLS - 1)
    cost = rows * np.log(SYMBOLS) - np.log(chain[symbols[:, :-1], symbols[:, 1:]]).sum()
    tokens = np.concatenate((np.full((rows, 1), 2), symbols + 3), axis=1)
    mask = np.ones_like(tokens, dtype=bool)
    mask[:, 0] = False
    return Batch(tokens, mask, None, None, seed * 10_000 + np.arange(rows)), float(cost / symbols.size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "steps", "margin"),
    [
        (FamilyConfig("ar"), 800, 0.01),
        (FamilyConfig("diffusion"), 3000, 0.1),
        (FamilyConfig("sdd", k_schedule=(4,)), 3000, 0.1),
    ],
    ids=["ar", "diffusion", "sdd"],
)
def test_a_markov_chain_is_learned_and_bounds_are_never_below_the_truth(
    config: FamilyConfig, steps: int, margin: float
) -> None:
    family = make(config, CHAIN)
    model = new_model(family, CHAIN.vocabulary, 64)
    train(family, model, 64, steps, 4e-3, lambda first: walks(1 + first // 64, 64)[0])
    # Against the truth of the same symbols, in 32 batches whose scatter is the error.
    gaps, truths = [], []
    for index in range(32):
        batch, truth = walks(10**6 + index, 64)
        prepared = Likelihood(family, 0).prepare(model, batch, CPU, -1, 64 * index)
        value, count = Likelihood(family, 0).loss(model, prepared.data).metrics["loss"]
        gaps.append(float(value.detach()) / count - truth)
        truths.append(truth)
    truth, gap, error = np.mean(truths), np.mean(gaps), np.std(gaps) / 32**0.5
    print(f"{family.name}: {truth:.3f} true, {gap:+.3f} +- {error:.3f}")
    assert 2 < truth < 3 and error < 0.03 * truth
    assert gap > -3 * error
    assert gap < margin * truth
