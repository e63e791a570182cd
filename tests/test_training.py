"""Training does what it says: it learns, leaves the documented files, stops early, survives bad numbers."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import pytest
import torch
from training import DATA, TINY, load

from minillm.checkpoint.files import read_tensors
from minillm.cli import COMMANDS, main
from minillm.train import loop

KEYS = set(
    """
    format_version architecture stage global_step step epoch model_state_dict model_config config
    optimizer_state_dict scheduler_state_dict scaler_state_dict train_config training_config best_loss best_val_loss
    best_validation_loss training_log validation_log model_info training_stats data_state rng_state method_state
    parent tokenizer
    """.split()  # noqa: SIM905
)


def train(command: str, stage: str, data: Path, out: Path, *flags: str) -> int:
    return main(
        [command, "--data_path", str(data / f"{DATA[stage]}.jsonl"), "--validation_data",
         str(data / f"{DATA[stage]}_val.jsonl"), "--out_dir", str(out), *TINY, *flags]
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three stages after each other, found by convention."""
    out = tmp_path_factory.mktemp("trained")
    wide = ("--hidden_size", "64", "--eval_samples", "40", "--eval_every", "10")
    assert train("pretrain", "pretrain", demo_data, out, *wide, "--max_steps", "60", "--learning_rate", "5e-3") == 0
    assert train("sft", "full_sft", demo_data, out, *wide, "--max_steps", "40", "--learning_rate", "3e-3") == 0
    assert train("dpo", "rlhf", demo_data, out, *wide, "--max_steps", "6") == 0
    return out


def validation(out: Path, folder: str, name: str) -> list[float]:
    rows = list(csv.DictReader((out / folder / "metrics.csv").open()))
    return [float(row[name]) for row in rows if row.get(name)]


def test_each_stage_learns_something_measurable(trained: Path) -> None:
    pretrain = validation(trained, "pretrain_64", "val/loss")
    assert pretrain[0] > 8.5 and pretrain[-1] < 6.5
    tuned = validation(trained, "full_sft_64", "val/loss")
    assert tuned[-1] < tuned[0] - 1.0


def test_a_preference_is_learned_and_holds_for_unseen_pairs(trained: Path, tmp_path: Path) -> None:
    things = ["lantern", "kettle", "ladder", "basket", "button", "candle", "ribbon", "hammer", "bottle", "mirror"]
    colours = ["red", "green", "blue", "brown", "white", "black", "yellow", "grey"]
    pairs = []
    for thing, colour in itertools.product(things, colours):
        prompt = {"role": "user", "content": f"May I have the {colour} {thing}?"}
        answers = {"chosen": f"Of course, take the {colour} {thing}.", "rejected": f"No! Leave the {colour} {thing}."}
        pairs.append({side: [prompt, {"role": "assistant", "content": text}] for side, text in answers.items()})
    (tmp_path / "dpo.jsonl").write_text("\n".join(map(json.dumps, pairs[:-16])))
    (tmp_path / "dpo_val.jsonl").write_text("\n".join(map(json.dumps, pairs[-16:])))
    flags = ("--hidden_size", "64", "--eval_samples", "16", "--eval_every", "15", "--max_steps", "30")
    start = ("--pretrained_path", str(trained / "full_sft_64.pth"), "--learning_rate", "3e-4")
    assert train("dpo", "rlhf", tmp_path, tmp_path / "out", *flags, *start) == 0
    accuracy = validation(tmp_path / "out", "rlhf_64", "val/rewards_accuracies")
    margins = validation(tmp_path / "out", "rlhf_64", "val/rewards_margins")
    assert margins[0] == 0.0 and margins[-1] > 0.2
    assert accuracy[-1] >= 0.9, accuracy


def test_a_stage_starts_where_the_one_before_ended(trained: Path) -> None:
    for folder, before in (("full_sft_64", "pretrain_64.pth"), ("rlhf_64", "full_sft_64.pth")):
        parent = load(trained / folder / "last.pt")["parent"]
        assert parent["path"] == str(trained / before)
    weights = read_tensors(trained / "full_sft_64.pth")
    reference = read_tensors(trained / "rlhf_64" / "reference.pth")
    assert all(torch.equal(weights[key], reference[key]) for key in weights)


