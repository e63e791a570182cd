"""`minillm ppo`, `grpo` and `spo` as runs: resumed bit for bit in the middle of a rollout, logged, guarded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from training import equal, load, without_times

from minillm.checkpoint.loader import infer_model_config
from minillm.cli import main
from minillm.data.mixture import Mixture
from minillm.methods.policy import PolicyMethod
from minillm.train.experience import Experience

TINY = ("--hidden_size", "32", "--num_hidden_layers", "2", "--max_seq_len", "64", "--dtype", "float32", "--no_wandb",
        "--device", "cpu", "--eval_samples", "4", "--log_every", "1", "--max_completion_length", "6", "--learning_rate",
        "1e-3", "--reward", "number", "length:0-4=0.5", "--warmup_steps", "0")  # fmt: skip
# A rollout makes four steps: two of its own answers each, gone over twice.
ROLLOUT = ("--steps_per_generation", "2", "--num_iterations", "2")
ROWS = {
    "grpo": ("--batch_size", "2", "--num_generations", "2"),
    "ppo": ("--batch_size", "4"),
    "spo": ("--batch_size", "4"),
}
FOLDERS = {"grpo": "grpo_32", "ppo": "ppo_actor_32", "spo": "spo_32"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    for name, numbers in (("train", range(12)), ("val", range(12, 16))):
        rows = [{"prompt": f"{n} + {n}?", "answer": str(2 * n)} for n in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def learn(command: str, prompts: Path, out: Path, *flags: str) -> int:
    return main(
        [command, "--data_path", str(prompts / "train.jsonl"), "--validation_data", str(prompts / "val.jsonl"),
         "--out_dir", str(out), *TINY, *ROWS[command], *flags]
    )  # fmt: skip


CELLS = [("grpo", "ar"), ("ppo", "ar"), ("spo", "ar"), ("grpo", "diffusion"), ("ppo", "sdd"), ("spo", "diffusion")]


@pytest.mark.parametrize(("command", "architecture"), CELLS)
def test_a_run_resumed_in_the_middle_of_a_rollout_is_the_same_run(
    command: str, architecture: str, prompts: Path, tmp_path: Path
) -> None:
    flags = (*ROLLOUT, "--architecture", architecture, "--max_steps", "6", "--save_every", "3", "--eval_every", "3",
             "--beta", "0.1", "--log_completions", "4")  # fmt: skip
    assert learn(command, prompts, tmp_path / "one", *flags) == 0
    name = ("" if architecture == "ar" else f"{architecture}_") + FOLDERS[command]
    folder, again = (tmp_path / part / name for part in ("one", "two"))
    shutil.copytree(folder, again)
    for file in ("last.pt", "best_model.pt", "step_000006.pt"):
        if load(again / file)["global_step"] == 6:
            (again / file).unlink()
    assert learn(command, prompts, tmp_path / "two", *flags, "--resume_from", "auto") == 0
    one, two = (without_times(load(path / "last.pt")) for path in (folder, again))
    for key in ("model_state_dict", "optimizer_state_dict", "training_log", "validation_log", "rng_state", "data_state",
                "method_state"):  # fmt: skip
        assert equal(one[key], two[key]), key
    assert one["data_state"]["stream"]["number"] == 1 and one["global_step"] == 6
    assert (folder / "samples.jsonl").read_text() == (again / "samples.jsonl").read_text()
    for flat in (tmp_path / "one").glob("*.pth"):
        assert equal(load(flat), load(tmp_path / "two" / flat.name)), flat.name


def test_a_rollout_is_gone_over_in_another_order_and_every_answer_once_a_pass(prompts: Path, tmp_path: Path) -> None:
    taken: list[list[int]] = []
    original = Experience.take

    def watched(self: Experience, slot: int, count: int) -> Any:
        batch = original(self, slot, count)
        taken.append(batch.ids.tolist())
        return batch

    Experience.take = watched  # type: ignore[method-assign]
    try:
        assert learn("grpo", prompts, tmp_path, *ROLLOUT, "--max_steps", "4", "--micro_batch_size", "2") == 0
    finally:
        Experience.take = original  # type: ignore[method-assign]
    first, second = ([row for part in taken[start : start + 4] for row in part] for start in (0, 4))
    assert sorted(first) == sorted(second) == [0, 0, 1, 1, 2, 2, 3, 3] and first != second


def test_what_an_rl_run_logs_and_leaves_behind(prompts: Path, tmp_path: Path) -> None:
    flags = ("--max_steps", "2", "--eval_every", "1", "--beta", "0.1", "--log_completions", "1")
    assert learn("ppo", prompts, tmp_path, *flags) == 0
    folder = tmp_path / "ppo_actor_32"
    content = load(folder / "last.pt")
    row = content["training_log"][-1]
    for name in ("reward", "reward_std", "kl", "entropy", "completion_length", "clip_ratio", "value_loss", "approx_kl"):
        assert f"train/{name}" in row, name
    assert "rewards/number" in row and "rewards/length" in row
    assert {"val/reward", "val/rewards_number", "val/completion_length"} <= content["validation_log"][-1].keys()
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {1, 2}
    assert {"prompt", "completion", "answer", "reward", "number", "length", "advantage"} <= samples[0].keys()
    assert "? " not in samples[0]["answer"] and samples[0]["prompt"].endswith(samples[0]["prompt"][-5:])
    critic = load(tmp_path / "ppo_critic_32.pth")
    assert infer_model_config(critic).value_head and "score.weight" not in load(tmp_path / "ppo_actor_32.pth")
    assert float(critic["score.weight"].abs().max()) > 0  # it began at zero
    assert content["best_loss"] is None and content["progress"]["best_metric"] == "reward"


def test_a_critic_can_begin_with_one_that_is_there(prompts: Path, tmp_path: Path) -> None:
    assert learn("ppo", prompts, tmp_path / "a", "--max_steps", "1") == 0
    critic = tmp_path / "a" / "ppo_critic_32.pth"
    more = ("--max_steps", "1", "--critic_path", str(critic), "--critic_learning_rate", "1e-12", "--weight_decay", "0")
    assert learn("ppo", prompts, tmp_path / "b", *more) == 0
    one, two = load(critic), load(tmp_path / "b" / "ppo_critic_32.pth")
    for key in one:
        assert float((one[key] - two[key]).abs().max()) < 1e-6, key
    assert not equal(load(tmp_path / "b" / "ppo_actor_32.pth"), load(tmp_path / "a" / "ppo_actor_32.pth"))


def test_the_best_checkpoint_has_the_highest_validation_reward(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    values = iter([0.0, 0.2, 0.9, 0.5])
    monkeypatch.setattr(PolicyMethod, "measure", lambda *_: {"reward": (torch.tensor(next(values)), 1.0)})
    assert learn("grpo", prompts, tmp_path, "--max_steps", "3", "--eval_every", "1") == 0
    progress = load(tmp_path / "grpo_32" / "last.pt")["progress"]
    assert (progress["best_step"], progress["best_value"]) == (2, pytest.approx(0.9))
    assert "reward" in (tmp_path / "grpo_32" / "README.md").read_text()


def test_a_policy_gone_astray_stops_and_names_the_best_checkpoint(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PolicyMethod, "alarm", lambda self, means: "it is lost" if self.alarms.pop() else "")
    monkeypatch.setattr(PolicyMethod, "alarms", [True, False, False], raising=False)
    assert learn("grpo", prompts, tmp_path, "--max_steps", "9", "--eval_every", "1") == 1
    told = capsys.readouterr().err
    assert "stopped at step 3: it is lost" in told and "best_model.pt" in told


def test_an_answer_without_room_for_a_prompt_is_refused(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert learn("grpo", prompts, tmp_path, "--max_steps", "1", "--max_completion_length", "64") == 1
    assert "leaves no room for prompts" in capsys.readouterr().err


def test_an_epoch_goes_over_every_prompt_once(prompts: Path, tmp_path: Path) -> None:
    asked: list[int] = []
    original = Mixture.take

    def watched(self: Mixture, slot: int, count: int) -> Any:
        batch = original(self, slot, count)
        if self.epoch_rows == 12:
            asked.extend(batch.sample_ids.tolist())
        return batch

    Mixture.take = watched  # type: ignore[method-assign]
    try:
        assert learn("grpo", prompts, tmp_path, "--epochs", "1", "--batch_size", "4") == 0
    finally:
        Mixture.take = original  # type: ignore[method-assign]
    assert sorted(asked) == list(range(12))
    assert load(tmp_path / "grpo_32" / "last.pt")["epoch"] == pytest.approx(1.0)


def test_experts_and_adapters_learn_from_rewards_too(prompts: Path, tmp_path: Path) -> None:
    moe = ("--use_moe", "--num_experts", "2", "--max_steps", "1", "--beta", "0.1")
    assert learn("grpo", prompts, tmp_path, *moe) == 0
    start = tmp_path / "grpo_32_moe.pth"
    adapter = ("--pretrained_path", str(start), "--lora_rank", "2", "--use_moe", "--max_steps", "2", "--beta", "0.1")
    assert learn("ppo", prompts, tmp_path, *adapter) == 0
    folder = tmp_path / "ppo_actor_32_moe"
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "reference.pth").exists()
    assert not equal(load(tmp_path / "ppo_actor_32_moe.pth"), load(start))
    assert "train/kl" in load(folder / "last.pt")["training_log"][-1]
