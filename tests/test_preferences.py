"""Pairs, labelled answers, prompts with answers: every accepted form is understood, and what a method reads of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minillm.data.batches import open_dataset
from minillm.data.feedback import CheckablePrompts, LabelledAnswers, open_feedback
from minillm.data.files import RowReport
from minillm.data.formats import stage_of
from minillm.data.inspect import InspectSettings
from minillm.data.inspect import run as inspect
from minillm.data.preferences import final_answer, read_labelled, read_pairs, read_prompts
from minillm.data.stats import StatsSettings, detect_stage
from minillm.data.stats import run as stats
from minillm.log import UserError
from minillm.text.chat import CHAT_TEMPLATE, CLASSIC_TEMPLATE
from minillm.text.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
QUESTION = {"role": "user", "content": "Two and two?"}
OTHER = {"role": "user", "content": "Two and three?"}
ANSWER = {"role": "assistant", "content": "Four."}
WRONG = {"role": "assistant", "content": "Five."}
SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]
PAIR = {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, WRONG]}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def reasons(read: Callable, path: Path, usable: dict, row: dict) -> dict[str, int]:
    report = RowReport()
    assert len(list(read(write(path, usable, row), report))) == report.used == 1
    assert next(iter(report.places.values())) == [f"{path}:2"]
    return report.counts()


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five."},
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [WRONG]},
        {"prompt": [QUESTION], "chosen": ANSWER, "rejected": "Five."},
        {"prompt": "Two and two?", **PAIR},
        {"chosen": "Two and two? Four.", "rejected": "Two and two? Five."},
        {
            "chosen": "\n\nHuman: Two and two?\n\nAssistant: Four.",
            "rejected": "Human: Two and two?\n\nAssistant: Five.",
        },
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "Five."}},
        {"messages": [QUESTION], "prompt": None, "chosen": [ANSWER], "rejected": [WRONG]},
        {"instruction": "Two and two?", "input": "", "chosen": "Four.", "rejected": "Five."},
    ],
)
def test_every_pair_form_gives_the_same_pair(tmp_path: Path, row: dict) -> None:
    (pair,) = read_pairs(write(tmp_path / "a.jsonl", row), RowReport())
    assert (pair.chosen, pair.rejected) == ([QUESTION, ANSWER], [QUESTION, WRONG])
    assert stage_of(row) == "dpo"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is blueish.", "The sky is"),  # not cut inside a word
        ("2 + 2? 14", "2 + 2? 15", "2 + 2?"),
        ("天空是蓝的", "天空是绿的", "天空是"),
        ("Name a colour:\nblue", "Name a colour:\ngreen", "Name a colour:"),
    ],
)
def test_what_two_texts_have_in_common_is_the_prompt(tmp_path: Path, chosen: str, rejected: str, prompt: str) -> None:
    (pair,) = read_pairs(write(tmp_path / "a.jsonl", {"chosen": chosen, "rejected": rejected}), RowReport())
    assert pair.chosen[0] == pair.rejected[0] == {"role": "user", "content": prompt}
    assert pair.chosen[1]["content"] == chosen.removeprefix(prompt).strip()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [QUESTION, ANSWER]}, "no chosen and rejected fields"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are identical"),
        ({"chosen": "the same", "rejected": "the same"}, "chosen and rejected are identical"),
        ({"chosen": "b", "rejected": "c"}, "no prompt for chosen"),
        ({"chosen": [ANSWER], "rejected": [WRONG]}, "no prompt for chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "empty rejected"),
        ({"chosen": "Two and two?", "rejected": "Two and two? Five."}, "empty chosen"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen is not a list of turns"),
        (
            {"chosen": [QUESTION, ANSWER], "rejected": [OTHER, ANSWER]},
            "chosen and rejected answer different prompts",
        ),
        (
            {"chosen": [QUESTION, ANSWER, QUESTION, ANSWER], "rejected": [QUESTION, ANSWER, OTHER, WRONG]},
            "chosen and rejected answer different prompts",
        ),
        (
            {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER, QUESTION, WRONG]},
            "chosen is only the beginning of the other side",
        ),
        ({"chosen": [QUESTION, ANSWER], "rejected": [QUESTION]}, "rejected: no assistant turn"),
        (
            {"chosen": [QUESTION, ANSWER, QUESTION], "rejected": [QUESTION, WRONG]},
            "chosen: last turn is not the assistant's",
        ),
    ],
)  # fmt: skip
def test_an_unusable_pair_is_counted_with_its_reason(tmp_path: Path, row: dict, reason: str) -> None:
    assert reasons(read_pairs, tmp_path / "a.jsonl", PAIR, row) == {reason: 1}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Two and two?", "completion": "Four.", "label": True},
        {"prompt": [QUESTION], "completion": [ANSWER], "label": True},
        {"messages": [QUESTION, ANSWER], "label": True},
        {"conversations": SHAREGPT, "kto_tag": True},
        {"instruction": "Two and two?", "input": "", "output": "Four.", "kto_tag": True},
    ],
)
def test_every_labelled_form_gives_the_same_row(tmp_path: Path, row: dict) -> None:
    unwanted = {name: False if value is True else value for name, value in row.items()}
    rows = list(read_labelled(write(tmp_path / "a.jsonl", row, unwanted), RowReport()))
    assert [each.messages for each in rows] == [[QUESTION, ANSWER]] * 2
    assert [(each.label, each.line) for each in rows] == [(True, 1), (False, 2)]
    assert stage_of(row) == "kto"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [QUESTION, ANSWER]}, "no label"),
        ({"messages": [QUESTION, ANSWER], "label": "good"}, "label is neither true nor false"),
        ({"messages": [QUESTION, ANSWER], "kto_tag": 1}, "label is neither true nor false"),
        ({"messages": [QUESTION], "label": True}, "no assistant turn"),
        ({"prompt": "a", "completion": "", "label": False}, "empty response"),
        ({**PAIR, "label": True}, "a preference pair, not a conversation"),
    ],
)
def test_an_unusable_label_is_counted_with_its_reason(tmp_path: Path, row: dict, reason: str) -> None:
    assert reasons(read_labelled, tmp_path / "a.jsonl", {"messages": [QUESTION, ANSWER], "label": True}, row) == {
        reason: 1
    }


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        {"prompt": "Two and two?", "answer": "4"},
        {"prompt": [QUESTION], "ground_truth": " 4\n"},
        {"prompt": [QUESTION], "solution": "#### 4", "answer": None},
        {"prompt": "Two and two?", "answer": 4, "solution": "by counting"},
    ],
)
def test_every_prompt_form_gives_the_same_prompt_and_answer(tmp_path: Path, row: dict) -> None:
    path = write(tmp_path / "a.jsonl", row, {**row, "system": "Be brief."})
    plain, with_system = read_prompts(path, RowReport())
    assert (plain.messages, plain.answer, plain.line) == ([QUESTION], "4", 1)
    assert with_system.messages == [SYSTEM, QUESTION]
    assert stage_of(row) == "rl"


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("so many\n#### 1,234,567", "1234567"), ("#### 5 #### -1,200.50", "-1200.50"), ("$70,000", "$70000"),
        ("3,14", "3,14"), ("1,2,300", "1,2,300"), ("12,345,6", "12,345,6"), ("0.123,456", "0.123,456"),
        ("1,000 km, or 2,000", "1000 km, or 2000"), ("Paris", "Paris"), (0.5, "0.5"),
    ],
)  # fmt: skip
def test_the_final_answer_is_found_and_numbers_are_written_without_separators(written: object, answer: str) -> None:
    assert final_answer(written) == answer


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a story"}, "no prompt or question"),
        ({"prompt": "a"}, "no answer, ground_truth or solution"),
        ({"question": " ", "answer": "4"}, "empty question"),
        ({"question": "a", "answer": "steps\n#### "}, "no answer after ####"),
        ({"question": "a", "answer": "one\ntwo"}, "the answer has several lines: it cannot be checked"),
        ({"question": "a", "answer": True}, "answer is not a string"),
        ({"prompt": [QUESTION, ANSWER], "answer": "4"}, "the prompt already ends with an answer"),
        ({"prompt": [ANSWER, QUESTION], "answer": "4"}, "first turn is assistant, not user"),
        ({"prompt": [], "answer": "4"}, "no user turn"),
    ],
)
def test_an_unusable_prompt_is_counted_with_its_reason(tmp_path: Path, row: dict, reason: str) -> None:
    assert reasons(read_prompts, tmp_path / "a.jsonl", {"question": "a", "answer": "4"}, row) == {reason: 1}


@pytest.mark.parametrize("read", [read_pairs, read_labelled, read_prompts])
def test_no_usable_row_shows_the_first_rows_the_forms_and_what_they_look_like(tmp_path: Path, read: Callable) -> None:
    path = write(tmp_path / "a.jsonl", *[{"messages": [QUESTION, ANSWER], "id": n} for n in range(4)])
    with pytest.raises(UserError) as error:
        list(read(path, RowReport()))
    message = str(error.value)
    assert message.count("Two and two?") == 3 and "Expected is one of:" in message and f"{path}:1" in message
    assert "These rows look like data for `minillm sft`." in message


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CLASSIC_TEMPLATE])
def test_only_the_last_answer_of_a_labelled_row_is_trained(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer(Tokenizer.load().json_text, template)
    rows = [
        {"messages": [SYSTEM, QUESTION, WRONG, QUESTION, ANSWER], "label": True},
        {"messages": [QUESTION, WRONG], "label": False},
    ]
    dataset = open_feedback("labels", write(tmp_path / "a.jsonl", *rows), tokenizer, max_seq_len=128, hide_padding=True)
    assert isinstance(dataset, LabelledAnswers) and "1 true, 1 false" in dataset.describe()
    batch = dataset.rows(np.array([1, 0]))
    answers = batch.answers
    trained = [tokenizer.decode(row[mask].tolist()) for row, mask in zip(answers.tokens, answers.loss_mask)]
    assert trained == ["Five.", "Four."] and batch.labels.tolist() == [False, True]
    assert batch.sample_ids.tolist() == [1, 0] and answers.tokens.shape[1] % 16 == 0
    assert answers.segments is not None
    assert ((answers.segments == -1) == (answers.tokens == tokenizer.pad_id)).all()


def test_a_long_answer_is_cut_and_what_leaves_no_room_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "word " * 100
    rows = [{"prompt": "Hi", "completion": long, "label": True}, {"prompt": long, "completion": "Yes.", "label": False}]
    dataset = open_feedback("labels", write(tmp_path / "a.jsonl", *rows), Tokenizer.load(), max_seq_len=64)
    assert isinstance(dataset, LabelledAnswers) and (len(dataset), dataset.truncated) == (1, 1)
    assert dataset.rows(np.array([0])).answers.tokens.shape == (1, 64)
    assert "1 x prompt leaves no room" in capsys.readouterr().err and dataset.report.used == 1
    prompts = write(tmp_path / "b.jsonl", {"question": long, "answer": "4"}, {"question": "2 + 2?", "answer": "4"})
    dataset = open_feedback("prompts", prompts, Tokenizer.load(), max_seq_len=64)
    assert len(dataset) == 1 and "b.jsonl:1" in capsys.readouterr().err
    with pytest.raises(UserError, match="no row fits into max_seq_len 8"):
        open_feedback("prompts", prompts, Tokenizer.load(), max_seq_len=8)


def test_prompts_end_where_an_answer_begins(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load()
    path = write(
        tmp_path / "a.jsonl", {"prompt": [SYSTEM, QUESTION], "answer": "1,000"}, {"prompt": "Hi", "answer": "x"}
    )
    dataset = open_feedback("prompts", path, tokenizer, max_seq_len=64)
    assert isinstance(dataset, CheckablePrompts)
    batch = dataset.rows(np.array([1, 0]))
    assert batch.answers == ["x", "1000"] and batch.sample_ids.tolist() == [1, 0]
    texts = [tokenizer.decode(ids, skip_special=False) for ids in batch.prompts]
    assert texts[0] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert texts[1].startswith("<|im_start|>system\nBe brief.") and texts[1].endswith("<|im_start|>assistant\n")


def test_inspect_and_stats_recognise_labels_and_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = write(
        tmp_path / "kto.jsonl",
        {"messages": [QUESTION, ANSWER], "label": True}, {"messages": [QUESTION, WRONG], "kto_tag": False}, {"id": 1},
    )  # fmt: skip
    asked = write(
        tmp_path / "rl.jsonl", {"question": "2 + 2?", "answer": "#### 4"}, {"prompt": "Capital?", "answer": "Rome"}
    )
    assert (detect_stage(str(labelled)), detect_stage(str(asked))) == ("kto", "rl")
    inspect(InspectSettings(path=str(labelled)))
    shown = capsys.readouterr().out
    assert "label true" in shown and "label false" in shown and "[[Five.<|im_end|>]]" in shown
    assert "1 true, 1 false" in shown and f"1 x no label: {labelled}:3" in shown
    inspect(InspectSettings(path=str(asked)))
    shown = capsys.readouterr().out
    assert "expected answer: 4" in shown and "2 + 2?" in shown and "[[2" not in shown
    assert "answers: 2 different, 1 are numbers" in shown and "rows not used: none" in shown
    stats(StatsSettings(path=str(labelled)))
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["stage"], numbers["labels"]) == ("kto", {"true": 1, "false": 1})
    assert numbers["unusable"] == {"no label": 1} and numbers["truncated"] == 0
    stats(StatsSettings(path=str(asked)))
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["stage"], numbers["answers"]) == ("rl", {"distinct": 2, "numbers": 1})
    assert numbers["bytes_per_trained_token"] is None and numbers["trained_tokens"] == 0


@needs_shared
def test_the_shared_pairs_labels_and_problems_are_read_whole() -> None:
    for name, count in {"dpo_pairs.jsonl": 600, "dpo_en_demo.json": 300, "dpo_zh_demo.json": 300}.items():
        report = RowReport()
        assert len(list(read_pairs(SHARED / name, report))) == count and not report.unusable
    labels = [row.label for row in read_labelled(SHARED / "kto_en_demo.json", RowReport())]
    assert (len(labels), sum(labels)) == (300, 150)
    report = RowReport()
    answers = [row.answer for row in read_prompts(SHARED / "gsm8k_train.jsonl.gz", report)]
    assert len(answers) == 7_473 and not report.unusable
    assert all(answer.lstrip("-").isdigit() for answer in answers)


def test_a_pair_of_texts_is_trained_after_what_both_have_in_common(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load()
    path = write(tmp_path / "a.jsonl", {"chosen": "Two and two? Four.", "rejected": "Two and two? Five."})
    pair = open_dataset("dpo", path, tokenizer, max_seq_len=64).rows(np.array([0]))
    trained = [tokenizer.decode(side.tokens[0][side.loss_mask[0]].tolist()) for side in (pair.chosen, pair.rejected)]
    assert trained == ["Four.", "Five."]
