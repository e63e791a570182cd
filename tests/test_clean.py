"""The cleaner keeps what is fit, names what it removes, and never harms a file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from minillm.data.clean import CleanSettings, clean_conversations, run
from minillm.log import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
QUESTION = {"role": "user", "content": "Hi"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: object) -> Path:
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_fit_rows_are_kept_in_order_and_the_others_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = {"conversations": [QUESTION, answer("A long answer.")]}
    source = write(
        tmp_path / "in.jsonl",
        fit,
        b"{broken",
        {"messages": [{"content": "Hi", "role": "user"}, answer("A long answer.")]},
        {"conversations": [QUESTION, answer("ok . ")]},
        {"conversations": [QUESTION, answer("  ")]},
        {"instruction": "Hi", "input": "", "output": "Another answer."},
    )
    output, report = tmp_path / "new" / "out.jsonl", tmp_path / "new" / "report.json"
    run(CleanSettings(input=str(source), output=str(output), report=str(report)))
    assert capsys.readouterr().out == "Processing complete: kept 2, removed 4\n"
    assert read(output) == [fit, {"conversations": [QUESTION, answer("Another answer.")]}]
    removed = read(tmp_path / "new" / "out.jsonl.removed.jsonl")
    assert [(r["line"], r["reason"]) for r in removed] == [
        (2, "invalid JSON"),
        (3, "the same messages as an earlier row"),
        (4, "answer shorter than 6 characters"),
        (5, "empty assistant turn"),
    ]
    assert removed[1]["of"] == f"{source}:1" and all(r["file"] == str(source) for r in removed)
    counts = json.loads(report.read_text())
    assert (counts["kept"], counts["removed"], len(counts["reasons"])) == (2, 4, 4)


def test_the_shortest_answer_is_a_choice(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"conversations": [QUESTION, answer("42")]})
    assert clean_conversations(source, tmp_path / "out.jsonl", min_chars=2).kept == 1


def test_a_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl", *[{"conversations": [QUESTION, answer(f"answer {i % 7}")]} for i in range(20)]
    )
    first = clean_conversations(source, tmp_path / "a.jsonl")
    assert clean_conversations(source, tmp_path / "b.jsonl") == first
    for suffix in ("", ".removed.jsonl"):
        assert (tmp_path / f"a.jsonl{suffix}").read_bytes() == (tmp_path / f"b.jsonl{suffix}").read_bytes()
    assert first.reasons == {"the same messages as an earlier row": 13}


def test_bad_input_leaves_existing_output_as_it_was(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    with pytest.raises(UserError, match="none of the 2 rows"):
        clean_conversations(write(tmp_path / "in.jsonl", {"text": "a"}, b"{"), output)
    with pytest.raises(UserError, match="not found"):
        clean_conversations(tmp_path / "missing.jsonl", output)
    assert output.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_the_input_is_never_written_over(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"conversations": [QUESTION, answer("A long answer.")]})
    before = source.read_bytes()
    for given, output in ((source, source), (tmp_path, tmp_path / "out.jsonl"), (source, tmp_path)):
        with pytest.raises(UserError, match="--output"):
            clean_conversations(given, output)
    with pytest.raises(UserError, match="cannot be written"):
        clean_conversations(source, source / "out.jsonl")
    assert source.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_labelled_defects_that_belong_to_this_cleaner_are_found_and_nothing_else(tmp_path: Path) -> None:
    clean_conversations(SHARED / "sft_dirty.jsonl", tmp_path / "out.jsonl")
    removed = {row["line"] for row in read(tmp_path / "out.jsonl.removed.jsonl")}
    labels = read(SHARED / "sft_dirty.labels.jsonl")
    later = {"near_duplicate", "repeated_ngram", "html_boilerplate", "over_long"}
    assert Counter(r["reason"] for r in labels if r["reason"] not in later and r["line"] not in removed) == {}
    assert removed <= {row["line"] for row in labels}
