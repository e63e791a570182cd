"""Every family learns: a handful of sentences by heart, and how a Markov chain goes on."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
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
    model.init_weights(1)
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


def sentences_at(first: int, causal: bool) -> Batch:
    """40 rows: each sentence with its end and ignore tokens behind it, cut where a canvas may end."""
    texts = [[START, *text] if causal else text for text in TEXTS]
    tokens, mask = np.zeros((40, LENGTH), dtype=np.int64), np.zeros((40, LENGTH), dtype=bool)
    segments = np.full((40, LENGTH), -1, dtype=np.int32)
    for row in range(40):
        text = [*texts[row % 5], END]
        cut = (LENGTH, LENGTH, 12, 8, 4)[(row + first // 40) % 5 - row // 5 % 5]
        tokens[row] = (text + [IGNORE] * LENGTH)[:LENGTH]
        mask[row, : min(len(text), cut)] = True
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


@lru_cache
def taught(name: str) -> tuple[Family, LanguageModel]:
    family = make(CONFIGS[name], IDS)
    model = new_model(family, IDS.vocabulary, 48)
    train(family, model, 40, 300, 5e-3, lambda first: sentences_at(first, family.causal))
    return family, model


def test_all_families_are_taught() -> None:
    assert {config.architecture for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_sentences_are_learned_by_heart(name: str) -> None:
    family, model = taught(name)
    start = [START] if family.causal else []
    sampling = Sampling(max_new_tokens=LENGTH - 2 - len(start), temperature=0.0, stop_ids=(END,))
    prompts = [start + text[:2] for text in TEXTS]
    wanted = [text[2:] for text in TEXTS]
    assert family.generate(model, prompts, sampling) == wanted
    if not family.causal:
        assert family.generate(model, prompts, replace(sampling, order="random", seed=3)) == wanted
        if family.denoiser or name != "diffusion-blocks":
            assert family.generate(model, prompts, replace(sampling, block_length=2)) == wanted
            assert family.generate(model, prompts, replace(sampling, threshold=0.9)) == wanted
    # From nothing: sentences as they were taught, and not always the same.
    whole = replace(sampling, max_new_tokens=LENGTH - len(start), temperature=0.8)
    written = [tuple(row) for row in family.generate(model, [start] * 20, whole)]
    known = {tuple(text) for text in TEXTS}
    right = sum(row in known for row in written)
    assert right >= 18 and len(known & set(written)) >= 3
