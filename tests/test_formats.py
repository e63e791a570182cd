"""Every accepted form is understood; everything else is counted with its file, line and reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from minillm.data.files import REASONS_KEPT, RowReport, find_files, read_rows
from minillm.data.formats import read_conversations, read_documents, read_texts, stage_of
from minillm.log import UserError

QUESTION = {"role": "user", "content": "Two and two?"}
ANSWER = {"role": "assistant", "content": "Four."}
WRONG = {"role": "assistant", "content": "Five."}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = {"conversations": [QUESTION, ANSWER]}


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def conversations(path: Path) -> tuple[list[list[dict[str, str]]], RowReport]:
    report = RowReport()
    return [c.messages for c in read_conversations(path, report)], report


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"messages": [QUESTION, ANSWER], "id": 7},
        {"conversations": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Two and two?"}]}, ANSWER]},
        {"instruction": "Two and two?", "input": "", "output": "Four."},
        {"instruction": "Two and two?", "context": None, "response": "Four.", "category": "sums"},
        {"prompt": "Two and two?", "response": "Four."},
        {"prompt": [QUESTION], "completion": [ANSWER]},
    ],
)
def test_every_conversation_form_gives_the_same_messages(tmp_path: Path, row: dict) -> None:
    found, report = conversations(write(tmp_path / "a.jsonl", row))
    assert found == [[QUESTION, ANSWER]]
    assert (report.used, report.unusable) == (1, 0)
    assert stage_of(row) == "sft"


def test_a_question_with_its_worked_answer_is_also_a_conversation(tmp_path: Path) -> None:
    row = {"question": "Two and two?", "answer": "2 + 2 = 4\n#### 4"}
    found, _ = conversations(write(tmp_path / "a.jsonl", row))
    assert found == [[QUESTION, {"role": "assistant", "content": "2 + 2 = 4\n#### 4"}]]
    assert stage_of(row) == "rl"


def test_alpaca_input_history_and_system_are_kept(tmp_path: Path) -> None:
    row = {
        "instruction": "Add.",
        "input": "2 2",
        "output": "4",
        "history": [["Hi", "Hello"]],
        "system": "Be brief.",
    }
    (messages,), _ = conversations(write(tmp_path / "a.jsonl", row))
    assert [m["content"] for m in messages] == ["Be brief.", "Hi", "Hello", "Add.\n2 2", "4"]


def test_tool_calls_of_sharegpt_become_assistant_and_tool_turns(tmp_path: Path) -> None:
    turns = [("human", "weather?"), ("function_call", "{}"), ("observation", "rain"), ("gpt", "It rains.")]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    (messages,), _ = conversations(write(tmp_path / "a.jsonl", row))
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"conversations": [', "invalid JSON"),
        (b'{"conversations": "\xff\xfe"}', "invalid UTF-8"),
        (b"[1, 2]", "not a JSON object"),
        ({"text": "a story"}, "no conversation fields"),
        (
            {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, WRONG]},
            "a preference pair, not a conversation",
        ),
        ({"conversations": []}, "empty conversation"),
        ({"conversations": "hello"}, "conversations is not a list of turns"),
        ({"conversations": ["hello"]}, "a turn is not an object"),
        ({"conversations": [QUESTION]}, "no assistant turn"),
        ({"conversations": [ANSWER]}, "no user turn"),
        ({"conversations": [ANSWER, QUESTION]}, "first turn is assistant, not user"),
        ({"conversations": [QUESTION, ANSWER, QUESTION]}, "last turn is not the assistant's"),
        ({"conversations": [QUESTION, QUESTION, ANSWER]}, "wrong turn order: user after user"),
        ({"conversations": [QUESTION, ANSWER, ANSWER]}, "wrong turn order: assistant after assistant"),
        ({"conversations": [QUESTION, SYSTEM, ANSWER]}, "system turn not first"),
        ({"conversations": [QUESTION, {"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
        ({"conversations": [QUESTION, {"role": "gpt", "content": "x"}]}, "unknown role 'gpt'"),
        ({"conversations": [QUESTION, {"content": "x"}]}, "a turn has no role"),
        ({"conversations": [QUESTION, {"role": "assistant"}]}, "assistant turn without content"),
        (
            {"conversations": [QUESTION, {"role": "assistant", "content": " \u200b\u3000"}]},
            "empty assistant turn",
        ),
        (
            {"conversations": [QUESTION, {"role": "assistant", "content": 4}]},
            "assistant turn is not a string",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            "a turn holds parts that are not text",
        ),
        ({"instruction": "Add.", "input": ""}, "an instruction without output"),
        ({"instruction": "Add.", "input": 3, "output": "4"}, "input is not a string"),
        ({"instruction": "Add.", "output": ""}, "empty output"),
        ({"prompt": "Add."}, "a prompt without response or completion"),
    ],
)
def test_an_unusable_row_is_counted_with_file_line_and_reason(tmp_path: Path, row: object, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, row, GOOD)
    found, report = conversations(path)
    assert len(found) == report.used == 2
    assert report.counts() == {reason: 1}
    assert report.places == {reason: [f"{path}:2"]}


def test_texts_come_from_jsonl_json_gz_and_parquet_alike(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "one"}, {"text": "二"}]
    write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    write(tmp_path / "d.json", *rows)  # JSON lines under the name .json
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    for file in tmp_path.iterdir():
        assert list(read_texts(file, RowReport())) == ["one", "二"], file
    assert list(read_texts(tmp_path, RowReport())) == ["one", "二"] * 5
    assert list(read_texts(f"{tmp_path}/[ab].json*", RowReport())) == ["one", "二"] * 2


def test_texts_that_are_no_texts_are_counted(tmp_path: Path) -> None:
    report = RowReport()
    path = write(tmp_path / "a.jsonl", {"text": "ok"}, {"text": " \n"}, {"text": 5}, GOOD, b"", b'{"text": "\\ud800"}')
    assert list(read_texts(path, report)) == ["ok"]
    assert report.counts() == {
        "empty text": 1,
        "invalid JSON": 1,
        "no text field": 1,
        "text is not a string": 1,
    }


def test_nan_beside_the_text_does_no_harm(tmp_path: Path) -> None:
    assert list(read_texts(write(tmp_path / "a.jsonl", b'{"text": "ok", "score": NaN}'), RowReport())) == ["ok"]


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("a\nb\n\n\nc\n", [("a\nb", 1), ("c", 5)]),
        ("a\n \nb", [("a", 1), ("b", 3)]),
        ("a\n\nb\n<|endoftext|>\nc<|endoftext|>d", [("a\n\nb", 1), ("c", 5), ("d", 5)]),
        ("\n\nonly one\nparagraph\n\n", [("only one\nparagraph", 3)]),
    ],
)
def test_a_txt_is_cut_at_end_of_text_marks_or_blank_lines(tmp_path: Path, content: str, documents: list) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    assert [(d.text, d.line) for d in read_documents(path, RowReport())] == documents


def test_plain_lines_are_gathered_and_nothing_is_lost(tmp_path: Path) -> None:
    lines = [f"line {i} of a text without blank lines" for i in range(400)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines))
    documents = list(read_texts(path, RowReport()))
    assert "\n".join(documents) == "\n".join(lines)
    assert all(2_000 <= len(d) < 2_100 for d in documents[:-1])


def test_a_bad_line_in_a_txt_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n\nbad \xff\n\nfine too\n")
    report = RowReport()
    assert list(read_texts(path, report)) == ["fine", "fine too"]
    assert report.places == {"invalid UTF-8": [f"{path}:3"]}


def test_no_usable_row_shows_the_first_rows_the_forms_and_the_right_stage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[GOOD] * 3, {"conversations": [{"role": "user", "content": "LAST" * 99}]})
    with pytest.raises(UserError) as error:
        list(read_texts(path, RowReport()))
    message = str(error.value)
    assert message.count("Two and two?") == 3 and "LAST" not in message
    assert '{"text": "' in message and "minillm sft" in message and f"4 x no text field: {path}:1" in message
    assert max(map(len, message.splitlines())) < 400


def test_files_that_cannot_be_read_are_named_with_what_to_do(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"text": "a"})
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "folder").mkdir()
    packed = gzip.compress(b"".join(json.dumps({"text": str(i) * 50}).encode() + b"\n" for i in range(5_000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    for name, words in {
        "trian.jsonl": "Did you mean",
        "none/a.jsonl": "does not exist either",
        "empty.jsonl": "is empty",
        "notes.md": "unknown file type",
        "folder": "no data files",
        "x*.jsonl": "No data file matches",
        "cut.jsonl.gz": "damaged",
        "not.jsonl.gz": "damaged",
        "bad.parquet": "not a readable parquet",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            list(read_texts(tmp_path / name, RowReport()))
        assert name in str(error.value)


def test_a_json_file_that_is_cut_off_is_counted_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"text": "a"},\n{"text": ')
    write(tmp_path / "b.jsonl", {"text": "b"})
    report = RowReport()
    assert list(read_texts(tmp_path, report)) == ["b"]
    assert report.places == {"invalid JSON (the file is one JSON value)": [f"{tmp_path / 'a.json'}:3"]}


def test_a_folder_is_read_in_order_without_hidden_files_and_side_files(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a.jsonl", ".minillm_cache/x.jsonl", "a.jsonl.removed.jsonl", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, {"text": name})
    assert [str(p.relative_to(tmp_path)) for p in find_files(tmp_path)] == ["a.jsonl", "b/2.jsonl"]


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "one\u2028two\u0085three"}, {"text": "b"})
    assert [(row.value["text"], row.line) for row in read_rows(path, RowReport())] == [
        ("one\u2028two\u0085three", 1),
        ("b", 2),
    ]


def test_the_report_names_the_first_places_and_stays_short(capsys: pytest.CaptureFixture[str]) -> None:
    report = RowReport("x.jsonl", used=1)
    for line in range(1, 8):
        report.add("empty text", "x.jsonl", line)
    report.log()
    printed = capsys.readouterr().err
    assert "7 of 8 rows" in printed and "7 x empty text: x.jsonl:1, x.jsonl:2, x.jsonl:3, ..." in printed
    for line in range(1_000):
        report.add(f"unknown role {line}", "x.jsonl", line)
    assert len(report.counts()) <= REASONS_KEPT + 1 and report.unusable == 1_007
