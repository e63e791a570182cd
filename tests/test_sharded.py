"""Sharded checkpoints: written by several processes, whole or not there at all, read by any number of processes."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors import safe_open
from safetensors.torch import save_file
from sound import SoundCheckpoint
from training import equal, load

from minillm.checkpoint import sharded
from minillm.checkpoint.background import BackgroundWriter
from minillm.checkpoint.files import read_tensors, save_tensors, sha256
from minillm.checkpoint.format import check_full
from minillm.checkpoint.sharded import (
    clear_sharded_leftovers,
    peek_sharded,
    read_sharded,
    remember_best,
    remove_sharded,
    save_sharded,
    sharded_checkpoints,
    verify_sharded,
)
from minillm.cli import main
from minillm.log import UserError
from minillm.train.start import find_resume, newest_first

STEP = "step_000002.sharded"


def content(step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A small full checkpoint, with tensors of every kind that ours have."""
    return {
        "format_version": 1, "global_step": step, "progress": {"step": step},
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": {"adamw": optimizer.state_dict()},
        "method_state": {"name": "x", "state": {"memory": torch.arange(5), "empty": torch.zeros(0)}},
        "rng_state": {"torch": torch.get_rng_state()}, "tokenizer": {"json": "{}"},
    }  # fmt: skip


