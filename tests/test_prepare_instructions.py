"""minillm data prepare-instructions: any form in, one folder out, which fine-tuning reads as it is."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillm.cli import main
from minillm.data import hub
from minillm.data.files import Row
from minillm.data.instructions import PrepareInstructionsSettings, run
from minillm.log import UserError
from minillm.text.chat import CLASSIC_TEMPLATE, encode_chat, encode_chats
from minillm.text.tokenizer import Tokenizer

ROWS = [
    {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 21)
]
WITH_INPUT = {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}
TRAIN_FLAGS = shlex.split(
    "--hidden_size 16 --num_hidden_layers 1 --max_seq_len 64 --batch_size 2 --max_steps 2 --eval_every 2 --no_wandb "
    "--device cpu"
)
QUESTION = "Add the numbers.\n2 and 3"


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(folder: Path, rows: list[dict], **settings: object) -> Path:
    source = write(folder / "rows.jsonl", rows)
    values = {"max_seq_len": 64, "val_fraction": 0.2, **settings}
    run(PrepareInstructionsSettings(input=str(source), output_dir=str(folder / "out"), **values))  # type: ignore[arg-type]
    return folder / "out"


def load(folder: Path, side: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    tokens, masks = (torch.load(folder / f"{side}_{what}.pt", weights_only=True) for what in ("tokens", "masks"))
    return tokens, masks


def text_of(folder: Path, row: int, *, trained: bool = False, side: str = "train") -> str:
    tokenizer = Tokenizer.load(folder)
    tokens, masks = load(folder, side)
    chosen = tokens[row][masks[row] == 1] if trained else tokens[row][tokens[row] != tokenizer.pad_id]
    return tokenizer.decode(chosen.tolist(), skip_special=False)


def test_tensors_hold_one_padded_example_a_row_and_the_answer_with_its_end_is_trained(tmp_path: Path) -> None:
    folder = prepare(tmp_path, ROWS[:3], val_fraction=0.0)
    tokens, masks = load(folder)
    assert tokens.shape == masks.shape == (3, 64) and (tokens.dtype, masks.dtype) == (torch.int64, torch.uint8)
    assert text_of(folder, 2) == "<|im_start|>user\nCount to 3.<|im_end|>\n<|im_start|>assistant\n1 2 3<|im_end|>\n"
    assert text_of(folder, 2, trained=True) == "1 2 3<|im_end|>"
    assert int(masks[tokens == Tokenizer.load(folder).pad_id].sum()) == 0


def test_the_classic_template_has_an_input_block_only_where_there_is_an_input(tmp_path: Path) -> None:
    folder = prepare(tmp_path, [WITH_INPUT, ROWS[0]], template="classic", val_fraction=0.0)
    assert text_of(folder, 0) == (
        "### Instruction:\nAdd the numbers.\n\n### Input:\n2 and 3\n\n### Response:\n5<|endoftext|>"
    )
    assert text_of(folder, 1) == "### Instruction:\nCount to 1.\n\n### Response:\n1<|endoftext|>"
    assert [text_of(folder, row, trained=True) for row in (0, 1)] == ["5<|endoftext|>", "1<|endoftext|>"]


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("alpaca", WITH_INPUT),
        ("dolly", {"instruction": "Add the numbers.", "context": "2 and 3", "response": "5", "category": "qa"}),
        ("sharegpt", {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "5"}]}),
        ("messages", {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "5"}]}),
    ],
)  # fmt: skip
def test_every_form_gives_the_same_example_named_or_recognised(tmp_path: Path, form: str, row: dict) -> None:
    expected = "<|im_start|>user\nAdd the numbers.\n2 and 3<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
    for name in (form, "auto"):
        (tmp_path / name).mkdir()
        assert text_of(prepare(tmp_path / name, [row], format=name, val_fraction=0.0), 0) == expected


def test_rows_of_another_form_or_too_long_are_counted_with_their_place(tmp_path: Path) -> None:
    long = {"instruction": "word " * 200, "input": "", "output": "no"}
    other = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    folder = prepare(
        tmp_path, [ROWS[0], long, other, {"instruction": "x", "output": ""}], format="alpaca", val_fraction=0
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["train"]["examples"] == 1 and config["rows"]["used"] == 1
    assert config["rows"]["unusable"] == {
        "empty output": 1, "first exchange longer than max_seq_len": 1, "not in the form alpaca: no instruction": 1,
    }  # fmt: skip


def test_a_question_is_trained_or_held_out_but_never_both(tmp_path: Path) -> None:
    folder = prepare(tmp_path, ROWS + [{**row, "output": "again"} for row in ROWS], val_fraction=0.3)
    questions = [
        {
            json.loads(line)["conversations"][0]["content"]
            for line in (folder / f"{side}.jsonl").read_text().splitlines()
        }
        for side in ("train", "val")
    ]
    assert all(questions) and not questions[0] & questions[1] and len(questions[0] | questions[1]) == len(ROWS)


def test_the_same_again_does_nothing_and_other_settings_replace_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = prepare(tmp_path, ROWS)
    before = (folder / "train_tokens.pt").stat().st_mtime_ns
    prepare(tmp_path, ROWS)
    assert (folder / "train_tokens.pt").stat().st_mtime_ns == before and "nothing to do" in capsys.readouterr().err
    prepare(tmp_path, ROWS, max_seq_len=32)
    assert load(folder)[0].shape[1] == 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_nothing_else_is_replaced_and_bad_input_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="was not made by"):
        prepare(tmp_path, ROWS)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    (tmp_path / "good").mkdir()
    folder = prepare(tmp_path / "good", ROWS)
    with pytest.raises(UserError, match="no usable row among 1"):
        prepare(tmp_path / "good", [{"nothing": 1}])
    assert load(folder)[0].shape[0] > 1 and len(list((tmp_path / "good").iterdir())) == 2


def test_what_cannot_be_put_in_place_leaves_the_earlier_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(tmp_path, ROWS)
    replace = os.replace

    def refused(source: Path, target: Path) -> None:
        if Path(source).name.endswith(".building"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(UserError, match="No space left"):
        prepare(tmp_path, ROWS, max_seq_len=32)
    assert load(folder)[0].shape[1] == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


@pytest.mark.parametrize("template", ["chatml", "classic"])
def test_fine_tuning_takes_data_validation_and_tokenizer_from_the_folder(tmp_path: Path, template: str) -> None:
    folder = prepare(tmp_path, ROWS, template=template)
    assert main(["finetune", "--data_dir", str(folder), "--out_dir", str(tmp_path / "run"), *TRAIN_FLAGS]) == 0
    run_folder = tmp_path / "run" / "full_sft_16"
    config = json.loads((run_folder / "training_config.json").read_text())
    assert config["data_path"] == str(folder / "train.jsonl")
    assert Tokenizer.load(run_folder).chat_template == Tokenizer.load(folder).chat_template
    assert (run_folder / "best_model.pt").is_file()
    held_out = tmp_path / "evaluation.json"
    flags = ["--data_dir", str(folder), "--max_seq_len", "64", "--output", str(held_out)]
    assert main(["evaluate", "--checkpoint", str(run_folder / "best_model.pt"), *flags]) == 0
    examples = json.loads((folder / "config.json").read_text())["val"]
    found = json.loads(held_out.read_text())["models"][0]["perplexity"]["tokens"]
    assert found == examples["trained_tokens"]


def test_a_folder_prepared_with_another_tokenizer_than_the_checkpoints_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = prepare(tmp_path, ROWS)
    assert main(["sft", "--data_dir", str(folder), "--out_dir", str(tmp_path / "run"), *TRAIN_FLAGS]) == 0
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["truncation"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    flags = ["--pretrained_checkpoint", str(tmp_path / "run/full_sft_16.pth"), "--out_dir", str(tmp_path / "again")]
    assert main(["sft", "--data_dir", str(folder), *flags, *TRAIN_FLAGS]) == 1
    assert "prepared with another tokenizer" in capsys.readouterr().err


def test_a_hub_dataset_is_read_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def rows(name: str, *, split: str) -> list[Row]:
        asked.append((name, split))
        return [Row(row, name, number) for number, row in enumerate(ROWS, 1)]

    monkeypatch.setattr(hub, "hub_rows", rows)
    settings = PrepareInstructionsSettings(input="someone/counting", output_dir=str(tmp_path / "out"), split="test")
    run(replace(settings, val_fraction=0.0))
    assert asked == [("someone/counting", "test")] and load(tmp_path / "out")[0].shape == (20, 512)


def test_an_unreachable_hub_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="someone/counting.*no route to host.*local file"):
        run(PrepareInstructionsSettings(input="someone/counting", output_dir=str(tmp_path / "out")))


def test_generation_sees_a_prompt_just_as_training_did() -> None:
    tokenizer = Tokenizer(Tokenizer.load().json_text, CLASSIC_TEMPLATE)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two <|endoftext|>?"}, {"role": "assistant", "content": " 2 "},
    ]  # fmt: skip
    ids, mask = encode_chat(tokenizer, messages)
    prompt, _ = encode_chat(tokenizer, messages[:-1], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt and not any(encode_chat(tokenizer, messages[:2])[1])
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m], skip_special=False) == "1<|endoftext|>2<|endoftext|>"
    assert encode_chats(tokenizer, [messages, messages[:3]])[0] == [ids, encode_chat(tokenizer, messages[:3])[0]]
    assert "<|endoftext |>" in tokenizer.decode(ids)  # nobody forges an end
