"""A run that was killed and resumed ends exactly like one that was not: weights, optimizer, metrics, bit for bit."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import training
from nursery import Nursery
from training import command, environment, equal, load, run, start_together, without_times

from minillm.checkpoint.files import verify_hash
from minillm.checkpoint.safety import tensors_in
from minillm.checkpoint.sharded import sharded_checkpoints, verify_sharded

HALF = ("--batch_size", "2")  # for each of two processes
STEPS = ("--max_steps", "8", "--eval_every", "3", "--save_every", "2", "--warmup_steps", "2")
FOLDERS = {"pretrain": "pretrain_32", "full_sft": "full_sft_32", "rlhf": "rlhf_32"}


@pytest.fixture(scope="module", autouse=True)
def uninterrupted_runs_come_from_the_nursery(nursery: Nursery) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "PYTHON", str(nursery.python))
        yield


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


@pytest.mark.parametrize(
    ("stage", "kill_after"),
    [("pretrain", 2), pytest.param("pretrain", 6, marks=pytest.mark.slow), ("full_sft", 4), ("rlhf", 4)],
)
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
        pytest.param("files.os.replace", 23, "pass", marks=pytest.mark.slow),
        pytest.param("files.os.replace", 24, "pass", marks=pytest.mark.slow),
        ("files.os.replace", 25, "original(*arguments)"),
    ],
)
def test_a_kill_in_the_middle_of_a_save_loses_nothing_that_was_saved(
    where: str, at: int, before: str, straight: Path, demo_data: Path, tmp_path: Path
) -> None:
    program = KILL_INSIDE_SAVE.format(where=where, at=at, before=before)
    arguments = command("pretrain", demo_data, tmp_path, *STEPS)
    done = subprocess.run([training.PYTHON, "-c", program, *arguments[3:]], env=environment(), capture_output=True)
    assert done.returncode == -signal.SIGKILL
    run("pretrain", demo_data, tmp_path, *STEPS, "--resume_from", "auto")
    assert_same_end("pretrain", straight, tmp_path)
    assert not list((tmp_path / "pretrain_32").glob(".*.tmp"))


FULL_DISK = """
import resource, sys
from minillm.cli import main
from minillm.train import saving
original = saving.save_tensors
def limited(path, content, also=()):
    full = path.name == "last.pt" and content["step"] == {step}
    try:
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
        original(path, content, also)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
saving.save_tensors = limited
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("step", "code"), [(4, 0), (8, 1)])
def test_a_disk_that_is_full_at_a_save_costs_that_save_and_nothing_else(
    step: int, code: int, straight: Path, demo_data: Path, tmp_path: Path
) -> None:
    arguments = command("pretrain", demo_data, tmp_path, *STEPS)
    program = [training.PYTHON, "-c", FULL_DISK.format(step=step), *arguments[3:]]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    folder = tmp_path / FOLDERS["pretrain"]
    assert f"could not be saved ([Errno 27] File too large: '{folder / 'last.pt'}')" in done.stderr
    assert ("the last checkpoint could not be saved" in done.stderr) == (code == 1)
    assert not (folder / f"step_{step:06d}.pt").exists() and not list(folder.glob(".*"))
    for path in folder.glob("*.pt"):
        assert verify_hash(path)
    if code:
        assert load(folder / "last.pt")["step"] == 6
        run("pretrain", demo_data, tmp_path, *STEPS, "--resume_from", "auto")
    assert_same_end("pretrain", straight, tmp_path)


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