def test_a_full_checkpoint_has_every_documented_key_in_both_spellings(trained: Path) -> None:
    for folder in ("pretrain_64", "full_sft_64", "rlhf_64"):
        content = load(trained / folder / "best_model.pt")
        assert set(content) >= KEYS
        assert content["step"] == content["global_step"]
        assert content["config"] == content["model_config"] and content["train_config"] == content["training_config"]
        assert content["best_val_loss"] == content["best_validation_loss"] == content["best_loss"]
        assert all(value.dtype == torch.float32 for value in content["model_state_dict"].values())


def test_the_run_folder_holds_what_is_promised(trained: Path) -> None:
    folder = trained / "pretrain_64"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "best_model.pt", "last.pt", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "training_config.json", "training_log.json", "metrics.csv", "README.md",
    }  # fmt: skip
    log = json.loads((folder / "training_log.json").read_text())
    assert [row["step"] for row in log] == list(range(1, 61))
    wanted = {"step", "loss", "perplexity", "learning_rate", "step_time", "tokens_per_second", "memory_mb"}
    assert all(wanted <= set(row) for row in log)
    assert len(list(folder.glob("step_*.pt"))) == 2, "keep_last"
    flat, best = read_tensors(trained / "pretrain_64.pth"), load(folder / "best_model.pt")["model_state_dict"]
    assert all(torch.equal(flat[key], best[key]) for key in best)


def test_the_resolved_settings_are_themselves_a_recipe(trained: Path) -> None:
    from minillm.cli import _load
    from minillm.config import parse

    saved = json.loads((trained / "pretrain_64" / "training_config.json").read_text())
    classes = [_load(each) for each in COMMANDS["pretrain"].settings]
    recipe = trained / "pretrain_64" / "training_config.json"
    again = parse("minillm pretrain", "", classes, ["--config", str(recipe)])
    assert saved["total_steps"] == 60
    assert again[2].batch_size == 4 and again[0].hidden_size == 64 and again[3].learning_rate == 5e-3


def test_how_a_batch_is_cut_changes_nothing(demo_data: Path, tmp_path: Path) -> None:
    results = []
    for name, flags in {
        "whole": ("--batch_size", "8", "--micro_batch_size", "8"),
        "cut": ("--batch_size", "8", "--micro_batch_size", "3"),
        "accumulated": ("--batch_size", "2", "--accumulation_steps", "4", "--micro_batch_size", "2"),
    }.items():
        out = tmp_path / name
        assert train("sft", "full_sft", demo_data, out, "--max_steps", "3", *flags) == 0
        log = json.loads((out / "full_sft_32" / "training_log.json").read_text())
        results.append([(row["loss"], row["train/grad_norm"]) for row in log])
    for other in results[1:]:
        for one, two in zip(results[0], other):
            assert one == pytest.approx(two, rel=2e-5)


def test_experts_train_through_every_stage(demo_data: Path, tmp_path: Path) -> None:
    moe = ("--use_moe", "--num_experts", "4", "--max_steps", "4")
    assert train("pretrain", "pretrain", demo_data, tmp_path, *moe) == 0
    assert train("sft", "full_sft", demo_data, tmp_path, *moe) == 0
    assert train("dpo", "rlhf", demo_data, tmp_path, *moe) == 0
    assert (tmp_path / "rlhf_32_moe.pth").exists()
    assert "train/router_loss" in (tmp_path / "pretrain_32_moe" / "metrics.csv").read_text().splitlines()[0]


