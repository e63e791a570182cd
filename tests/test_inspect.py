"""`minillm data inspect` shows which tokens are trained, in colour or in marks that a log can hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minillm.cli import main
from minillm.data.inspect import InspectSettings, run
from minillm.data.stats import detect_stage, histogram
from minillm.log import UserError

QUESTION = {"role": "user", "content": "Where is the cat?"}
ANSWER = {"role": "assistant", "content": "Under the table."}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_trained_tokens_stand_in_marks_and_conversations_end_in_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"conversations": [QUESTION, ANSWER]}
    run(InspectSettings(path=write(tmp_path / "a.jsonl", row, row, {"text": "x"}), max_seq_len=64))
    shown = capsys.readouterr().out
    assert shown.count("[[Under the table.<|im_end|>]]") == 2
    assert "user\nWhere is the cat?<|im_end|>" in shown and "[[Where" not in shown
    assert shown.count("\n|<") == 2 and "padding>" in shown
    assert "packing efficiency" in shown and "1 x no conversation fields" in shown and "a.jsonl:3" in shown


def test_colour_replaces_the_marks_and_control_characters_cannot_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "green\x1b[31mred"})
    monkeypatch.setenv("FORCE_COLOR", "1")
    run(InspectSettings(path=path, max_seq_len=16))
    shown = capsys.readouterr().out
    assert "\x1b[32mgreen" in shown and "[[" not in shown and "\x1b[31m" not in shown
    monkeypatch.setenv("NO_COLOR", "1")
    run(InspectSettings(path=path, max_seq_len=16, rows=0))
    assert "\x1b" not in capsys.readouterr().out


def test_documents_of_a_pretraining_row_are_separated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(InspectSettings(path=write(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"}), max_seq_len=8))
    assert "[[one<|endoftext|>]]|[[two<|endoftext|>]]|<" in capsys.readouterr().out


def test_both_sides_of_a_pair_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(InspectSettings(path=write(tmp_path / "a.jsonl", {"prompt": "Cat?", "chosen": "Yes.", "rejected": "No."})))
    shown = capsys.readouterr().out
    assert "row 0 chosen" in shown and "[[Yes.<|im_end|>]]" in shown and "[[No.<|im_end|>]]" in shown


def test_the_stage_is_recognised_from_the_rows(tmp_path: Path) -> None:
    assert detect_stage(write(tmp_path / "a.jsonl", {"id": 1}, {"text": "x"})) == "pretrain"
    assert detect_stage(write(tmp_path / "a.jsonl", {"messages": []})) == "sft"
    assert detect_stage(write(tmp_path / "a.jsonl", {"chosen": "x", "rejected": "y"})) == "dpo"
    np.save(tmp_path / "ids.npy", np.arange(8))
    assert detect_stage(str(tmp_path / "ids.npy")) == "pretrain"
    with pytest.raises(UserError, match="--stage"):
        detect_stage(write(tmp_path / "a.jsonl", {"story": "x"}))
    with pytest.raises(UserError, match="--rows"):
        run(InspectSettings(path=str(tmp_path), rows=-1))


def test_the_histogram_counts_every_length() -> None:
    bins = histogram(np.array([1, 3, 4, 5, 1_000, 100_000]))
    assert sum(each["documents"] for each in bins) == 6
    assert (bins[-1], len(bins)) == ({"up_to": 131_072, "documents": 1}, 8)


def test_stats_are_json_with_lengths_truncation_packing_and_duplicates(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    one = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    other = {"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you."}]}
    path = write(tmp_path / "a.jsonl", one, other, one, one, {"messages": []})
    assert main(["data", "stats", str(path), "--max_seq_len", "64"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["stage"], numbers["documents"], numbers["truncated"]) == ("sft", 4, 0)
    assert numbers["duplicates"]["documents"] == 2 and numbers["duplicates"]["share"] == 0.5
    top = numbers["duplicates"]["most_frequent"][0]
    assert top["times"] == 3 and top["first"].endswith("a.jsonl:1") and "Hello." in top["text"]
    assert 0 < numbers["packing_efficiency"] <= 1 and sum(numbers["unusable"].values()) == 1
    assert main(["data", "inspect", str(path), "--rows", "0"]) == 0
    assert "the same as an earlier document: 2 (50.0 %)" in capsys.readouterr().out
