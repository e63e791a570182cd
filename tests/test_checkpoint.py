"""Checkpoint files can be trusted: atomic, hashed, refused when damaged, unsafe or of another model."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path
from typing import IO

import pytest
import torch

from minillm.atomic import write_text
from minillm.checkpoint import CheckpointLoader
from minillm.checkpoint.background import BackgroundWriter
from minillm.checkpoint.files import hash_file, read_tensors, save_tensors, validate_weights, verify_hash
from minillm.checkpoint.loader import config_of, infer_model_config
from minillm.log import UserError
from minillm.models.config import ModelConfig, ModelSettings, build_model_config
from minillm.models.transformer import LanguageModel


def tiny(use_moe: bool = False, **sizes: int) -> ModelConfig:
    settings = ModelSettings(hidden_size=32, num_hidden_layers=2, use_moe=use_moe, num_experts=4)
    config = build_model_config(settings, vocab_size=50, max_seq_len=64, causal=True)
    return ModelConfig.from_dict({**config.to_dict(), **sizes})


def model(config: ModelConfig | None = None, seed: int = 0) -> LanguageModel:
    made = LanguageModel(config or tiny())
    made.init_weights(seed)
    return made


def test_a_saved_file_verifies_with_sha256sum(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.pth", model().state_dict(), also=(tmp_path / "b.pth",))
    done = subprocess.run(["sha256sum", "-c", "a.pth.sha256", "b.pth.sha256"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0
    assert not list(tmp_path.glob(".*"))


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    save_tensors(path, model().state_dict())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="SHA-256"):
        read_tensors(path)


@pytest.mark.parametrize("renamed", [False, True])
def test_between_rename_and_hash_both_old_and_new_content_verify(tmp_path: Path, renamed: bool) -> None:
    path, new = tmp_path / "a.pth", tmp_path / "new.pth"
    save_tensors(path, {"x": torch.zeros(2)})
    save_tensors(new, {"x": torch.ones(2)})
    both = hash_file(new).read_text().replace("new.pth", "a.pth") + hash_file(path).read_text()
    write_text(hash_file(path), both)  # what stands there while the rename is under way
    if renamed:
        os.replace(new, path)
    assert verify_hash(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pth"
    save_tensors(path, {"x": torch.zeros(2)})

    def full(content: object, target: IO[bytes]) -> None:
        target.write(b"half")
        raise RuntimeError("write failed: no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        save_tensors(path, {"x": torch.ones(2)})
    monkeypatch.undo()
    assert torch.equal(read_tensors(path)["x"], torch.zeros(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "a.pth.sha256"]


def test_a_failed_background_save_is_told_and_only_the_last_one_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise OSError("no space left on device")

    writer = BackgroundWriter()
    writer.submit(fail)
    writer.submit(lambda: None)
    assert "training goes on" in capsys.readouterr().err
    writer.finish()
    writer.submit(fail)
    with pytest.raises(UserError, match="free some disk space"):
        writer.finish()


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/minillm_was_here",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"model": Evil()}, path)
    with pytest.raises(UserError, match="execute code"):
        read_tensors(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError):
        read_tensors(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut"])
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="bad.pth"):
        read_tensors(path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        read_tensors(tmp_path / "absent.pth")


def test_validation_names_the_tensor_that_is_wrong(tmp_path: Path) -> None:
    config = tiny()
    good = model(config).state_dict()
    path = tmp_path / "w.pth"
    save_tensors(path, good)
    validate_weights(path, config)
    for change, message in (
        ({"model.norm.weight": torch.full((32,), float("nan"))}, "model.norm.weight has NaN"),
        ({"model.norm.weight": torch.ones(16)}, r"model.norm.weight is \(16,\), expected \(32,\)"),
        ({"extra": torch.ones(1)}, "unexpected extra"),
    ):
        save_tensors(path, {**good, **change})
        with pytest.raises(UserError, match=message):
            validate_weights(path, config)
    save_tensors(path, {key: value for key, value in good.items() if key != "model.norm.weight"})
    with pytest.raises(UserError, match="missing model.norm.weight"):
        validate_weights(path, config)


@pytest.mark.parametrize("wrap", ["bare", "full", "module", "compiled", "tied"])
def test_the_loader_reads_bare_and_full_and_wrapped_weights(tmp_path: Path, wrap: str) -> None:
    source, target = model(seed=1), model(seed=2)
    weights = source.state_dict()
    content: dict[str, object] = {
        "bare": weights,
        "full": {"model_state_dict": weights, "global_step": 3},
        "module": {f"module.{key}": value for key, value in weights.items()},
        "compiled": {f"_orig_mod.{key}": value for key, value in weights.items()},
        "tied": {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]},
    }[wrap]
    torch.save(content, tmp_path / "w.pth")
    assert CheckpointLoader.load_checkpoint(target, str(tmp_path / "w.pth"), "cpu", strict=True) is True
    for key, value in target.state_dict().items():
        assert torch.equal(value, weights[key])


def test_the_loader_reports_what_does_not_match_and_refuses_too_little(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = dict(model().state_dict())
    del weights["model.norm.weight"]
    torch.save(weights, tmp_path / "w.pth")
    assert CheckpointLoader.load_checkpoint(model(), str(tmp_path / "w.pth"))
    assert "missing: model.norm.weight" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not fit"):
        CheckpointLoader.load_checkpoint(model(), str(tmp_path / "w.pth"), strict=True)
    wide = LanguageModel(tiny(intermediate_size=256))
    with pytest.raises(UserError, match="of the parameters matched"):
        CheckpointLoader.load_checkpoint(wide, str(tmp_path / "w.pth"))
    assert "shape of model.layers.0.mlp.gate_proj.weight" in capsys.readouterr().err


@pytest.mark.parametrize("use_moe", [False, True])
def test_sizes_are_inferred_from_shapes(use_moe: bool, tmp_path: Path) -> None:
    config = tiny(use_moe)
    weights = model(config).state_dict()
    inferred = infer_model_config(weights).to_dict()
    unknowable = {"max_position_embeddings"} | (
        {"intermediate_size"} if use_moe else {"moe_intermediate_size", "num_experts"}
    )
    for name, value in config.to_dict().items():
        assert name in unknowable or inferred[name] == value, name
    assert config_of({"model_config": config.to_dict()}, tmp_path / "x.pt") == config
    with pytest.raises(UserError, match="key names"):
        infer_model_config({"h.0.attn.weight": torch.ones(2)})


class TestFinding:
    def touch(self, path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        return str(path)

    def test_names_follow_the_convention(self, tmp_path: Path) -> None:
        for stage, name in (("sft", "full_sft_512_moe.pth"), ("dpo", "rlhf_512_moe.pth")):
            path, exists = CheckpointLoader.get_checkpoint_path(stage, 512, True, local_dir=str(tmp_path))
            assert path == str(tmp_path / name) and not exists
        path, _ = CheckpointLoader.get_checkpoint_path("pretrain", 64, False, "remote")
        assert path == "/openbayes/home/out/pretrain_64.pth"

    def test_explicit_beats_environment_beats_remote_beats_local(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        local, remote = str(tmp_path / "local"), str(tmp_path / "remote")

        def resolve(explicit: str | None = None) -> str | None:
            return CheckpointLoader.resolve_checkpoint_path(explicit, "pretrain", 64, False, "SOME_PATH", local, remote)

        monkeypatch.delenv("SOME_PATH", raising=False)
        assert resolve() is None
        in_local = self.touch(tmp_path / "local" / "pretrain_64.pth")
        assert resolve() == in_local
        in_remote = self.touch(tmp_path / "remote" / "pretrain_64.pth")
        assert resolve() == in_remote
        in_env = self.touch(tmp_path / "env.pth")
        monkeypatch.setenv("SOME_PATH", in_env)
        assert resolve() == in_env
        assert resolve(in_local) == in_local
        tried = capsys.readouterr().err
        assert "not found" in tried and "using SOME_PATH" in tried and "using the given path" in tried
        with pytest.raises(UserError, match="does not exist"):
            resolve(str(tmp_path / "no.pth"))
        monkeypatch.setenv("SOME_PATH", str(tmp_path / "no.pth"))
        assert resolve() == in_remote

    def test_a_stage_falls_back_to_the_one_before(self, tmp_path: Path) -> None:
        pretrained = self.touch(tmp_path / "pretrain_64.pth")
        for stage in ("rlhf", "dpo", "sft"):
            found = CheckpointLoader.resolve_checkpoint_path(
                None, stage, 64, False, "", str(tmp_path), str(tmp_path / "none")
            )
            assert found == pretrained
        tuned = self.touch(tmp_path / "full_sft_64.pth")
        assert CheckpointLoader.resolve_checkpoint_path(None, "dpo", 64, False, "", str(tmp_path), "/none") == tuned
