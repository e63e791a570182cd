"""An exported model is the same model in transformers: logits, gradients, tokens, router loss."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import random_model, tiny_config

from minillm.checkpoint.model import open_checkpoint
from minillm.cli import main
from minillm.models.config import ModelConfig
from minillm.models.experts import load_balancing_loss
from minillm.models.heads import weighted_cross_entropy
from minillm.models.transformer import LanguageModel
from minillm.text.chat import encode_chat
from minillm.text.tokenizer import Tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

DENSE = tiny_config(vocab_size=6400, hidden_size=32, head_dim=8, intermediate_size=48)
MOE = replace(DENSE, use_moe=True, moe_intermediate_size=24)
KINDS = {
    "dense-tied": DENSE,
    "dense-untied": replace(DENSE, tie_word_embeddings=False),
    "moe-tied": MOE,
    "moe-untied": replace(MOE, tie_word_embeddings=False),
    "other-rope": replace(DENSE, rope_theta=500.0, rms_norm_eps=1e-3),
}


def save_checkpoint(config: ModelConfig, path: Path) -> None:
    """A full checkpoint with weights big enough for attention and routing to matter."""
    model = random_model(config, seed=1, scale=0.15)
    torch.save({"model_state_dict": model.state_dict(), "model_config": config.to_dict(), "stage": "pretrain"}, path)


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Any]:
    """Our model, and transformers' from the exported folder."""
    folder = tmp_path_factory.mktemp(request.param)
    save_checkpoint(KINDS[request.param], folder / "model.pt")
    assert main(["export", "--checkpoint", str(folder / "model.pt"), "--output", str(folder / "hf")]) == 0
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ours = open_checkpoint(str(folder / "model.pt")).model.requires_grad_()  # what is opened is frozen
    return ours, theirs.eval()


def test_logits_agree(exported: tuple[LanguageModel, Any]) -> None:
    ours, theirs = exported
    tokens = torch.randint(6400, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, reference = ours.logits(ours(tokens).hidden), theirs(tokens).logits
    assert reference.std() > 0.1
    torch.testing.assert_close(mine, reference, atol=1e-5, rtol=0)


def test_gradients_agree(exported: tuple[LanguageModel, Any]) -> None:
    ours, theirs = exported
    tokens = torch.randint(6400, (2, 12), generator=torch.Generator().manual_seed(2))
    ours.zero_grad()
    theirs.zero_grad()
    hidden = ours(tokens).hidden
    weights = torch.ones(2, 12) / 24
    mine = weighted_cross_entropy(hidden, ours.head_weight, tokens.roll(-1, 1), weights).loss
    reference = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
    mine.backward()
    reference.backward()
    assert mine.item() == pytest.approx(reference.item(), abs=1e-5)
    our_grads = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        if ".experts.gate_up_proj" in name or ".experts.down_proj" in name:  # transformers stacks its experts
            stem, part = name.rsplit(".", 1)
            kinds = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            grad = torch.stack(
                [torch.cat([our_grads.pop(f"{stem}.{e}.{kind}.weight") for kind in kinds]) for e in range(4)]
            )
        else:
            grad = our_grads.pop(name)
        torch.testing.assert_close(grad, parameter.grad, atol=1e-4, rtol=1e-4, msg=name)
    assert not our_grads


@pytest.mark.parametrize("padded", [False, True])
def test_the_load_balancing_loss_is_theirs(padded: bool) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    generator = torch.Generator().manual_seed(3)
    logits = tuple(torch.randn(2 * 9, 5, generator=generator) * 3 for _ in range(3))
    valid = torch.rand(2, 9, generator=generator) < 0.6 if padded else None
    mine = load_balancing_loss(logits, 2, None if valid is None else valid.flatten())
    theirs = load_balancing_loss_func(logits, 5, 2, None if valid is None else valid.long())
    torch.testing.assert_close(mine, theirs)


def test_the_models_own_router_loss_is_theirs() -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    ours = LanguageModel(
        ModelConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            use_moe=True,
            num_experts=4,
            moe_intermediate_size=8,
            max_position_embeddings=32,
        )
    ).train()
    ours.init_weights(0)
    theirs = transformers.Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        ours_gates = [layer.mlp.gate.weight.normal_() for layer in ours.model.layers]
        theirs.model.embed_tokens.weight.copy_(ours.model.embed_tokens.weight)
        for mine, other in zip(ours.model.layers, theirs.model.layers):
            other.self_attn.load_state_dict(mine.self_attn.state_dict())
            other.mlp.experts.gate_up_proj.copy_(
                torch.stack([torch.cat((e.gate_proj.weight, e.up_proj.weight)) for e in mine.mlp.experts])
            )
            other.mlp.experts.down_proj.copy_(torch.stack([e.down_proj.weight for e in mine.mlp.experts]))
        for gate, other in zip(ours_gates, theirs.model.layers):
            other.mlp.gate.weight.copy_(gate)
        tokens = torch.randint(30, (2, 10))
        mine_loss = ours(tokens).router_loss
        assert mine_loss is not None
        torch.testing.assert_close(mine_loss, theirs(tokens, output_router_logits=True).aux_loss, atol=1e-5, rtol=1e-5)


def test_the_tokenizer_travels_with_its_chat_template(tmp_path: Path) -> None:
    save_checkpoint(DENSE, tmp_path / "model.pt")
    assert main(["export", "--checkpoint", str(tmp_path / "model.pt"), "--output", str(tmp_path / "hf")]) == 0
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer.load()
    messages = [
        {"role": "system", "content": "Be brief. <|im_end|>"},
        {"role": "user", "content": "Hello  there,\nwas ist 2+2? 你好"},
        {"role": "assistant", "content": "<think>2+2</think><answer>4</answer>"},
        {"role": "user", "content": "Thanks"},
    ]
    for prompt in (False, True):
        reference = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert encode_chat(ours, messages, add_generation_prompt=prompt)[0] == list(reference)
    assert theirs.pad_token_id == ours.pad_id and theirs.decode(ours.encode("你好 world")) == "你好 world"


def test_transformers_writes_what_we_write(tmp_path: Path) -> None:
    save_checkpoint(DENSE, tmp_path / "model.pt")
    assert main(["export", "--checkpoint", str(tmp_path / "model.pt"), "--output", str(tmp_path / "hf")]) == 0
    from minillm.families.autoregressive import Autoregressive
    from minillm.families.base import Sampling

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = [5, 700, 4000]
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    ours = Autoregressive().generate(
        open_checkpoint(str(tmp_path / "model.pt")).model, [prompt], Sampling(max_new_tokens=8, temperature=0.0)
    )
    assert out[0, 3:].tolist() == ours[0]


def test_generation_settings_stop_at_both_ends(tmp_path: Path) -> None:
    save_checkpoint(DENSE, tmp_path / "model.pt")
    assert main(["export", "--checkpoint", str(tmp_path / "model.pt"), "--output", str(tmp_path / "hf")]) == 0
    tokenizer = Tokenizer.load()
    settings = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [tokenizer.end_of_turn_id, tokenizer.end_of_text_id]
    assert settings["pad_token_id"] == tokenizer.pad_id