def test_training_stops_early_when_nothing_improves(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([9.0, 5.0, 6.0, 6.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(loop, "evaluate", lambda job: {"val/loss": next(losses)})
    flags = ("--max_steps", "20", "--eval_every", "2", "--early_stopping_patience", "2")
    assert train("pretrain", "pretrain", demo_data, tmp_path, *flags) == 0
    content = load(tmp_path / "pretrain_32" / "last.pt")
    assert content["step"] == 6 and content["best_val_loss"] == 5.0
    assert load(tmp_path / "pretrain_32" / "best_model.pt")["step"] == 2
    assert "stopping early" in capsys.readouterr().err


def test_bad_numbers_are_skipped_and_five_in_a_row_stop_the_run(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minillm.methods.likelihood import Likelihood

    original, calls = Likelihood.loss, []
    bad = {4, *range(9, 30)}  # the first call of all is the evaluation

    def poisoned(self: Likelihood, model: object, data: object) -> object:
        result = original(self, model, data)  # type: ignore[arg-type]
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) in bad:
                return result._replace(loss=result.loss * float("nan"))
        return result

    monkeypatch.setattr(Likelihood, "loss", poisoned)
    assert train("pretrain", "pretrain", demo_data, tmp_path, "--max_steps", "40", "--save_every", "2") == 1
    error = capsys.readouterr().err
    assert "step 4: the loss is not finite" in error and "5 steps in a row" in error
    assert "the last good checkpoint is" in error
    content = load(tmp_path / "pretrain_32" / "last.pt")
    assert all(bool(torch.isfinite(value).all()) for value in content["model_state_dict"].values())
    assert content["training_stats"]["skipped_steps"] >= 1


def test_without_validation_data_the_training_loss_decides_and_it_is_said(tmp_path: Path) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text('{"text": "a little text that is not long"}\n')
    code = main(["pretrain", "--data_path", str(data), "--out_dir", str(tmp_path / "out"), *TINY, "--max_steps", "3"])
    assert code == 0
    content = load(tmp_path / "out" / "pretrain_32" / "best_model.pt")
    assert content["best_val_loss"] is None and content["best_loss"] is not None
    assert "there was no validation data" in (tmp_path / "out" / "pretrain_32" / "README.md").read_text()


def test_a_checkpoint_of_another_size_is_refused_before_training(
    trained: Path, demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--pretrained_path", str(trained / "pretrain_64.pth"), "--hidden_size", "32")
    assert train("sft", "full_sft", demo_data, tmp_path, *flags) == 1
    assert "has hidden_size 64" in capsys.readouterr().err
    assert not tmp_path.joinpath("full_sft_32").exists()


def test_bad_data_destroys_nothing(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    before = (trained / "pretrain_64" / "last.pt").stat().st_mtime_ns
    assert main(["pretrain", "--data_path", str(bad), "--out_dir", str(trained), *TINY, "--hidden_size", "64"]) == 1
    assert "bad.jsonl" in capsys.readouterr().err
    assert (trained / "pretrain_64" / "last.pt").stat().st_mtime_ns == before


def test_without_a_checkpoint_fine_tuning_warns_and_starts_from_random_weights(
    demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("sft", "full_sft", demo_data, tmp_path, "--max_steps", "1") == 0
    assert "No pretrained checkpoint found" in capsys.readouterr().err


def test_trackers_carry_the_same_names(demo_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    flags = ("--max_steps", "2", "--tensorboard_dir", str(tmp_path / "tb"))
    assert train("pretrain", "pretrain", demo_data, tmp_path, *flags) == 0
    assert list((tmp_path / "tb" / "pretrain_32").glob("events*"))
    header = set((tmp_path / "pretrain_32" / "metrics.csv").read_text().splitlines()[0].split(","))
    assert header >= {
        "step", "train/loss", "train/accuracy", "train/perplexity", "train/lr", "train/tokens_per_sec",
        "train/grad_norm", "train/mfu", "train/memory_mb", "val/loss", "val/accuracy", "val/perplexity",
        "val/bits_per_byte",
    }  # fmt: skip


def test_wandb_logs_offline_without_asking(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    tiny = [flag for flag in TINY if flag != "--no_wandb"]
    code = main(
        [
            "pretrain",
            "--data_path",
            str(demo_data / "pretrain.jsonl"),
            "--out_dir",
            str(tmp_path),
            *tiny,
            "--max_steps",
            "2",
        ]
    )
    assert code == 0
    assert "W&B logs offline" in capsys.readouterr().err
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("command", "stage"), [("pretrain", "pretrain"), ("dpo", "rlhf")])
def test_compiled_training_is_eager_training(command: str, stage: str, demo_data: Path, tmp_path: Path) -> None:
    """Within rounding: the same losses step by step, also with the changing lengths of preference pairs."""
    losses = []
    for mode in ("off", "on"):
        out = tmp_path / mode
        assert train(command, stage, demo_data, out, "--max_steps", "4", "--compile", mode) == 0
        log = json.loads((out / f"{stage}_32" / "training_log.json").read_text(encoding="utf-8"))
        losses.append([row["loss"] for row in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