def trained_model(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Layers whose rows two processes share evenly, unevenly, and not at all."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 5), torch.nn.Linear(5, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def one_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def saved_alone(run: Path, step: int = 2) -> Path:
    """A sharded checkpoint of one process."""
    model, optimizer = trained_model()
    one_step(model, optimizer)
    folder = run / f"step_{step:06d}.sharded"
    save_sharded(folder, BackgroundWriter().snapshot(content(step, model, optimizer)), None)
    return folder


def two_processes(rank: int, out: Path) -> None:
    """What each of two processes does for the fixture below."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    group = dist.new_group(backend="gloo")
    model, optimizer = trained_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    writer = BackgroundWriter(group, tells=rank == 0)

    def save(step: int) -> bool:
        copy = writer.snapshot(content(step, model, optimizer))
        writer.submit(lambda: save_sharded(out / f"step_{step:06d}.sharded", copy, group))
        one_step(model, optimizer)  # training goes on: the copy does not change
        return writer.wait()

    def whole(value: Any) -> Any:
        if isinstance(value, DTensor):
            return value.full_tensor()
        if isinstance(value, dict):
            return {key: whole(item) for key, item in value.items()}
        return [whole(item) for item in value] if isinstance(value, list) else value

    one_step(model, optimizer)
    reference = whole(content(2, model, optimizer))
    if rank == 0:
        torch.save(reference, out / "reference.pt")
    done = [save(2)]
    if rank == 1:  # its disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    done.append(save(3))
    left = sorted(path.name for path in out.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    done.append(save(4))
    (out / f"said_{rank}.json").write_text(json.dumps({"done": done, "left": left}))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes that share a model have saved steps 2 and 4, and could not save step 3."""
    out = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(two_processes, (out,), nprocs=2)
    return out


def test_what_two_processes_write_is_read_by_one_as_if_one_had_written_it(pair: Path) -> None:
    found, reference = read_sharded(pair / STEP), load(pair / "reference.pt")
    assert list(found["model_state_dict"]) == list(reference["model_state_dict"])
    for key in reference:
        if key != "rng_state":
            assert equal(found[key], reference[key]), key


def test_each_process_writes_its_part_once(pair: Path) -> None:
    held: dict[str, int] = {}
    for part in sorted((pair / STEP).glob("part_*")):
        with safe_open(part, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                held[key] = held.get(key, 0) + file.get_tensor(key).numel()
    reference = load(pair / "reference.pt")
    assert held["model_state_dict.1.weight"] == reference["model_state_dict"]["1.weight"].numel()
    assert held["method_state.state.memory"] == 5  # both processes have it whole
    assert "optimizer_state_dict.adamw.state.0.step" not in held  # numbers are in rest.pt
    sizes = [(pair / STEP / f"part_0000{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 2 * min(sizes)


def test_a_full_disk_of_one_process_leaves_the_others_alive_and_earlier_saves_intact(pair: Path) -> None:
    for rank in (0, 1):
        said = json.loads((pair / f"said_{rank}.json").read_text())
        assert said["done"] == [True, False, True]
        assert STEP in said["left"]
        assert not [name for name in said["left"] if "000003" in name]  # the other process may be at step 4 already
    verify_sharded(pair / STEP)
    verify_sharded(pair / "step_000004.sharded")
    assert [path.name for path in sharded_checkpoints(pair)] == ["step_000004.sharded", STEP]


def test_a_dtensor_is_read_by_processes_in_another_division(pair: Path) -> None:
    """What torch's own reader makes of the files, for a process that wants half of a tensor."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    stored = HuggingFaceStorageReader(str(pair / STEP)).read_metadata().state_dict_metadata
    uneven: Any = stored["model_state_dict.1.weight"]
    assert uneven.size == (5, 6)
    assert sorted(tuple(chunk.offsets) for chunk in uneven.chunks) == [(0, 0), (3, 0)]


def test_peeking_tells_shapes_and_everything_else_without_reading_tensors(tmp_path: Path) -> None:
    folder = saved_alone(tmp_path)
    found, whole = peek_sharded(folder), read_sharded(folder)
    weight = found["model_state_dict"]["1.weight"]
    assert weight.is_meta and weight.shape == whole["model_state_dict"]["1.weight"].shape
    assert found["tokenizer"] == whole["tokenizer"]


def planted(folder: Path, fault: str) -> None:
    """Damage a sharded checkpoint in one way."""
    part, rest, sums = folder / "part_00000.safetensors", folder / "rest.pt", folder / "SHA256SUMS"
    if fault == "a changed byte":
        content = bytearray(part.read_bytes())
        content[-1] ^= 1
        part.write_bytes(content)
        return
    if fault == "a missing part":
        part.unlink()
        return
    if fault == "no sums":
        sums.unlink()
        return
    if fault == "a further file":
        (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
        return
    if fault == "a link":
        shutil.move(part, folder.parent / "elsewhere")
        part.symlink_to(folder.parent / "elsewhere")
        return
    with safe_open(part, framework="pt") as file:
        tensors, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    offsets, key = json.loads(about["DCP_SHARDING_INFO"]), "model_state_dict.1.weight"
    if fault == "code":
        torch.save({"sharded": {"places": {}, "saved": 0.0}, "x": Evil()}, rest)
    elif fault == "an endless tensor":
        offsets[key]["saved_offsets"] = [2**40, 0]
    elif fault == "no offsets":
        del offsets[key]
    elif fault == "another shape":
        tensors[key] = tensors[key][:2].contiguous()
    elif fault == "a place that is none":
        content = load(rest)
        content["sharded"]["places"][key]["path"] = ["tokenizer", "json", 3]
        torch.save(content, rest)
    save_file(tensors, part, {**about, "DCP_SHARDING_INFO": json.dumps(offsets)})
    sums.write_text("".join(f"{sha256(path)}  {path.name}\n" for path in (part, rest)))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch minillm_was_here",)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("a place that is none", "does not say where its tensors belong"),
        ("a changed byte", "does not match its recorded SHA-256"),
        ("a missing part", "part_00000.safetensors is missing"),
        ("no sums", "SHA256SUMS is missing"), ("a further file", ".metadata is not recorded"),
        ("a link", "no plain file"), ("code", "could execute code"),
        ("an endless tensor", "its parts hold 30 elements"),
        ("no offsets", "cannot be read"), ("another shape", r"is \(2, 6\) .* expected \(5, 6\)"),
    ],
)  # fmt: skip
def test_a_damaged_or_malicious_folder_is_refused_in_a_sentence(
    fault: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved_alone(tmp_path)
    planted(folder, fault)
    with pytest.raises(UserError, match=message) as raised:
        read_sharded(folder)
    assert "step_000002.sharded" in str(raised.value)
    assert not (tmp_path / "minillm_was_here").exists()


@pytest.mark.parametrize("moment", ["_write_part", "_commit", "sync", "sync_folder", "os.replace"])
def test_a_kill_at_any_moment_of_a_save_leaves_what_was_committed(moment: str, tmp_path: Path) -> None:
    saved_alone(tmp_path, 2)
    again = saved_alone(tmp_path, 4)
    child = os.fork()
    if child == 0:  # it dies while it replaces the save of step 4
        target: Any = __import__("os") if moment == "os.replace" else sharded
        name = moment.removeprefix("os.")
        original, seen = getattr(target, name), []

        def killed(*arguments: Any) -> Any:
            seen.append(1)
            if name != "replace" or len(seen) == 2:  # between the two names
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        setattr(target, name, killed)
        saved_alone(tmp_path, 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    newest, older = sharded_checkpoints(tmp_path)
    assert newest.name.startswith(again.name) and older.name == STEP
    for folder in (newest, older):
        assert read_sharded(folder)["model_state_dict"]
    clear_sharded_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [STEP, again.name]
    verify_sharded(again)


def test_a_deleted_checkpoint_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_alone(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the process dies before it deletes anything
    remove_sharded(folder)
    assert sharded_checkpoints(tmp_path) == []
    monkeypatch.undo()
    clear_sharded_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_uses_the_same_memory_again_and_is_not_changed_by_training() -> None:
    writer, weight = BackgroundWriter(), torch.ones(3, 3)
    first = writer.snapshot({"a": {"b": [weight, 1]}})["a"]["b"][0]
    weight.zero_()
    assert torch.equal(first, torch.ones(3, 3))
    second = writer.snapshot({"a": {"b": [weight, 1]}})["a"]["b"][0]
    assert second.data_ptr() == first.data_ptr() and torch.equal(second, torch.zeros(3, 3))


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of several processes, of which steps 2, 4 (the best) and 6 are there."""
    monkeypatch.chdir(tmp_path)
    sound, run = SoundCheckpoint(tmp_path / "sound"), Path("out/pretrain_16")
    for step in (4, 2, 6):
        progress = {**sound.content()["progress"], "step": step}
        said = sound.content(global_step=step, step=step, progress=progress)
        save_sharded(run / f"step_{step:06d}.sharded", BackgroundWriter().snapshot(said), None)
    remember_best(run / "step_000004.sharded")
    return run


def test_the_checkpoint_commands_know_the_folders(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str, code: int = 0) -> str:
        assert main(["checkpoint", *arguments]) == code
        printed = capsys.readouterr()
        return printed.out + printed.err

    rows = {row["step"]: row for row in json.loads(said("list", "out", "--json"))}
    assert sorted(rows) == [2, 4, 6] and {row["kind"] for row in rows.values()} == {"sharded"}
    assert all(row["stage"] == "pretrain" and row["problem"] is None for row in rows.values())
    assert "global_step: 4" in said("show", str(run_folder))  # its best
    assert said("verify", "out").count("ok ") == 3
    assert said("prune", "out", "--keep", "1", "--yes").count("step_00000") == 1  # the newest and the best stay
    assert sorted(path.name for path in run_folder.glob("step_*")) == ["step_000004.sharded", "step_000006.sharded"]
    for refused in ("tag", "compress"):
        assert "minillm checkpoint consolidate" in said(refused, str(run_folder / "step_000004.sharded"), code=1)
    part = run_folder / "step_000006.sharded" / "part_00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert "does not match its recorded SHA-256" in said("verify", "out", code=1)


def test_consolidating_gives_the_file_that_one_process_would_have_written(run_folder: Path) -> None:
    assert main(["checkpoint", "consolidate", str(run_folder)]) == 0
    assert main(["checkpoint", "consolidate", str(run_folder / "step_000004.sharded"), "--output", "flat.pth"]) == 0
    made, folder = read_tensors(run_folder / "step_000006.pt"), read_sharded(run_folder / "step_000006.sharded")
    assert equal(made, folder) and made["global_step"] == 6
    check_full(made, run_folder)
    assert equal(load(Path("flat.pth")), dict(folder["model_state_dict"]))


def test_resuming_takes_the_newest_of_either_kind(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = read_sharded(run_folder / "step_000006.sharded")
    assert newest_first(run_folder)[0].name == "step_000006.sharded"
    save_tensors(run_folder / "last.pt", {**sound, "global_step": 5, "step": 5})
    assert newest_first(run_folder)[0].name == "step_000006.sharded"
    save_tensors(run_folder / "last.pt", {**sound, "global_step": 7, "step": 7})
    assert newest_first(run_folder)[0].name == "last.pt"
    save_tensors(run_folder / "last.pt", {**sound, "global_step": 5, "step": 5})
    (run_folder / "step_000006.sharded" / "part_00000.safetensors").unlink()
    found = find_resume(run_folder, "auto")
    assert found is not None and found[1].name == "step_000002.sharded"  # saved after step 4
    assert "trying an older checkpoint" in capsys.readouterr().err
