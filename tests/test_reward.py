"""Value heads and reward models: where the value is read, that nothing else is seen, and what a checkpoint gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from denoisers import CPU
from tiny import DENSE, MOE, random_model, tiny_config
from training import TINY, equal, load

from minillm.checkpoint.loader import infer_model_config
from minillm.checkpoint.model import open_checkpoint
from minillm.checkpoint.reward import open_reward_model
from minillm.cli import main
from minillm.data.batches import Batch, PairBatch, open_dataset
from minillm.families.settings import ARCHITECTURES
from minillm.log import UserError
from minillm.methods.preference_losses import bradley_terry_loss
from minillm.methods.reward import RewardModelling
from minillm.models.config import ModelConfig
from minillm.models.transformer import LanguageModel
from minillm.models.value import ValueHead, add_value_head, read
from minillm.text.tokenizer import Tokenizer

BACKBONES = {
    "ar": DENSE, "ar-moe": MOE, "both-ways": tiny_config(causal=False),
    "aggregate": tiny_config(causal=False, denoiser="aggregate"),
    "bilateral": tiny_config(causal=False, denoiser="bilateral"),
}  # fmt: skip


def judge(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A random model with a random value head."""
    model = add_value_head(random_model(config, seed))
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(seed))
    return model


def test_a_head_begins_with_zeros_and_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    head = ValueHead(16)
    assert torch.equal(before, torch.get_rng_state()) and head.weight.shape == (1, 16)
    assert not head(torch.randn(2, 3, 16)).any()


def test_values_are_products_at_every_position_or_at_the_last_one_of_a_mask() -> None:
    head, hidden = ValueHead(4), torch.randn(3, 5, 4)
    torch.nn.init.normal_(head.weight)
    products = (hidden * head.weight[0]).sum(-1)
    assert torch.allclose(head(hidden), products, atol=1e-6)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    assert torch.allclose(head.of_sequence(hidden, mask), products[[0, 1, 2], [2, 4, 0]], atol=1e-6)


def test_values_are_float32_where_the_backbone_computes_in_less() -> None:
    head, hidden = ValueHead(64), torch.randn(2, 3, 64)
    torch.nn.init.normal_(head.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(hidden), head(hidden.float())) and head(hidden).dtype == torch.float32


def test_a_checkpoint_says_that_there_is_a_head(tmp_path: Path) -> None:
    model = judge(tiny_config(vocab_size=6400, num_hidden_layers=1))
    assert "score.weight" in model.state_dict() and add_value_head(model) is model
    assert infer_model_config(model.state_dict()).value_head
    assert not infer_model_config(random_model(DENSE).state_dict()).value_head
    path = tmp_path / "reward_16.pt"
    torch.save({"model_state_dict": model.state_dict(), "model_config": model.config.to_dict()}, path)
    assert torch.equal(open_checkpoint(str(path)).model.score.weight, model.score.weight)


def side(seed: int, lengths: tuple[int, ...], width: int = 12) -> Batch:
    """Prompts of three tokens, answers up to `lengths`, a line break behind each, then padding."""
    random = np.random.default_rng(seed)
    tokens, mask = np.zeros((len(lengths), width), np.int64), np.zeros((len(lengths), width), bool)
    for row, length in enumerate(lengths):
        tokens[row, : length + 1] = random.integers(5, 50, length + 1)
        mask[row, 3:length] = True
    return Batch(tokens, mask, None, np.where(tokens > 0, 0, -1).astype(np.int32), np.arange(len(lengths)))


@pytest.mark.parametrize("name", BACKBONES)
def test_an_answer_is_judged_at_its_last_token_and_by_nothing_behind_it(name: str) -> None:
    model = judge(BACKBONES[name])
    pairs = PairBatch(side(1, (6, 9)), side(2, (8, 5)))
    method = RewardModelling(center=0.01)
    prepared = method.prepare(model, pairs, CPU, 0, 0)
    loss, metrics = method.loss(model, prepared.data)
    values = []
    for batch in (pairs.chosen, pairs.rejected):
        for row in range(2):
            length = int(batch.loss_mask[row].nonzero()[0].max()) + 1
            alone = torch.from_numpy(batch.tokens[row : row + 1, :length])
            values.append(model.score(read(model, alone).hidden)[0, -1])
    chosen, rejected = torch.stack(values).chunk(2)
    assert prepared.count == 2
    assert loss.item() == pytest.approx(bradley_terry_loss(chosen, rejected, 0.01).sum().item(), rel=1e-4)
    assert metrics["rewards/chosen"][0].item() == pytest.approx(chosen.sum().item(), rel=1e-4)
    assert metrics["rewards/accuracies"][0].item() == float((chosen > rejected).sum())


