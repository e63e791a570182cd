"""The fast decoder says what the model says, one token or one block at a time."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any
from weakref import ref

import pytest
import torch
from tiny import BOTH, DENSE, random_model, tiny_config

from minillm.models.cache import KeyValueCache, SlotCache
from minillm.models.candidates import Candidates
from minillm.models.config import ModelConfig
from minillm.models.decoding import PackedDecoder, PlainDecoder, decoder_of
from minillm.models.lora import LoraConfig, add_adapter
from minillm.models.transformer import LanguageModel


def read(model: LanguageModel, tokens: torch.Tensor, padding: torch.Tensor) -> KeyValueCache:
    """The cache after `tokens` [B, L]."""
    cache = KeyValueCache(model.config, batch=len(tokens), capacity=32, padding=padding, dtype=model.head_weight.dtype)
    model(tokens, cache=cache)
    return cache


@BOTH
@torch.inference_mode()
def test_steps_are_those_of_the_model(config: ModelConfig) -> None:
    model = random_model(config)
    decoder = decoder_of(model)
    assert isinstance(decoder, PackedDecoder)
    prompts, padding = torch.randint(5, 50, (3, 6)), torch.tensor([0, 2, 4])
    ours, theirs = (read(model, prompts, padding) for _ in range(2))
    for _ in range(5):
        tokens = torch.randint(5, 50, (3,))
        wanted = model(tokens[:, None], cache=theirs).hidden[:, 0]
        hidden = decoder.step(tokens, ours)
        torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoder.logits(hidden), model.logits(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"causal": False}, {"causal": False, "denoiser": "aggregate"}], ids=str)
@torch.inference_mode()
def test_blocks_are_those_of_the_model(changes: dict[str, Any]) -> None:
    model = random_model(tiny_config(**changes))
    decoder = decoder_of(model)
    assert isinstance(decoder, PackedDecoder)
    tokens, padding = torch.randint(5, 50, (3, 10)), torch.tensor([0, 2, 4])
    ours, theirs = (read(model, tokens[:, :6], padding) for _ in range(2))
    for start, end in ((6, 9), (9, 10)):
        block: torch.Tensor | Candidates = tokens[:, start:end]
        if changes.get("denoiser"):
            block = Candidates.known(tokens[:, start:end], 2)
        wanted = model(block, cache=theirs).hidden
        torch.testing.assert_close(decoder.read(block, ours), wanted, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_rows_of_different_lengths_keep_to_their_own_past() -> None:
    model = random_model(replace(DENSE, tie_word_embeddings=False))
    decoder = decoder_of(model)
    slots = SlotCache(model.config, slots=2, capacity=16, dtype=torch.float32, device=torch.device("cpu"))
    texts = [torch.randint(5, 50, (1, length)) for length in (7, 3)]
    for text in texts:
        slots.add(read(model, text, torch.zeros(1, dtype=torch.int64)), 0, text.shape[1], 1)
    for _ in range(4):
        tokens = torch.randint(5, 50, (2,))
        hidden = decoder.step(tokens, slots)
        slots.advance()
        texts = [torch.cat((text, token.view(1, 1)), 1) for text, token in zip(texts, tokens)]
        wanted = torch.cat([model(text).hidden[:, -1] for text in texts])
        torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_low_precision_products_stay_near_the_model() -> None:
    model = random_model(DENSE)
    cache = read(model, torch.randint(5, 50, (2, 6)), torch.zeros(2, dtype=torch.int64))
    low = KeyValueCache(DENSE, batch=2, capacity=32, padding=cache.padding, dtype=torch.bfloat16)
    for layer, other in zip(low.layers, cache.layers):
        layer.append(other.keys[:, :, :6].bfloat16(), other.values[:, :, :6].bfloat16())
    tokens = torch.tensor([7, 9])
    hidden = decoder_of(model, torch.bfloat16).step(tokens, low)
    wanted = model(tokens[:, None], cache=cache).hidden[:, 0]
    assert hidden.dtype == torch.float32
    error = (hidden - wanted).norm() / wanted.norm()
    assert 0 < error < 0.03


def test_what_it_cannot_stand_for_is_left_to_the_model() -> None:
    adapted = random_model(DENSE)
    add_adapter(adapted, LoraConfig(2, 4.0), seed=0)
    bilateral = random_model(tiny_config(causal=False, denoiser="bilateral"))
    for model in (adapted, bilateral):
        assert isinstance(decoder_of(model), PlainDecoder)


@pytest.mark.parametrize("rows", [1, 6, 7, 12, 16, 17])
@torch.inference_mode()
def test_any_number_of_rows_is_read_alike(rows: int) -> None:
    model = random_model(DENSE)
    decoder = decoder_of(model)
    tokens = torch.randint(5, 50, (rows, 6))
    ours, theirs = (read(model, tokens, torch.zeros(rows, dtype=torch.int64)) for _ in range(2))
    wanted = model(tokens[:, :1], cache=theirs).hidden[:, 0]
    hidden = decoder.step(tokens[:, 0], ours)
    torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decoder.logits(hidden), model.logits(wanted), rtol=1e-5, atol=1e-5)


def test_a_frozen_model_keeps_its_decoder_until_a_weight_changes() -> None:
    model = random_model(DENSE)
    assert decoder_of(model) is not decoder_of(model)  # in training weights change all the time
    model.requires_grad_(False)
    decoder = decoder_of(model)
    assert decoder_of(model) is decoder
    assert decoder_of(model, torch.bfloat16) is not decoder
    decoder = decoder_of(model)
    model.load_state_dict(random_model(DENSE).state_dict())
    changed = decoder_of(model)
    assert changed is not decoder
    tokens = torch.randint(5, 50, (2, 6))
    ours, theirs = (read(model, tokens, torch.zeros(2, dtype=torch.int64)) for _ in range(2))
    wanted = model(tokens[:, :1], cache=theirs).hidden[:, 0]
    torch.testing.assert_close(changed.step(tokens[:, 0], ours), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_kept_goes_with_its_model() -> None:
    model = random_model(DENSE).requires_grad_(False)
    decoder_of(model)
    gone = ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_weights_that_changed_are_those_of_a_new_decoder() -> None:
    model = random_model(DENSE)
    hidden = torch.randn(2, DENSE.hidden_size)
    before = decoder_of(model).logits(hidden)
    with torch.no_grad():
        model.head_weight.add_(1.0)
    after = decoder_of(model).logits(hidden)
    torch.testing.assert_close(after, model.logits(hidden), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after, before + hidden.sum(1, keepdim=True), rtol=1e-5, atol=1e-5)
