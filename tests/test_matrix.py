"""The whole matrix: three families, three stages, dense and experts, each resumed bit for bit."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
from training import DATA, TINY, equal, load, without_times

from minillm.checkpoint.model import open_checkpoint
from minillm.cli import main
from minillm.families.settings import ARCHITECTURES

STAGES = {"pretrain": "pretrain", "sft": "full_sft", "dpo": "rlhf"}
FLAGS = ("--max_steps", "4", "--save_every", "2", "--eval_every", "2", "--max_seq_len", "64")


def train(command: str, data: Path, out: Path, *flags: str) -> Path:
    """Train a stage; its run folder."""
    stage = STAGES[command]
    before = set(out.glob(f"*{stage}*")) if out.exists() else set()
    code = main(
        [command, "--data_path", str(data / f"{DATA[stage]}.jsonl"), "--validation_data",
         str(data / f"{DATA[stage]}_val.jsonl"), "--out_dir", str(out), *TINY, *FLAGS, *flags]
    )  # fmt: skip
    assert code == 0, (command, flags, before)
    return next(path for path in out.iterdir() if path.is_dir() and stage in path.name and "previous" not in path.name)


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_stage_trains_hands_on_and_resumes(
    architecture: str, experts: bool, demo_data: Path, tmp_path: Path
) -> None:
    family = ("--architecture", architecture, *(["--use_moe", "--num_experts", "2"] if experts else []))
    for command, stage in STAGES.items():
        flags = family if command == "pretrain" else (*family[:2], *(["--use_moe"] if experts else []))
        folder = train(command, demo_data, tmp_path / "one", *flags)
        prefix = "" if architecture == "ar" else f"{architecture}_"
        assert folder.name == f"{prefix}{stage}_32{'_moe' if experts else ''}"

        # The same run, as it was after two steps, goes on to the same end.
        again = tmp_path / "two" / folder.name
        shutil.copytree(folder, again)
        for name in ("last.pt", "best_model.pt", "step_000004.pt"):
            (again / name).unlink(missing_ok=True)
        train(command, demo_data, tmp_path / "two", *flags, "--resume_from", "auto")
        one, two = (without_times(load(path / "last.pt")) for path in (folder, again))
        for key in ("model_state_dict", "optimizer_state_dict", "training_log", "validation_log", "rng_state"):
            assert equal(one[key], two[key]), (command, key)

    opened = open_checkpoint(str(tmp_path / "one" / f"{folder.name}.pth"))
    assert opened.architecture == architecture and opened.stage == "rlhf"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_metrics_have_the_same_names_in_every_family(architecture: str, demo_data: Path, tmp_path: Path) -> None:
    folder = train("sft", demo_data, tmp_path, "--architecture", architecture)
    with open(folder / "metrics.csv", encoding="utf-8") as lines:
        columns = set(next(csv.reader(lines)))
    common = {"step", "train/loss", "train/accuracy", "train/perplexity", "train/lr", "train/tokens_per_sec",
              "train/grad_norm", "train/mfu", "train/memory_mb", "val/loss", "val/accuracy", "val/perplexity",
              "val/bits_per_byte", "train/checkpoint_stall"}  # fmt: skip
    own = {"ar": set(), "diffusion": {"ignore_acc"}, "sdd": {"ignore_acc", "k"}}[architecture]
    assert columns == common | {f"{split}/{name}" for split in ("train", "val") for name in own}


def test_a_checkpoint_of_another_family_is_refused_with_the_way_out(
    demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("pretrain", demo_data, tmp_path)
    weights = str(tmp_path / "pretrain_32.pth")
    flags = ["--pretrained_path", weights, "--data_path", str(demo_data / "sft.jsonl"), "--out_dir", str(tmp_path)]
    assert main(["sft", "--architecture", "sdd", *flags, *TINY]) == 1
    assert "minillm convert" in capsys.readouterr().err


def test_settings_of_the_family_are_inherited(demo_data: Path, tmp_path: Path) -> None:
    """A run that starts from a checkpoint takes from it what its own flags do not say."""
    train("pretrain", demo_data, tmp_path, "--architecture", "sdd", "--fixed_k", "3", "--denoiser", "bilateral")
    source = ("--pretrained_path", str(tmp_path / "sdd_pretrain_32.pth"))
    folder = train("sft", demo_data, tmp_path, *source, "--belief_share", "1.0")
    family = load(folder / "last.pt")["family"]
    assert family["architecture"] == "sdd" and family["denoiser"] == "bilateral" and family["k_schedule"] == [3]
    assert family["belief_share"] == 1.0


@pytest.mark.parametrize("target", ["diffusion", "sdd"])
def test_an_ar_checkpoint_becomes_another_family_and_trains_on(target: str, demo_data: Path, tmp_path: Path) -> None:
    folder = train("pretrain", demo_data, tmp_path / "ar")
    new = tmp_path / "converted.pt"
    assert main(["convert", "--checkpoint", str(folder / "last.pt"), "--to", target, "--output", str(new),
                 "--anneal_steps", "3"]) == 0  # fmt: skip
    before, after = load(folder / "last.pt")["model_state_dict"], load(new)["model_state_dict"]
    assert all(equal(value, after[key]) for key, value in before.items())
    on = train("pretrain", demo_data, tmp_path / "on", "--pretrained_path", str(new))
    assert on.name == f"{target}_pretrain_32"
    assert load(on / "last.pt")["family"]["anneal_steps"] == 3
    # What starts from there has an attention that is open.
    tuned = train("sft", demo_data, tmp_path / "on", "--pretrained_path", str(on / "last.pt"))
    assert load(tuned / "last.pt")["family"]["anneal_steps"] == 0


def test_averaged_weights_are_kept_used_and_resumed(demo_data: Path, tmp_path: Path) -> None:
    folder = train("pretrain", demo_data, tmp_path / "one", "--ema", "0.9")
    last = load(folder / "last.pt")
    average, weights = last["ema_state_dict"], last["model_state_dict"]
    assert average.keys() == weights.keys() and not equal(average, weights)
    opened = open_checkpoint(str(folder / "last.pt"))
    assert equal(dict(opened.model.state_dict()), average)
    again = tmp_path / "two" / folder.name
    shutil.copytree(folder, again)
    for name in ("last.pt", "best_model.pt", "step_000004.pt"):
        (again / name).unlink(missing_ok=True)
    train("pretrain", demo_data, tmp_path / "two", "--ema", "0.9", "--resume_from", "auto")
    assert equal(load(again / "last.pt")["ema_state_dict"], average)