def test_head_and_backbone_learn_and_experts_are_balanced() -> None:
    model = judge(MOE).train()
    loss, metrics = RewardModelling(center=0.0).loss(
        model, RewardModelling(center=0.0).prepare(model, PairBatch(side(1, (6, 9)), side(2, (8, 5))), CPU, 0, 0).data
    )
    loss.backward()
    assert loss > metrics["loss"][0]  # the router's part is trained, not reported
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients["score.weight"] is not None and gradients["model.layers.0.mlp.gate.weight"] is not None


def train(demo_data: Path, out: Path, *flags: str) -> Path:
    code = main(
        ["reward", "--data_path", str(demo_data / "dpo.jsonl"), "--validation_data", str(demo_data / "dpo_val.jsonl"),
         "--out_dir", str(out), *TINY, "--num_hidden_layers", "1", "--max_steps", "4", "--save_every", "2",
         "--eval_every", "2", "--learning_rate", "1e-3", *flags]
    )  # fmt: skip
    assert code == 0
    return next(path for path in out.iterdir() if path.is_dir() and "reward" in path.name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_reward_model_trains_resumes_and_judges(architecture: str, demo_data: Path, tmp_path: Path) -> None:
    flags = ("--architecture", architecture, *(("--use_moe", "--num_experts", "2") if architecture == "sdd" else ()))
    folder = train(demo_data, tmp_path / "one", *flags)
    again = tmp_path / "two" / folder.name
    shutil.copytree(folder, again)
    for name in ("last.pt", "best_model.pt", "step_000004.pt"):
        (again / name).unlink(missing_ok=True)
    train(demo_data, tmp_path / "two", *flags, "--resume_from", "auto")
    one, two = load(folder / "last.pt"), load(again / "last.pt")
    for key in ("model_state_dict", "optimizer_state_dict", "rng_state"):
        assert equal(one[key], two[key]), key
    assert one["model_config"]["value_head"] and one["model_state_dict"]["score.weight"].any()

    # What it says of the held-out pairs is what training measured.
    tokenizer = Tokenizer.load()
    pairs = open_dataset(
        "reward", demo_data / "dpo_val.jsonl", tokenizer, max_seq_len=128, hide_padding=architecture != "ar"
    ).rows(np.arange(4))
    assert isinstance(pairs, PairBatch)
    reward = open_reward_model(str(folder / "last.pt"))
    method = RewardModelling(center=0.01)
    metrics = method.loss(reward.model, method.prepare(reward.model, pairs, CPU, -1, 0).data).metrics
    found = {}
    for name, batch in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
        prompts, completions = [], []
        for tokens, mask in zip(batch.tokens, batch.loss_mask, strict=True):
            first, last = mask.nonzero()[0][[0, -1]]
            prompts.append(tokens[:first].tolist())
            completions.append(tokens[first : last + 1].tolist())
        assert completions[0][-1] == tokenizer.end_of_turn_id
        found[name] = reward(prompts, completions)
        without_end = reward(prompts, [each[:-1] for each in completions])
        assert torch.equal(without_end, found[name])
        order = [2, 0, 3, 1]
        shuffled = reward([prompts[row] for row in order], [completions[row] for row in order])
        assert torch.allclose(shuffled, found[name][order], atol=1e-5)
        assert metrics[f"rewards/{name}"][0].item() == pytest.approx(found[name].sum().item(), abs=1e-4)
    assert found["chosen"].dtype == torch.float32 and found["chosen"].shape == (4,)
    flat = open_reward_model(str(tmp_path / "one" / f"{folder.name}.pth"))
    assert flat.model.config.value_head


def test_a_model_without_a_head_judges_nothing(tmp_path: Path) -> None:
    model = random_model(tiny_config(vocab_size=6400, num_hidden_layers=1))
    path = tmp_path / "a.pt"
    torch.save({"model_state_dict": model.state_dict(), "model_config": model.config.to_dict()}, path)
    with pytest.raises(UserError, match="no value head. Train one with `minillm reward`"):
        open_reward_model(str(path))


def test_an_exported_reward_model_says_the_same_in_transformers(tmp_path: Path) -> None:
    model = judge(tiny_config(vocab_size=6400, num_hidden_layers=1))
    path, output = tmp_path / "a.pt", tmp_path / "hf"
    torch.save(
        {"model_state_dict": model.state_dict(), "model_config": model.config.to_dict(), "architecture": "ar"}, path
    )
    assert main(["export", "--checkpoint", str(path), "--output", str(output)]) == 0
    assert json.loads((output / "config.json").read_text())["architectures"] == ["Qwen3ForSequenceClassification"]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(output)
    prompt, completion = [20, 21, 22], [30, 31, 32, open_reward_model(str(path)).end]
    with torch.inference_mode():
        wanted = theirs(torch.tensor([prompt + completion])).logits.item()
    assert open_reward_model(str(path))([prompt], [completion]).item() == pytest.approx(wanted, rel=1e-4)
