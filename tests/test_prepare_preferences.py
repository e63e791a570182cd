"""minillm data prepare-preferences: pairs, labels or prompts of any form in, one file of one form out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minillm.cli import main
from minillm.config import UsageError
from minillm.data import hub
from minillm.data.batches import open_dataset
from minillm.data.files import Row, RowReport, find_files
from minillm.data.preferences import read_labelled, read_pairs, read_prompts
from minillm.data.prepare_preferences import PreparePreferencesSettings, run, side_file
from minillm.log import UserError
from minillm.text.tokenizer import Tokenizer

QUESTION = {"role": "user", "content": "Two and two?"}
ANSWER = {"role": "assistant", "content": "Four."}
WRONG = {"role": "assistant", "content": "Five."}
PAIRS = [{"prompt": f"Count to {n}.", "chosen": f"1 to {n}", "rejected": "No."} for n in range(20)]
CANONICAL = {
    "pairs": {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, WRONG]},
    "kto": {"messages": [QUESTION, ANSWER], "label": True},
    "prompts": {"prompt": [QUESTION], "answer": "1200"},
}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prepare(folder: Path, rows: list, **settings: object) -> Path:
    output = folder / "out.jsonl"
    source = write(folder / "rows.jsonl", rows)
    run(PreparePreferencesSettings(input=str(source), output=str(output), **settings))  # type: ignore[arg-type]
    return output


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("pairs", {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five."}),
        ("pairs", {"chosen": "Two and two? Four.", "rejected": "Two and two? Five."}),
        ("pairs", {"conversations": [{"from": "human", "value": "Two and two?"}],
                   "chosen": {"from": "gpt", "value": "Four."}, "rejected": {"from": "gpt", "value": "Five."}}),
        ("kto", {"prompt": "Two and two?", "completion": "Four.", "label": True}),
        ("kto", {"instruction": "Two and two?", "output": "Four.", "kto_tag": True}),
        ("prompts", {"question": "Two and two?", "answer": "steps\n#### 1,200"}),
        ("prompts", {"prompt": "Two and two?", "solution": "1,200"}),
    ],
)  # fmt: skip
def test_every_form_becomes_one_and_that_stays_as_it_is(tmp_path: Path, form: str, row: dict) -> None:
    output = prepare(tmp_path, [row])
    assert read(output) == [CANONICAL[form]]
    again = tmp_path / "again.jsonl"
    run(PreparePreferencesSettings(input=str(output), output=str(again), form=form))
    assert again.read_bytes() == output.read_bytes()
    reader = {"pairs": read_pairs, "kto": read_labelled, "prompts": read_prompts}[form]
    report = RowReport()
    assert len(list(reader(output, report))) == 1 and not report.unusable


def test_what_was_left_out_is_in_a_side_file_that_is_no_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        PAIRS[0],
        "{broken",
        {**PAIRS[1], "rejected": ""},
        {"messages": [QUESTION, ANSWER], "label": True},
        PAIRS[2],
    ]
    output = prepare(tmp_path, rows)
    record = json.loads(side_file(output).read_text())
    expected = {"empty rejected": 1, "invalid JSON": 1, "no chosen and rejected fields": 1}
    assert (record["form"], record["train"], record["rows"]["used"]) == ("pairs", 2, 2)
    assert record["rows"]["unusable"] == expected
    assert record["rows"]["unusable_places"]["invalid JSON"] == [f"{tmp_path / 'rows.jsonl'}:2"]
    assert "3 of 5 rows are not usable" in capsys.readouterr().err
    assert [path.name for path in find_files(tmp_path)] == ["out.jsonl", "rows.jsonl"]


def test_equal_prompts_are_held_out_together(tmp_path: Path) -> None:
    output = prepare(tmp_path, PAIRS + [{**row, "chosen": "again"} for row in PAIRS], val_fraction=0.3)
    sides = [
        {row["chosen"][0]["content"] for row in read(path)} for path in (output, output.with_name("out_val.jsonl"))
    ]
    assert all(sides) and not sides[0] & sides[1] and len(sides[0] | sides[1]) == len(PAIRS)


def test_the_same_again_does_nothing_and_other_settings_replace_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = prepare(tmp_path, PAIRS, val_fraction=0.3)
    val, before = output.with_name("out_val.jsonl"), output.read_bytes()
    stamp = output.stat().st_mtime_ns
    prepare(tmp_path, PAIRS, val_fraction=0.3)
    assert output.stat().st_mtime_ns == stamp and "nothing to do" in capsys.readouterr().err
    val.unlink()
    prepare(tmp_path, PAIRS, val_fraction=0.3)
    assert val.is_file() and output.read_bytes() == before
    prepare(tmp_path, PAIRS)
    assert not val.exists() and len(read(output)) == len(PAIRS)
    prepare(tmp_path, PAIRS[:3], val_fraction=0.001)
    assert "none of 3 rows was held out" in capsys.readouterr().err and not val.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.prepared.json", "rows.jsonl"]


def test_nothing_else_is_replaced_and_bad_input_leaves_what_was_there(tmp_path: Path) -> None:
    output = write(tmp_path / "out.jsonl", [CANONICAL["pairs"]])
    with pytest.raises(UserError, match="is not what minillm data prepare-preferences wrote"):
        prepare(tmp_path, PAIRS)
    output.unlink()
    prepare(tmp_path, PAIRS)
    with pytest.raises(UserError, match="no usable row for `minillm dpo` among 3"):
        prepare(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3)
    assert len(read(output)) == len(PAIRS)
    output.write_text(output.read_text() + "\n")
    with pytest.raises(UserError, match="is not what"):
        prepare(tmp_path, PAIRS[:2])
    for input, wrong, reason in (
        (output, output, "part of the input"),
        (tmp_path, tmp_path / "new.jsonl", "part of the input"),
        (output, tmp_path / "new.json", "ends in .jsonl"),
    ):
        with pytest.raises(UsageError, match=reason):
            run(PreparePreferencesSettings(input=str(input), output=str(wrong)))


def test_rows_of_no_known_form_are_shown_with_the_forms(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        prepare(tmp_path, ["{broken"] + [{"messages": [QUESTION, ANSWER], "id": n} for n in range(4)])
    message = str(error.value)
    assert message.count("Two and two?") == 2 and "{broken" in message and "1 x invalid JSON" in message
    assert '"kto_tag"' in message and '"rejected"' in message and "#### 42" in message
    assert "look like data for `minillm sft`" in message
    with pytest.raises(UserError, match="no usable row for `minillm dpo --loss kto`"):
        prepare(tmp_path, PAIRS, form="kto")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_hub_dataset_is_read_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hub_rows", lambda name, split: [Row(row, f"{name}/{split}", 1) for row in PAIRS])
    run(PreparePreferencesSettings(input="someone/pairs", output=str(tmp_path / "out.jsonl"), split="test"))
    assert len(read(tmp_path / "out.jsonl")) == len(PAIRS)
    monkeypatch.setattr(hub, "hub_rows", lambda name, split: [Row({"id": "odd"}, name, 1)])
    with pytest.raises(UserError, match='{"id": "odd"}'):
        run(PreparePreferencesSettings(input="someone/odd", output=str(tmp_path / "odd.jsonl")))


def test_the_command_prepares_what_preference_tuning_reads(tmp_path: Path) -> None:
    source, output = write(tmp_path / "rows.jsonl", PAIRS), tmp_path / "pairs.jsonl"
    flags = ["--input", str(source), "--output", str(output), "--val_fraction", "0.2"]
    assert main(["data", "prepare-preferences", *flags]) == 0
    tokenizer = Tokenizer.load()
    parts = [open_dataset("dpo", path, tokenizer, max_seq_len=64) for path in (output, tmp_path / "pairs_val.jsonl")]
    direct = open_dataset("dpo", source, tokenizer, max_seq_len=64)
    assert sum(len(part) for part in parts) == len(direct)
    assert sum(len(part.store.tokens) for part in parts) == len(direct.store.tokens)
