"""minillm checkpoint: what it lists, shows, compares, averages, deletes and names is so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sound import SoundCheckpoint

from minillm.checkpoint.files import hash_file, peek, read_tensors, save_tensors, sha256
from minillm.checkpoint.format import check_full
from minillm.checkpoint.model import open_checkpoint
from minillm.cli import main
from minillm.train.metrics import next_version
from minillm.train.state import TrainState


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> SoundCheckpoint:
    return SoundCheckpoint(tmp_path_factory.mktemp("sound"))


def shifted(sound: SoundCheckpoint, by: float, step: int, **changes: Any) -> dict[str, Any]:
    """A checkpoint of this step, whose weights are those of `sound` and a bit."""
    weights = {key: value + by for key, value in sound.weights.items()}
    log = [{"step": step, "val/loss": 3.0 - by}]
    return sound.content(model_state_dict=weights, global_step=step, step=step, validation_log=log, **changes)


@pytest.fixture
def run(sound: SoundCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """out/pretrain_16 with steps 1 to 4, of which 3 is the best; its flat weights; and what was tuned from them."""
    monkeypatch.chdir(tmp_path)
    folder = Path("out/pretrain_16")
    for step in (1, 2, 3, 4):
        also = {3: (folder / "best_model.pt",), 4: (folder / "last.pt",)}.get(step, ())
        save_tensors(folder / f"step_{step:06d}.pt", shifted(sound, step / 10, step), also=also)
    flat = Path("out/pretrain_16.pth")
    save_tensors(flat, read_tensors(folder / "best_model.pt")["model_state_dict"])
    parent = {"path": str(flat), "sha256": sha256(flat), "stage": None, "step": None}
    save_tensors(Path("out/full_sft_16/last.pt"), shifted(sound, 0.3001, 9, stage="full_sft", parent=parent))
    return folder


def said(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    """What a command prints, on stdout and then on stderr."""
    capsys.readouterr()
    done = main(list(argv))
    shown = capsys.readouterr()
    assert done == code, shown.err
    return shown.out + shown.err


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    """What a command prints on stdout."""
    capsys.readouterr()
    assert main(list(argv)) == 0
    return json.loads(capsys.readouterr().out)


# --- list ---


def test_a_list_names_each_file_once_with_all_it_is_known_by(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["checkpoint", "tag", str(run), "--name", "v1"])
    entries = {entry["path"]: entry for entry in as_json(capsys, "checkpoint", "list", "--json")}
    best = entries[f"{run}/best_model.pt"]
    assert best["also"] == [f"{run}/step_000003.pt", "out/v1/pretrain_16.pt"]
    assert (best["stage"], best["family"], best["step"], best["validation_loss"]) == ("pretrain", "ar", 3, 3.0 - 0.3)
    assert (best["tags"], best["run_name"], best["version"]) == (["v1"], "ar-words-16-v1", 1)
    assert best["size"] == (run / "best_model.pt").stat().st_size and best["sha256"] == sha256(run / "best_model.pt")
    assert entries["out/full_sft_16/last.pt"]["parent"]["path"] == "out/pretrain_16.pth"
    assert (entries["out/pretrain_16.pth"]["kind"], entries["out/pretrain_16.pth"]["stage"]) == ("weights", "pretrain")
    assert len(entries) == 6
    lines = said(capsys, "checkpoint", "list").splitlines()
    assert max(map(len, lines)) <= 100
    total = sum(
        path.stat().st_size / path.stat().st_nlink for path in Path("out").rglob("*.pt*") if path.suffix != ".sha256"
    )
    assert lines[-1].startswith(f"6 files, {total / 1000:.1f} KB")


def test_listing_leaves_tensors_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    torch.save({"w": torch.zeros(1 << 20)}, path)
    content = peek(path)
    whole = bytearray(path.read_bytes())
    middle = len(whole) // 2 // 4 * 4
    whole[middle : middle + 64] = np.full(16, 7.0, dtype=np.float32).tobytes()
    with path.open("r+b") as file:  # what is read only now is what the file holds by now
        file.write(whole)
    assert float(content["w"].max()) != 0.0


def test_a_damaged_file_is_listed_with_what_is_wrong(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "step_000001.pt").write_bytes((run / "step_000001.pt").read_bytes()[:900])
    shown = said(capsys, "checkpoint", "list", "out")
    assert "cannot be used: out/pretrain_16/step_000001.pt cannot be read" in shown and "step 4" in shown
    assert "there is no folder nowhere" in said(capsys, "checkpoint", "list", "nowhere", code=1)


# --- show ---


def test_every_field_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = read_tensors(run / "best_model.pt")
    for path in (str(run), str(run / "best_model.pt")):
        shown = as_json(capsys, "checkpoint", "show", path, "--json")
        assert set(shown["content"]) == set(content)
    assert shown["content"]["model_state_dict"]["model.norm.weight"] == "float32 [16]"
    assert shown["content"]["validation_log"]["entries"] == 1
    people = said(capsys, "checkpoint", "show", str(run))
    assert all(f"\n{key}:" in f"\n{people}" for key in content)


def test_the_chain_of_parents_is_followed_through_flat_weights(
    run: Path, sound: SoundCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = "out/full_sft_16/last.pt"
    parent = {"path": sft, "sha256": sha256(Path(sft)), "stage": "full_sft", "step": 9}
    save_tensors(Path("out/rlhf_16.pt"), sound.content(stage="rlhf", parent=parent))

    def chain() -> list[tuple[str, str]]:
        shown = as_json(capsys, "checkpoint", "show", "out/rlhf_16.pt", "--json")
        return [(link["path"], link["found"]) for link in shown["lineage"]]

    assert chain() == [(sft, "yes"), ("out/pretrain_16.pth", "yes")]
    save_tensors(Path("out/pretrain_16.pth"), {"w": torch.ones(2)})
    assert chain() == [(sft, "yes"), ("out/pretrain_16.pth", "changed")]
    Path(sft).unlink()
    assert chain() == [(sft, "no")]


# --- verify ---


def test_verify_has_a_line_for_each_file_and_fails_if_one_does(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [path for path in Path("out").rglob("*") if path.suffix in (".pt", ".pth")]
    assert said(capsys, "checkpoint", "verify").count("ok      ") == len(files) == 8
    whole = bytearray((run / "step_000002.pt").read_bytes())
    whole[-1000] ^= 1
    (run / "step_000002.pt").write_bytes(whole)
    (run / "tokenizer.json").write_text("{}")
    shown = said(capsys, "checkpoint", "verify", "out", code=1)
    assert "FAILED  out/pretrain_16/step_000002.pt does not match its recorded SHA-256" in shown
    assert shown.count("FAILED") == 6 and "error: 6 of 8 files failed" in shown  # the tokenizer beside is none


def test_verify_finds_links_outwards_and_another_tokenizer_beside(
    run: Path, sound: SoundCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "elsewhere.pt"
    save_tensors(other, sound.content())
    (run / "step_000007.pt").symlink_to(other)
    shown = said(capsys, "checkpoint", "verify", "out", code=1)
    assert "step_000007.pt is a symbolic link out of the folder" in shown
    (run / "step_000007.pt").unlink()
    sound.tokenizer.save(run)
    said(capsys, "checkpoint", "verify", "out")
    values = json.loads((run / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (run / "tokenizer.json").write_text(json.dumps(values))
    assert "the tokenizer in it is another one than" in said(capsys, "checkpoint", "verify", str(run), code=1)


# --- diff ---


def test_diff_says_how_far_each_layer_moved(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "checkpoint", "diff", str(run / "step_000001.pt"), str(run / "step_000004.pt"))
    one, four = (read_tensors(run / f"step_00000{step}.pt")["model_state_dict"] for step in (1, 4))
    norms = [
        np.sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in parts))
        for parts in (
            [(four[key] - one[key]).numpy() for key in one if ".layers.1." in key],
            [one[key].numpy() for key in one if ".layers.1." in key],
        )
    ]
    assert f"model.layers.1      {norms[0] / norms[1]:.3e}" in shown
    assert "step: 1 -> 4" in shown and "tokenizer: equal" in shown
    assert "model.norm" in said(capsys, "checkpoint", "diff", str(run), str(run)) and "equal" in shown


def test_diff_names_keys_that_only_one_has(
    run: Path, sound: SoundCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {key: value for key, value in sound.weights.items() if key != "model.norm.weight"}
    save_tensors(Path("other.pt"), sound.content(model_state_dict={**weights, "model.new": torch.ones(2)}))
    shown = said(capsys, "checkpoint", "diff", str(run), "other.pt")
    assert "only in A: model.norm.weight" in shown and "only in B: model.new" in shown


# --- average ---


@pytest.mark.parametrize("flags, shares", [([], [1 / 3] * 3), (["--method", "ema"], [1 / 7, 2 / 7, 4 / 7])])
def test_an_average_is_the_weighted_mean_and_names_its_parents(
    run: Path, flags: list[str], shares: list[float]
) -> None:
    assert main(["checkpoint", "average", str(run), "--last", "3", "--output", "mean.pt", *flags]) == 0
    mean = read_tensors(Path("mean.pt"))
    parts = [read_tensors(run / f"step_00000{step}.pt")["model_state_dict"] for step in (2, 3, 4)]
    for key, value in mean["model_state_dict"].items():
        expected = sum(share * part[key].double() for share, part in zip(shares, parts))
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-7)
    assert [parent["step"] for parent in mean["averaged"]["of"]] == [2, 3, 4]
    assert mean["averaged"]["of"][0]["sha256"] == sha256(run / "step_000002.pt")
    assert "optimizer_state_dict" not in mean and "best_loss" not in mean
    assert open_checkpoint("mean.pt").step == 4


def test_what_has_no_meaningful_mean_is_not_averaged(
    run: Path, sound: SoundCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {**sound.config.to_dict(), "rope_theta": 5.0}
    save_tensors(Path("other.pt"), sound.content(model_config=other))
    last = str(run / "last.pt")
    for argv, message in (
        (["other.pt", last], "differ in their sizes"),
        ([last], "at least two"),
        (["out/full_sft_16"], "has 0 numbered checkpoints"),
        (["out/full_sft_16/last.pt", last], "differ in their stage"),
    ):
        assert message in said(capsys, "checkpoint", "average", *argv, "--output", "mean.pt", code=1)
        assert not Path("mean.pt").exists()
    before = sha256(run / "last.pt")
    argv = [str(run / "step_000001.pt"), last, "--output", last]
    assert "one of the checkpoints" in said(capsys, "checkpoint", "average", *argv, code=1)
    assert sha256(run / "last.pt") == before


# --- prune ---


def steps(run: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in run.glob("step_*.pt"))


def test_prune_deletes_only_when_told_and_keeps_newest_best_and_tagged(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["checkpoint", "tag", str(run / "step_000001.pt"), "--name", "first"])
    shown = said(capsys, "checkpoint", "prune", "out", "--keep", "1")
    size = (run / "step_000002.pt").stat().st_size
    assert "step_000002.pt" in shown and f"1 checkpoints, {size:,} bytes" in shown and "nothing was deleted" in shown
    assert steps(run) == [1, 2, 3, 4]
    said(capsys, "checkpoint", "prune", "out", "--keep", "1", "--yes")
    assert steps(run) == [1, 3, 4]  # 1 is tagged, 3 the best, 4 the newest
    assert not hash_file(run / "step_000002.pt").exists() and (run / "best_model.pt").exists()


@pytest.mark.parametrize("answer, left", [("n", [1, 2, 3, 4]), ("y", [3, 4])])
def test_prune_asks_in_a_terminal(run: Path, answer: str, left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    assert main(["checkpoint", "prune", str(run)]) == 0
    assert steps(run) == left


def test_prune_leaves_all_where_what_would_stay_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("step_000004.pt", "last.pt", "best_model.pt"):
        hash_file(run / name).write_text("0" * 64 + f"  {name}\n")
    assert "nothing of it is deleted" in said(capsys, "checkpoint", "prune", str(run), "--keep", "1", "--yes")
    assert steps(run) == [1, 2, 3, 4]


# --- tag and versions ---


def test_a_tag_outlives_its_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = sha256(run / "best_model.pt")
    said(capsys, "checkpoint", "tag", str(run))
    said(capsys, "checkpoint", "tag", str(run / "step_000001.pt"))
    for path in run.iterdir():
        path.unlink()
    assert sha256(Path("out/v1/pretrain_16.pt")) == best
    assert open_checkpoint("out/v1/pretrain_16.pt").step == 3 and open_checkpoint("out/v2/pretrain_16.pt").step == 1
    assert "ok      out/v1/pretrain_16.pt: hash" in said(capsys, "checkpoint", "verify", "out/v1")


def test_a_tag_is_not_moved_and_no_folder_is_taken(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "checkpoint", "tag", str(run), "--name", "good")
    assert "already" in said(capsys, "checkpoint", "tag", str(run), "--name", "good")
    newest = str(run / "last.pt")
    assert "another checkpoint already" in said(capsys, "checkpoint", "tag", newest, "--name", "good", code=1)
    said(capsys, "checkpoint", "tag", "out/full_sft_16/last.pt", "--name", "good")
    assert {path.name for path in Path("out/good").glob("*.pt")} == {"pretrain_16.pt", "full_sft_16.pt"}
    for name, message in (("../up", "letters"), ("full_sft_16", "is not a tag"), ("x.previous", "letters")):
        assert message in said(capsys, "checkpoint", "tag", newest, "--name", name, code=1)
    assert "not a full checkpoint" in said(capsys, "checkpoint", "tag", "out/pretrain_16.pth", code=1)


def test_versions_of_runs_count_up(tmp_path: Path) -> None:
    config = tmp_path / "training_config.json"
    assert next_version(tmp_path) == 1
    config.write_text(json.dumps({"run_name": "ar-stories-512-v4"}))  # as the first release wrote it
    assert next_version(tmp_path) == 5
    config.write_text(json.dumps({"run_name": "my own name", "version": 6}))
    assert next_version(tmp_path) == 7


# --- compress ---


@pytest.mark.parametrize("method, ending", [("zstd", ".zst"), ("delta", ".delta")])
def test_a_compressed_checkpoint_is_read_and_comes_back_bit_for_bit(
    run: Path, method: str, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("out/full_sft_16/last.pt")
    before, content, date = path.read_bytes(), read_tensors(path), path.stat().st_mtime
    assert main(["checkpoint", "compress", str(path), "--method", method]) == 0
    packed = path.with_name(path.name + ending)
    assert not path.exists() and packed.stat().st_size < len(before)
    read = read_tensors(packed)["model_state_dict"]
    assert all(torch.equal(read[key], value) for key, value in content["model_state_dict"].items())
    assert open_checkpoint(str(packed)).step == 9
    entry = next(e for e in as_json(capsys, "checkpoint", "list", "--json") if e["path"] == str(packed))
    assert (entry["stage"], entry["step"], entry["kind"]) == ("full_sft", 9, ending[1:])
    said(capsys, "checkpoint", "verify", str(packed))
    assert main(["checkpoint", "restore", str(packed)]) == 0
    assert path.read_bytes() == before and not packed.exists() and path.stat().st_mtime == pytest.approx(date)
    assert said(capsys, "checkpoint", "verify", str(path)).startswith("ok")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_of_weights_that_moved_little_is_small(
    sound: SoundCheckpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    weights = {key: value.to(dtype) for key, value in sound.weights.items()}
    save_tensors(tmp_path / "parent.pth", weights)
    parent = {"path": str(tmp_path / "parent.pth"), "sha256": sha256(tmp_path / "parent.pth"), "stage": None, "step": 1}
    moved = {key: value * 1.01 for key, value in weights.items()}
    sizes = {}
    for method in ("zstd", "delta"):
        path = tmp_path / f"{method}.pt"
        save_tensors(path, {"model_state_dict": moved, "model_config": sound.config.to_dict(), "parent": parent})
        before = path.read_bytes()
        assert main(["checkpoint", "compress", str(path), "--method", method]) == 0
        packed = next(tmp_path.glob(f"{method}.pt.[zd]*[!6]"))
        sizes[method] = packed.stat().st_size
        assert main(["checkpoint", "restore", str(packed)]) == 0
        assert path.read_bytes() == before
    assert sizes["delta"] < 0.9 * sizes["zstd"]


def test_compressing_refuses_what_it_cannot_give_back(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = str(run / "best_model.pt")
    assert "names no parent" in said(capsys, "checkpoint", "compress", best, "--method", "delta", code=1)
    assert "not a full checkpoint" in said(capsys, "checkpoint", "compress", "out/pretrain_16.pth", code=1)
    assert "no compressed checkpoint" in said(capsys, "checkpoint", "restore", best, code=1)
    os.replace("out/pretrain_16.pth", "gone.pth")
    argv = ["checkpoint", "compress", "out/full_sft_16/last.pt", "--method", "delta"]
    assert "which is not there" in said(capsys, *argv, code=1)
    assert Path("out/full_sft_16/last.pt").exists() and not list(Path("out").rglob("*.delta*"))


# --- earlier shapes of the format ---


def first_release(sound: SoundCheckpoint) -> dict[str, Any]:
    """A version 1 checkpoint as the first release wrote it: an AR model, without family, adapter and averaged weights,
    and without the fields of the model's configuration and of the tokenizer that came later."""
    content = sound.content()
    later = {"family", "adapter", "ema_state_dict", "imported", "averaged"}
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "max_position_embeddings", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "causal",
        "use_moe", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "router_aux_loss_coef",
    )  # fmt: skip
    config = {name: content["model_config"][name] for name in names}
    progress = {key: value for key, value in content["progress"].items() if key != "best_metric"}
    tokenizer = {key: content["tokenizer"][key] for key in ("json", "chat_template", "fingerprint")}
    content |= {"model_config": config, "config": config, "progress": progress, "tokenizer": tokenizer}
    content["train_config"].pop("version", None)
    return {key: value for key, value in content.items() if key not in later}


def weights_only(sound: SoundCheckpoint) -> dict[str, Any]:
    return dict(sound.weights)


@pytest.mark.parametrize("shape", [first_release, weights_only])
def test_earlier_shapes_are_read(
    shape: Any, sound: SoundCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, path = shape(sound), tmp_path / "pretrain_16.pt"
    save_tensors(path, content)
    sound.tokenizer.save(tmp_path)
    opened = open_checkpoint(str(path))
    assert (opened.architecture, opened.stage) == ("ar", "pretrain")
    assert all(torch.equal(value, sound.weights[key]) for key, value in opened.model.state_dict().items())
    said(capsys, "checkpoint", "verify", str(path))
    if shape is first_release:
        check_full(content, path)
        assert TrainState.from_checkpoint(content).step == 3