def assert_same_trajectory(stage: str, straight: Path, out: Path) -> None:
    """The same run up to the order in which processes add up their gradients."""
    one, two = (load(folder / FOLDERS[stage] / "last.pt") for folder in (straight, out))
    assert one["global_step"] == two["global_step"]
    for key in ("model_state_dict", "optimizer_state_dict"):
        first, second = tensors_in(one[key]), tensors_in(two[key])
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)
    losses = [[row["val/loss"] for row in each["validation_log"]] for each in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert [row["step"] for row in one["training_log"]] == [row["step"] for row in two["training_log"]]
    flat = load(out / f"{FOLDERS[stage]}.pth")
    best = load(out / FOLDERS[stage] / "best_model.pt")
    assert equal(flat, best["model_state_dict"]) and best["global_step"] == one["progress"]["best_step"]


def two_killed_after(step: int, data: Path, out: Path, *flags: str) -> None:
    """Two processes that share the weights; one of them dies when this step is committed."""
    # a third of the time limit passes before the other one says who is missing
    more = ("--shards", "2", "--timeout", "15", *flags)
    pair = start_together(2, "pretrain", data, out, *STEPS, *HALF, *more)
    wait_for(out / FOLDERS["pretrain"] / f"step_{step:06d}.sharded", pair[0])
    pair[1].kill()
    pair[1].wait()
    assert wait_end(pair[0]) != 0


def wait_end(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=120)
    return process.returncode


def assert_both_end_well(pair: list[subprocess.Popen[str]]) -> None:
    said = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(said)


def test_a_run_of_two_processes_is_resumed_by_one(straight: Path, demo_data: Path, tmp_path: Path) -> None:
    two_killed_after(4, demo_data, tmp_path)
    done = run("pretrain", demo_data, tmp_path, *STEPS, "--resume_from", "auto")
    assert ".sharded at step" in done.stderr and "not the same run" not in done.stderr
    assert_same_trajectory("pretrain", straight, tmp_path)
    assert not list((tmp_path / FOLDERS["pretrain"]).glob("*.sharded"))


KILL_ONE_INSIDE_SAVE = """
import os, sys
from minillm.checkpoint import sharded
from minillm.cli import main
count, original = 0, sharded.{where}
def interrupted(*arguments, **named):
    global count
    count += 1
    if count == {at} and os.environ["RANK"] == "{rank}":
        os.kill(os.getpid(), 9)
    return original(*arguments, **named)
sharded.{where} = interrupted
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "rank", "at"),
    [("_write_part", 1, 2), ("_write_part", 0, 2), ("_exchange", 1, 3), ("_exchange", 1, 4), ("_commit", 0, 2),
     ("sync_folder", 0, 2), ("put_in_place", 0, 2), ("_exchange", 0, 4)],
)  # fmt: skip
def test_a_kill_of_one_process_in_the_middle_of_a_save_loses_nothing_that_was_committed(
    where: str, rank: int, at: int, straight: Path, demo_data: Path, tmp_path: Path
) -> None:
    flags = (*STEPS, *HALF, "--shards", "2")
    program = KILL_ONE_INSIDE_SAVE.format(where=where, rank=rank, at=at)  # while step 3 (the best so far) is saved
    pair = start_together(2, "pretrain", demo_data, tmp_path, *flags, program=program)
    codes = [wait_end(each) for each in pair]
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] != 0
    committed = sharded_checkpoints(tmp_path / FOLDERS["pretrain"])
    assert "step_000002.sharded" in [path.name for path in committed]
    for path in committed:
        verify_sharded(path)
    again = start_together(2, "pretrain", demo_data, tmp_path, *flags, "--resume_from", "auto")
    assert_both_end_well(again)
    assert_same_trajectory("pretrain", straight, tmp_path)
    assert not list((tmp_path / FOLDERS["pretrain"]).glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("shards", ["1", "2"])
def test_a_run_of_one_process_is_resumed_by_two(shards: str, straight: Path, demo_data: Path, tmp_path: Path) -> None:
    process = start("pretrain", demo_data, tmp_path, straight)
    wait_for(tmp_path / FOLDERS["pretrain"] / "step_000004.pt", process)
    process.kill()
    process.wait()
    pair = start_together(
        2, "pretrain", demo_data, tmp_path, *STEPS, *HALF, "--shards", shards, "--resume_from", "auto"
    )
    assert_both_end_well(pair)
    assert_same_trajectory("pretrain", straight, tmp_path)


@pytest.mark.slow
def test_a_sharded_run_is_resumed_by_processes_that_have_whole_copies(
    straight: Path, demo_data: Path, tmp_path: Path
) -> None:
    two_killed_after(4, demo_data, tmp_path)
    two_killed_after(6, demo_data, tmp_path, "--resume_from", "auto")
    pair = start_together(2, "pretrain", demo_data, tmp_path, *STEPS, *HALF, "--shards", "1", "--resume_from", "auto")
    assert_both_end_well(pair)
    assert_same_trajectory("pretrain", straight, tmp_path)


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


@pytest.mark.parametrize("flags", [[], ["--resume_from", "auto"]], ids=["new", "resumed"])
def test_a_second_run_in_the_folder_of_one_that_still_trains_is_refused(
    flags: list[str], straight: Path, demo_data: Path, tmp_path: Path
) -> None:
    first = start("pretrain", demo_data, tmp_path, straight)
    wait_for(tmp_path / "pretrain_32" / "step_000002.pt", first)
    first.send_signal(signal.SIGSTOP)
    try:
        second = start("pretrain", demo_data, tmp_path, straight, *flags)
        _, errors = second.communicate(timeout=60)
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert f"Another process is training in {tmp_path / 'pretrain_32'}. Wait for it, end it, or choose" in errors
    first.communicate(timeout=60)
    assert_same_end("pretrain", straight, tmp_path)
    assert not (tmp_path / "pretrain_32.previous").exists()


def test_resuming_with_other_settings_says_so(straight: Path, demo_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("pretrain", demo_data, out, "--max_steps", "2")
    done = run("pretrain", demo_data, out, "--max_steps", "3", "--learning_rate", "1e-4", "--resume_from", "auto")
    assert "not the same run" in done.stderr and "learning_rate" in done.stderr


def test_auto_without_a_checkpoint_starts_from_the_beginning(demo_data: Path, tmp_path: Path) -> None:
    done = run("pretrain", demo_data, tmp_path, "--max_steps", "1", "--resume_from", "auto")
    assert "starting from the beginning" in done.stderr
