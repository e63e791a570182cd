"""The cleaner keeps what is fit, names what it removes and why, never harms a file, and writes the same bytes again."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from minillm.data.clean import CleanReport, CleanSettings, clean_conversations, run
from minillm.data.clean.rows import REASONS
from minillm.data.clean.workers import CHUNK_BYTES
from minillm.log import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
QUESTION = {"role": "user", "content": "Hi"}
FIT = {"conversations": [QUESTION, {"role": "assistant", "content": "A long answer."}]}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def conversation(question: str, text: str) -> dict:
    return {"conversations": [{"role": "user", "content": question}, answer(text)]}


def write(path: Path, *rows: object) -> Path:
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def clean(source: Path, output: Path, **settings: object) -> CleanReport:
    return clean_conversations(CleanSettings(input=str(source), output=str(output), **settings))  # type: ignore[arg-type]


def removed_from(output: Path) -> list[dict]:
    return read(output.with_name(output.name + ".removed.jsonl"))


def numbered(count: int) -> list[dict]:
    """Conversations that have little in common, with some repeated rows and other defects among them."""
    words = (
        "apple",
        "river",
        "stone",
        "cloud",
        "lamp",
        "violin",
        "garden",
        "winter",
        "copper",
        "engine",
        "mirror",
        "ticket",
    )
    rows: list[dict] = []
    for number in range(count):
        text = " ".join(words[(number * (place + 3) + place * place) % len(words)] for place in range(12))
        rows.append(conversation(f"Question {number}: {text[:30]}?", f"Answer {number}: {text}."))
        if number % 10 == 9:
            rows += [
                rows[-4],
                conversation("WHY?" if number % 20 == 9 else "why", "Because of  the rain!"),
                {"text": text},
            ]
    return rows


# --- what is kept, what is removed ---


def test_fit_rows_are_kept_in_order_and_the_others_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(
        tmp_path / "in.jsonl",
        FIT,
        b"{broken",
        {"messages": [{"content": "Hi", "role": "user"}, answer("A long answer.")]},
        {"conversations": [QUESTION, answer("ok . ")]},
        {"conversations": [QUESTION, answer("  ")]},
        {"instruction": "Hi", "input": "", "output": "Another answer."},
        {"conversations": [QUESTION, answer("a LONG answer!!")]},
    )
    output, report = tmp_path / "new" / "out.jsonl", tmp_path / "new" / "report.json"
    run(CleanSettings(input=str(source), output=str(output), report=str(report)))
    assert capsys.readouterr().out == "Processing complete: kept 2, removed 5\n"
    assert read(output) == [FIT, {"conversations": [QUESTION, answer("Another answer.")]}]
    removed = removed_from(output)
    assert [(r["line"], r["reason"]) for r in removed] == [
        (2, "broken_json"),
        (3, "exact_duplicate"),
        (4, "short_answer"),
        (5, "empty_answer"),
        (7, "near_duplicate"),
    ]
    assert {r["of"] for r in removed if "of" in r} == {f"{source}:1"}
    assert all(r["file"] == str(source) and r["reason"] in REASONS for r in removed)
    counts = json.loads(report.read_text())
    assert (counts["kept"], counts["removed"], len(counts["reasons"])) == (2, 5, 5)
    assert counts["near_duplicates"] == "similar" and counts["languages"] == {"undecided": 4}


def test_the_shortest_and_the_longest_are_choices(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", conversation("Hi", "42"), conversation("Hi", " ".join(map(str, range(99)))))
    assert clean(source, tmp_path / "a.jsonl").reasons == {"short_answer": 1}
    assert clean(source, tmp_path / "b.jsonl", min_chars=2, max_chars=100).reasons == {"over_long": 1}
    with pytest.raises(UserError, match="--max_chars"):
        clean(source, tmp_path / "c.jsonl", min_chars=200, max_chars=100)


def test_the_report_counts_the_languages(tmp_path: Path) -> None:
    rows = [
        conversation("What is the colour of the sky?", "It is blue when the sun is high."),
        conversation("天空是什么颜色的？", "太阳升起的时候，天空是蓝色的。"),
    ]
    assert clean(write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl").languages == {"en": 1, "zh": 1}


# --- the same bytes ---


def files_of(output: Path) -> tuple[bytes, bytes]:
    return output.read_bytes(), output.with_name(output.name + ".removed.jsonl").read_bytes()


@pytest.mark.parametrize("mode", ["off", "same", "similar"])
def test_a_second_run_gives_the_same_bytes(tmp_path: Path, mode: str) -> None:
    source = write(tmp_path / "in.jsonl", *numbered(40))
    first = clean(source, tmp_path / "a.jsonl", near_duplicates=mode)
    assert clean(source, tmp_path / "b.jsonl", near_duplicates=mode) == first
    assert files_of(tmp_path / "a.jsonl") == files_of(tmp_path / "b.jsonl")
    assert [row["line"] for row in removed_from(tmp_path / "a.jsonl")] == sorted(
        row["line"] for row in removed_from(tmp_path / "a.jsonl")
    )
    assert first.reasons["missing_role"] == 4 and first.reasons["exact_duplicate"] >= 4


def test_the_number_of_processes_does_not_matter(tmp_path: Path) -> None:
    rows = numbered(60)
    padding = {"id": "x" * (3 * CHUNK_BYTES // len(rows))}  # so that there are several chunks
    source = write(tmp_path / "in.jsonl", *[{**row, **padding} for row in rows])
    assert source.stat().st_size > 2 * CHUNK_BYTES
    alone = clean(source, tmp_path / "a.jsonl", num_workers=0, mask_pii=True)
    assert clean(source, tmp_path / "b.jsonl", num_workers=2, mask_pii=True) == alone
    assert files_of(tmp_path / "a.jsonl") == files_of(tmp_path / "b.jsonl")


def test_rows_of_all_files_of_a_folder_are_compared(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.jsonl", FIT)
    (folder / "b.json").write_text(json.dumps([conversation("Why?", "Because it rains."), FIT, "no object"]))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(FIT).encode()))
    clean(folder, tmp_path / "out.jsonl")
    assert [(Path(r["file"]).name, r["line"], r["reason"]) for r in removed_from(tmp_path / "out.jsonl")] == [
        ("b.json", 2, "exact_duplicate"),
        ("b.json", 3, "broken_json"),
        ("c.jsonl.gz", 1, "exact_duplicate"),
    ]


# --- bad input ---


def test_bad_input_leaves_existing_output_as_it_was(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    with pytest.raises(UserError, match="none of the 2 rows"):
        clean(write(tmp_path / "in.jsonl", {"text": "a"}, b"{"), output)
    with pytest.raises(UserError, match="not found"):
        clean(tmp_path / "missing.jsonl", output)
    assert output.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_damaged_or_empty_file_is_an_error(tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b"\n".join(json.dumps(row).encode() for row in numbered(500)))[:-200])
    with pytest.raises(UserError, match="damaged"):
        clean(cut, tmp_path / "out.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="empty"):
        clean(tmp_path / "empty.jsonl", tmp_path / "out.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no data files"):
        clean(tmp_path / "folder", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_lines_that_are_long_or_no_text_are_counted(tmp_path: Path) -> None:
    long = conversation("Write a lot.", " ".join(f"word{n}" for n in range(150_000)))
    assert len(json.dumps(long)) > 1_000_000
    source = write(
        tmp_path / "in.jsonl", FIT, long, b'{"conversations": "\xff\xfe"}', b"", b"[1, 2]", b"\x00\x01", {"prompt": 1}
    )
    clean(source, tmp_path / "out.jsonl")
    assert [(r["line"], r["reason"]) for r in removed_from(tmp_path / "out.jsonl")] == [
        (2, "over_long"),
        (3, "non_utf8"),
        (5, "broken_json"),
        (6, "broken_json"),
        (7, "missing_role"),
    ]


def test_the_input_is_never_written_over(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", FIT)
    before = source.read_bytes()
    for given, output in ((source, source), (tmp_path, tmp_path / "out.jsonl"), (source, tmp_path)):
        with pytest.raises(UserError, match="--output"):
            clean(given, output)
    with pytest.raises(UserError, match="part of the input"):
        clean(source, tmp_path / "out.jsonl", report=str(source))
    with pytest.raises(UserError, match="cannot be written"):
        clean(source, source / "out.jsonl")
    assert source.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --- the shared files ---


@needs_shared
def test_every_labelled_row_is_found_under_its_name_and_nothing_else(tmp_path: Path) -> None:
    clean(SHARED / "sft_dirty.jsonl", tmp_path / "out.jsonl")
    removed = {row["line"]: row for row in removed_from(tmp_path / "out.jsonl")}
    labels = {row["line"]: row for row in read(SHARED / "sft_dirty.labels.jsonl")}
    assert {line: label for line, label in labels.items() if line not in removed} == {}
    assert {line: row for line, row in removed.items() if line not in labels} == {}
    wrong = Counter((labels[line]["reason"], removed[line]["reason"]) for line in labels)
    assert {pair for pair in wrong if pair[0] != pair[1]} == set()
    for line, label in labels.items():
        assert "of" not in label or removed[line]["of"] == f"{SHARED / 'sft_dirty.jsonl'}:{label['of']}"


@needs_shared
@pytest.mark.parametrize("name", ["sft_mini_512.jsonl", "alpaca_en_demo.json", "alpaca_zh_demo.json", "identity.json"])
def test_good_rows_stay_but_for_repeated_and_very_short_ones(tmp_path: Path, name: str) -> None:
    reasons = clean(SHARED / name, tmp_path / "out.jsonl").reasons
    assert set(reasons) <= {"exact_duplicate", "short_answer"}
    assert reasons.get("short_answer", 0) <= 10  # "Blue.", "42": right answers that a flag keeps


@needs_shared
@pytest.mark.parametrize("name", ["glaive_toolcall_en_demo.json", "glaive_toolcall_zh_demo.json"])
def test_of_tool_calls_only_repeated_ones_go(tmp_path: Path, name: str) -> None:
    reasons = clean(SHARED / name, tmp_path / "out.jsonl", min_chars=2).reasons
    assert set(reasons) <= {"exact_duplicate", "near_duplicate"} and reasons.get("near_duplicate", 0) <= 2


@pytest.mark.slow
def test_the_benchmark_measures_speed_and_memory(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "clean.py"
    command = [sys.executable, str(script), "--rows", "200", "--modes", "off,similar", "--results", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(script.parent.parent / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "clean.json").read_text())["results"]
    assert [result["mode"] for result in results] == ["off", "similar"]
    assert all(result["rows_per_second"] > 0 and result["cpu_seconds"] > 0 for result in results)
