"""The classic mistakes of fine-tuning data are found before step 1, with file and line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minillm.cli import main
from minillm.data.batches import PackedConversations, open_dataset, train_validation_split
from minillm.data.checks import check_first_rows
from minillm.log import UserError
from minillm.text.chat import CLASSIC_TEMPLATE
from minillm.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load()


def conversation(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


GOOD = [conversation(f"What comes after {n}?", f"The number {n + 1}.") for n in range(6)]


def opened(
    folder: Path, rows: list[dict], *, tokenizer: Tokenizer = TOKENIZER, max_seq_len: int = 64
) -> PackedConversations:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = open_dataset("sft", path, tokenizer, max_seq_len=max_seq_len)
    assert isinstance(dataset, PackedConversations)
    return dataset


def with_mask(dataset: PackedConversations, change: object) -> PackedConversations:
    """The same rows as if another template or masking had been at work."""
    mask = np.array(dataset.store.mask)
    change(mask, dataset.store)  # type: ignore[operator]
    dataset.store = replace(dataset.store, mask=mask)
    return dataset


def forget_ends(mask: np.ndarray, store: object) -> None:
    mask[np.asarray(store.tokens) == TOKENIZER.end_of_turn_id] = 0  # type: ignore[attr-defined]


def train_all(mask: np.ndarray, store: object) -> None:
    mask[:] = 1


def train_none(mask: np.ndarray, store: object) -> None:
    mask[:] = 0


def test_good_data_have_nothing_to_say(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert check_first_rows(opened(tmp_path, GOOD), TOKENIZER, seed=1) == []
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        (train_none, "no trained token"),
        (forget_ends, "the end of an answer is never trained"),
        (train_all, "the prompt is trained, too"),
    ],
)
def test_what_would_waste_the_run_ends_it_with_file_and_line(tmp_path: Path, change: object, mistake: str) -> None:
    with pytest.raises(UserError, match=rf"{mistake} in 6 of the first 6 examples \(.*rows\.jsonl:\d, "):
        check_first_rows(with_mask(opened(tmp_path, GOOD), change), TOKENIZER, seed=1)


def test_what_only_some_rows_have_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rendered = conversation("### Instruction:\nSay hello.\n\n### Response:", "Hello.")
    found = check_first_rows(opened(tmp_path, [*GOOD, rendered]), TOKENIZER, seed=1)
    assert [(finding.mistake, len(finding.places)) for finding in found] == [("marks of another chat template", 1)]
    error = capsys.readouterr().err
    assert "rows.jsonl:7" in error and "1 of the first 7" in error


def test_a_template_without_an_end_of_answers_ends_the_run_and_the_classic_one_is_fine(tmp_path: Path) -> None:
    endless = Tokenizer(TOKENIZER.json_text, "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}")
    with pytest.raises(UserError, match="the end of an answer is never trained"):
        check_first_rows(opened(tmp_path, GOOD, tokenizer=endless), endless, seed=1)
    classic = Tokenizer(TOKENIZER.json_text, CLASSIC_TEMPLATE)
    assert check_first_rows(opened(tmp_path, GOOD, tokenizer=classic), classic, seed=1) == []


@pytest.mark.parametrize("text", ["<|im_start|>user\nHi<|im_end|>", "[INST] Hi [/INST]", "Human: hi\nAssistant: yes"])
def test_text_that_was_already_rendered_is_recognised(tmp_path: Path, text: str) -> None:
    found = check_first_rows(opened(tmp_path, [*GOOD, conversation(text, "Hello.")]), TOKENIZER, seed=1)
    assert [finding.mistake for finding in found] == ["marks of another chat template"]


def test_an_answer_cut_at_the_length_is_told(tmp_path: Path) -> None:
    messages = GOOD[0]["messages"] + conversation("And then?", "very " * 60)["messages"]
    found = check_first_rows(opened(tmp_path, [*GOOD, {"messages": messages}]), TOKENIZER, seed=1)
    assert [finding.mistake for finding in found] == ["an answer that does not fit into max_seq_len"]


def test_padding_that_ends_a_text_is_refused(tmp_path: Path) -> None:
    dataset = opened(tmp_path, GOOD)
    wrong = Tokenizer.load()
    wrong.pad_id = wrong.end_of_text_id
    with pytest.raises(UserError, match="padding is also what ends"):
        check_first_rows(dataset, wrong, seed=1)


def test_rows_held_out_of_the_data_are_checked_as_well_and_texts_are_left_alone(tmp_path: Path) -> None:
    train, _ = train_validation_split(with_mask(opened(tmp_path, GOOD * 20, max_seq_len=32), train_all), seed=3)
    with pytest.raises(UserError, match="the prompt is trained"):
        check_first_rows(train, TOKENIZER, seed=1)
    (tmp_path / "text.jsonl").write_text('{"text": "once"}\n')
    assert (
        check_first_rows(open_dataset("pretrain", tmp_path / "text.jsonl", TOKENIZER, max_seq_len=8), TOKENIZER, seed=1)
        == []
    )


def test_pairs_are_checked_too(tmp_path: Path) -> None:
    rows = [{"prompt": f"Hi {n}", "chosen": "[INST] good [/INST]", "rejected": "bad"} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = check_first_rows(
        open_dataset("dpo", tmp_path / "pairs.jsonl", TOKENIZER, max_seq_len=64), TOKENIZER, seed=1
    )
    assert [(finding.mistake, finding.checked) for finding in found] == [("marks of another chat template", 8)]


def test_training_says_it_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    opened(tmp_path, [*GOOD, conversation("[INST] Hi [/INST]", "Hello.")])
    flags = (
        "--hidden_size 16 --num_hidden_layers 1 --max_seq_len 64 --batch_size 2 --max_steps 1 --no_wandb --device cpu"
    )
    assert (
        main(["sft", "--data_path", str(tmp_path / "rows.jsonl"), "--out_dir", str(tmp_path / "out"), *flags.split()])
        == 0
    )
    error = capsys.readouterr().err
    assert error.index("marks of another chat template") < error.index("before training")
