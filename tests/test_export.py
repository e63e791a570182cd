"""Exporting writes a whole folder or none, never over somebody else's; evaluate and generate use checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tiny import saved, tiny_config

from minillm.cli import main
from minillm.models.transformer import LanguageModel

CONFIG = tiny_config(vocab_size=6400, num_hidden_layers=1)


def save(path: Path, *, stage: str = "pretrain", architecture: str = "ar", seed: int = 0) -> Path:
    model = LanguageModel(CONFIG)
    model.init_weights(seed)
    return saved(path, model, stage=stage, architecture=architecture)


def export(checkpoint: Path, output: Path) -> int:
    return main(["export", "--checkpoint", str(checkpoint), "--output", str(output)])


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, output = save(tmp_path / "a.pt"), tmp_path / "thesis"
    output.mkdir()
    (output / "chapter1.txt").write_text("work of years")
    assert export(checkpoint, output) == 1
    assert "is not an earlier export" in capsys.readouterr().err
    assert [each.name for each in output.iterdir()] == ["chapter1.txt"]


def test_a_model_folder_of_another_program_is_left_alone(tmp_path: Path) -> None:
    checkpoint, output = save(tmp_path / "a.pt"), tmp_path / "downloaded"
    output.mkdir()
    (output / "model.safetensors").write_text("weights of others")
    (output / "config.json").write_text('{"model_type": "qwen3"}')
    assert export(checkpoint, output) == 1
    assert (output / "model.safetensors").read_text() == "weights of others"


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert export(save(tmp_path / "a.pt"), tmp_path / "out") == 1
    assert (tmp_path / "out").read_text() == "a file"


def test_an_earlier_export_and_an_empty_folder_are_replaced(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "hf"
    output.mkdir(parents=True)
    assert export(save(tmp_path / "a.pt", seed=0), output) == 0
    first = (output / "model.safetensors").read_bytes()
    (output / "stale.txt").write_text("old")
    assert export(save(tmp_path / "b.pt", seed=1), output) == 0
    assert (output / "model.safetensors").read_bytes() != first
    assert not (output / "stale.txt").exists()
    assert [each.name for each in output.parent.iterdir()] == ["hf"]  # nothing left beside


def test_a_failed_export_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "hf"
    assert export(save(tmp_path / "a.pt"), output) == 0
    before = {each.name: each.read_bytes() for each in output.iterdir()}
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    assert export(tmp_path / "broken.pt", output) == 1

    def full(self: object, folder: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("minillm.text.tokenizer.Tokenizer.save", full)
    with pytest.raises(OSError, match="disk full"):
        export(tmp_path / "a.pt", output)
    assert {each.name: each.read_bytes() for each in output.iterdir()} == before
    assert {each.name for each in tmp_path.iterdir()} == {"a.pt", "broken.pt", "hf"}


def test_an_export_is_a_checkpoint_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save(tmp_path / "a.pt")
    assert export(checkpoint, tmp_path / "hf") == 0
    texts = []
    for source in (checkpoint, tmp_path / "hf" / "model.safetensors"):
        capsys.readouterr()
        flags = ["--prompt", "Once", "--max_new_tokens", "6", "--temperature", "0"]
        assert main(["generate", "--checkpoint", str(source), *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].strip()


def test_generate_prints_only_the_completions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save(tmp_path / "a.pt")
    flags = ["--checkpoint", str(checkpoint), "--max-new-tokens", "5", "--temperature", "0"]
    singles = []
    for prompt in ("Mia", "The old mill stood by the river"):
        assert main(["generate", *flags, "--prompt", prompt]) == 0
        singles.append(capsys.readouterr().out)
    assert main(["generate", *flags, "--prompt", "Mia", "The old mill stood by the river"]) == 0
    assert capsys.readouterr().out == "".join(singles)
    assert all(text.endswith("\n") and text.strip() for text in singles)


def test_chat_checkpoints_get_the_template_and_raw_takes_it_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minillm.families.autoregressive import Autoregressive
    from minillm.text.tokenizer import Tokenizer

    prompts: list[str] = []

    def record(self: object, model: object, given: list[list[int]], sampling: object) -> list[list[int]]:
        prompts.append(Tokenizer.load().decode(given[0], skip_special=False))
        return [[]]

    monkeypatch.setattr(Autoregressive, "generate", record)
    checkpoint = ["generate", "--max_new_tokens", "3", "--checkpoint"]
    checkpoint.append(str(save(tmp_path / "model.pt", stage="full_sft")))
    assert main([*checkpoint, "--prompt", "Hi"]) == 0
    assert main([*checkpoint, "--prompt", "Hi", "--system", "Be kind"]) == 0
    assert main([*checkpoint, "--prompt", "Hi", "--raw"]) == 0
    plain = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [plain, "<|im_start|>system\nBe kind<|im_end|>\n" + plain, "Hi"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_new_tokens", "500"], "the model has 64 positions"),
        (["--prompt", "many words " * 80], "shorten the prompt"),
    ],
)
def test_a_prompt_that_does_not_fit_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["generate", "--checkpoint", str(save(tmp_path / "a.pt")), "--prompt", "Hi", *flags]) == 1
    assert message in capsys.readouterr().err


def test_an_empty_prompt_starts_a_text(tmp_path: Path) -> None:
    flags = ["--prompt", "", "--max_new_tokens", "2"]
    assert main(["generate", "--checkpoint", str(save(tmp_path / "a.pt")), *flags]) == 0


def test_the_same_seed_writes_the_same_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, texts = save(tmp_path / "a.pt"), []
    for seed in ("1", "1", "12345678901"):
        flags = ["--prompt", "Hi", "--max_new_tokens", "8", "--temperature", "1", "--top_p", "1", "--seed", seed]
        assert main(["generate", "--checkpoint", str(checkpoint), *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_evaluate_measures_a_random_model_as_random(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "text.jsonl"
    lines = [
        json.dumps({"text": f"Story {i}: the miller walked to the river and found {i} stones."}) for i in range(40)
    ]
    data.write_text("\n".join(lines), encoding="utf-8")
    results = []
    for seed, size in (("42", "4"), ("123456", "1")):
        flags = ["--data_path", str(data), "--max_seq_len", "32", "--seed", seed, "--batch_size", size]
        output = tmp_path / f"{seed}.json"
        flags += ["--output", str(output)]
        assert main(["evaluate", "--checkpoint", str(save(tmp_path / "a.pt")), *flags]) == 0
        results.append(json.loads(output.read_text())["models"][0])
    accuracy = results[0]["accuracy"]["accuracy"]
    first, second = (result["perplexity"] for result in results)
    assert first["loss"] == pytest.approx(math.log(6400), rel=0.03)
    assert first["perplexity"] == pytest.approx(math.exp(first["loss"]))
    assert first["likelihood"] == "exact" and 0 <= accuracy < 0.1
    # all rows are read, so their order and batching change nothing
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5) and second["tokens"] == first["tokens"]
    assert "bits per byte" in capsys.readouterr().out


def test_evaluate_reads_conversations_for_chat_checkpoints(tmp_path: Path) -> None:
    data = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}]
    data.write_text("\n".join(json.dumps({"conversations": turns}) for _ in range(3)))
    checkpoint = save(tmp_path / "a.pt", stage="rlhf")
    flags = ["--data_path", str(data), "--max_seq_len", "64", "--output", str(tmp_path / "out.json")]
    assert main(["evaluate", "--checkpoint", str(checkpoint), *flags]) == 0
    (found,) = json.loads((tmp_path / "out.json").read_text())["models"]
    assert found["data"]["stage"] == "sft"
    assert found["perplexity"]["loss"] == pytest.approx(math.log(6400), rel=0.05)


def test_flags_that_contradict_each_other_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt", "Hi", "--threshold", "0.9", "--remask", "0.1"]
    assert main(["generate", "--checkpoint", str(save(tmp_path / "a.pt")), *flags]) == 1
    assert "--threshold" in capsys.readouterr().err
