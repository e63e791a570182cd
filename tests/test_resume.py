"""A run that was killed and resumed ends exactly like one that was not: weights, optimizer, metrics, bit for bit."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from training import command, environment, equal, load, run, without_times

STEPS = ("--max_steps", "8", "--eval_every", "3", "--save_every", "2", "--warmup_steps", "2")
FOLDERS = {"pretrain": "pretrain_32", "full_sft": "full_sft_32", "rlhf": "rlhf_32"}


@pytest.fixture(scope="module")
def straight(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted runs of all three stages, each starting from the one before."""
    out = tmp_path_factory.mktemp("straight")
    for stage in FOLDERS:
        run(stage, demo_data, out, *STEPS)
    return out


def start(stage: str, data: Path, out: Path, straight: Path, *flags: str, **extra: str) -> subprocess.Popen[str]:
    """The same run in another place, from the same weights."""
    return subprocess.Popen(
        command(stage, data, out, *STEPS, *_start_weights(stage, straight), *flags),
        env={**environment(), **extra}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _start_weights(stage: str, straight: Path) -> list[str]:
    before = {"full_sft": "pretrain_32.pth", "rlhf": "full_sft_32.pth"}
    return ["--pretrained_path", str(straight / before[stage])] if stage in before else []


def assert_same_end(stage: str, straight: Path, out: Path) -> None:
    one, two = (load(folder / FOLDERS[stage] / "last.pt") for folder in (straight, out))
    for key in ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict", "rng_state"):
        assert equal(one[key], two[key]), key
    for key in ("progress", "training_log", "validation_log", "data_state"):
        first, second = without_times(one[key]), without_times(two[key])
        assert equal(first, second), (key, first, second)
    assert equal(without_times(one["method_state"]["metrics"]), without_times(two["method_state"]["metrics"]))
    assert equal(load(straight / f"{FOLDERS[stage]}.pth"), load(out / f"{FOLDERS[stage]}.pth"))


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.005)


@pytest.mark.parametrize(("stage", "kill_after"), [("pretrain", 2), ("pretrain", 6), ("full_sft", 4), ("rlhf", 4)])
def test_a_run_killed_after_a_save_and_resumed_is_the_same_run(
    stage: str, kill_after: int, straight: Path, demo_data: Path, tmp_path: Path
) -> None:
    process = start(stage, demo_data, tmp_path, straight)
    wait_for(tmp_path / FOLDERS[stage] / f"step_{kill_after:06d}.pt", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(stage, demo_data, tmp_path, *STEPS, *_start_weights(stage, straight), "--resume_from", "auto")
    assert_same_end(stage, straight, tmp_path)


KILL_INSIDE_SAVE = """
import os, sys
from minillm.checkpoint import files
from minillm.cli import main
count, original = 0, {where}
def interrupted(*arguments, **named):
    global count
    count += 1
    if count == {at}:
        {before}
        os.kill(os.getpid(), 9)
    return original(*arguments, **named)
{where} = interrupted
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("where", "at", "before"),
    [
        ("files.torch.save", 3, "arguments[1].write(b'half a checkpoint'); arguments[1].flush()"),
        ("files._commit", 4, "pass"),
        ("files.os.replace", 23, "pass"),
        ("files.os.replace", 24, "pass"),
        ("files.os.replace", 25, "original(*arguments)"),
    ],
)
def test_a_kill_in_the_middle_of_a_save_loses_nothing_that_was_saved(
    where: str, at: int, before: str, straight: Path, demo_data: Path, tmp_path: Path
) -> None:
    program = KILL_INSIDE_SAVE.format(where=where, at=at, before=before)
    arguments = command("pretrain", demo_data, tmp_path, *STEPS)
    done = subprocess.run([arguments[0], "-c", program, *arguments[3:]], env=environment(), capture_output=True)
    assert done.returncode == -signal.SIGKILL
    run("pretrain", demo_data, tmp_path, *STEPS, "--resume_from", "auto")
    assert_same_end("pretrain", straight, tmp_path)
    assert not list((tmp_path / "pretrain_32").glob(".*.tmp"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_exit_code(
    number: signal.Signals, code: int, straight: Path, demo_data: Path, tmp_path: Path
) -> None:
    process = start("pretrain", demo_data, tmp_path, straight)
    wait_for(tmp_path / "pretrain_32" / "last.pt", process)
    process.send_signal(number)
    stderr = process.communicate()[1]
    assert process.returncode in (code, 0), stderr
    if process.returncode == code:
        assert "--resume_from auto" in stderr
        assert (tmp_path / "pretrain_32.pth").exists()
    run("pretrain", demo_data, tmp_path, *STEPS, "--resume_from", "auto")
    assert_same_end("pretrain", straight, tmp_path)


def test_resuming_a_damaged_checkpoint_falls_back_to_an_older_one(
    straight: Path, demo_data: Path, tmp_path: Path
) -> None:
    process = start("pretrain", demo_data, tmp_path, straight)
    wait_for(tmp_path / "pretrain_32" / "step_000006.pt", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = tmp_path / "pretrain_32" / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 0xFF
    last.unlink()  # a hard link: the numbered file must keep its content
    last.write_bytes(content)
    done = run("pretrain", demo_data, tmp_path, *STEPS, "--resume_from", "auto")
    assert "does not match its recorded SHA-256" in done.stderr and "trying an older checkpoint" in done.stderr
    assert_same_end("pretrain", straight, tmp_path)


def test_resuming_a_finished_run_changes_nothing(straight: Path, demo_data: Path) -> None:
    before = load(straight / "pretrain_32" / "last.pt")
    run("pretrain", demo_data, straight, *STEPS, "--resume_from", "auto")
    assert equal(before["model_state_dict"], load(straight / "pretrain_32" / "last.pt")["model_state_dict"])


def test_a_new_run_moves_the_earlier_one_aside(straight: Path, demo_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        done = run("pretrain", demo_data, out, "--max_steps", "1")
    assert (out / "pretrain_32.previous" / "last.pt").exists() and (out / "pretrain_32" / "last.pt").exists()
    assert "ar-pretrain-32-v2" in done.stderr


def test_resuming_with_other_settings_says_so(straight: Path, demo_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("pretrain", demo_data, out, "--max_steps", "2")
    done = run("pretrain", demo_data, out, "--max_steps", "3", "--learning_rate", "1e-4", "--resume_from", "auto")
    assert "not the same run" in done.stderr and "learning_rate" in done.stderr


def test_auto_without_a_checkpoint_starts_from_the_beginning(demo_data: Path, tmp_path: Path) -> None:
    done = run("pretrain", demo_data, tmp_path, "--max_steps", "1", "--resume_from", "auto")
    assert "starting from the beginning" in done.stderr
