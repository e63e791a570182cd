"""Bad input to every command that reads data: a clear error that names the file, or a counted row with its line; never
a stack trace, never half an output under its name, and nothing that hangs."""

from __future__ import annotations

import builtins
import errno
import gzip
import json
import os
import random
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minillm.cli import main

TINY = [
    "--hidden_size", "16", "--num_hidden_layers", "1", "--max_seq_len", "64", "--max_steps", "1", "--batch_size", "2",
    "--eval_samples", "4", "--device", "cpu", "--dtype", "float32", "--no_wandb",
]  # fmt: skip
SECONDS = 60  # of processor time: far more than any of these inputs takes, and far less than one that hangs


class Entry(NamedTuple):
    """A command that reads data: the form of its rows, its arguments but for data and output, the two flags."""

    form: str
    argv: list[str]
    data_flag: str = ""
    output_flag: str = ""
    output: str = "out"

    def command(self, data: Path, output: Path) -> list[str]:
        written = [self.output_flag, str(output)] if self.output_flag else []
        return [*self.argv, *filter(None, [self.data_flag]), str(data), *written]


ENTRIES = {
    "pretrain": Entry("text", ["pretrain", *TINY], "--data_path", "--out_dir"),
    "sft": Entry("conversation", ["sft", *TINY], "--data_path", "--out_dir"),
    "dpo": Entry("pair", ["dpo", *TINY], "--data_path", "--out_dir"),
    "prepare-text": Entry("text", ["data", "prepare-text"], "--input", "--output_dir"),
    "prepare-instructions": Entry("conversation", ["data", "prepare-instructions"], "--input", "--output_dir"),
    "prepare-preferences": Entry(
        "pair", ["data", "prepare-preferences", "--form", "pairs"], "--input", "--output", "out.jsonl"
    ),
    "clean": Entry("conversation", ["data", "clean"], "", "--output", "out.jsonl"),
    "inspect": Entry("text", ["data", "inspect", "--stage", "pretrain"]),
    "stats": Entry("conversation", ["data", "stats", "--stage", "sft"]),
    "train-tokenizer": Entry("text", ["data", "train-tokenizer", "--vocab_size", "300"], "--input", "--output_dir"),
}
WRITING = [name for name, entry in ENTRIES.items() if entry.output_flag]
each_entry = pytest.mark.parametrize("name", ENTRIES)


def row(form: str, number: int) -> dict:
    """A sound row of this form, unlike the others."""
    question = [{"role": "user", "content": f"What comes after {number}?"}]
    answer, wrong = ([{"role": "assistant", "content": f"The number {n} comes next."}] for n in (number + 1, number))
    return {
        "text": {"text": f"The number {number} is followed by {number + 1}, which is followed by another one."},
        "conversation": {"conversations": question + answer},
        "pair": {"chosen": question + answer, "rejected": question + wrong},
    }[form]


def line(form: str, number: int) -> bytes:
    return json.dumps(row(form, number)).encode()


def lines(form: str, count: int = 12) -> bytes:
    return b"".join(line(form, number) + b"\n" for number in range(count))


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, what was said)"""
    capsys.readouterr()
    started = time.process_time()
    code = main(argv)
    assert time.process_time() - started < SECONDS
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.err + captured.out


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; caches apart, which a run may fill."""
    found = (path for path in folder.rglob("*") if path.is_file() and ".minillm_cache" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILLM_CACHE_DIR", str(tmp_path / ".minillm_cache"))


# --- files that cannot be used: an error that names the file ---


def _packed(name: str, content: bytes) -> Callable[[Path, str], Path]:
    return lambda folder, form: _written(folder / name, content)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _cut_gz(folder: Path, form: str) -> Path:
    return _written(folder / "cut.jsonl.gz", gzip.compress(os.urandom(9_000).hex().encode() + lines(form, 300))[:-900])


def _cut_zst(folder: Path, form: str) -> Path:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    content = zstandard.compress(lines(form, 300) + os.urandom(9_000).hex().encode())
    return _written(folder / "cut.jsonl.zst", content[:-900])


def _parquet(folder: Path, columns: dict[str, list], *, cut: int = 0) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = folder / "table.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    return _written(path, path.read_bytes()[:-cut]) if cut else path


def _columns(form: str) -> dict[str, list]:
    return {name: [row(form, number)[name] for number in range(5)] for name in row(form, 0)}


def _empty_folder(folder: Path, form: str) -> Path:
    (folder / "folder").mkdir()
    (folder / "folder" / "picture.png").write_bytes(b"\x89PNG")
    return folder / "folder"


UNUSABLE: dict[str, tuple[Callable[[Path, str], Path], str]] = {
    "missing": (lambda folder, form: folder / "none.jsonl", "not found"),
    "empty": (_packed("empty.jsonl", b""), "is empty"),
    "blank lines": (_packed("blank.jsonl", b"\n\r\n \n"), "no |none "),
    "a folder without data": (_empty_folder, "no data files"),
    "an unknown suffix": (lambda folder, form: _written(folder / "rows.doc", lines(form)), "Readable are"),
    "not gz": (lambda folder, form: _written(folder / "not.jsonl.gz", lines(form)), "damaged"),
    "gz that is cut off": (_cut_gz, "damaged"),
    "zst that is cut off": (_cut_zst, "damaged"),
    "parquet that is cut off": (lambda folder, form: _parquet(folder, _columns(form), cut=99), "not a readable"),
    "parquet without the column": (lambda folder, form: _parquet(folder, {"id": [1, 2]}), "no |none "),
    "parquet with numbers in the column": (
        lambda folder, form: _parquet(folder, {name: [1, 2, 3] for name in row(form, 0)}), "not a|no |none "
    ),
    "json that is cut off": (_packed("cut.json", b'[\n{"text": "a"},\n{"text": '), "(?:JSON|_json).*json:3"),
    "a binary file": (
        lambda folder, form: _written(folder / "noise.jsonl", random.Random(0).randbytes(20_000)), "UTF-8|utf8"
    ),
    "zero bytes": (_packed("zeros.jsonl", b"\0" * 50_000), "invalid JSON|broken_json"),
    "UTF-16": (
        lambda folder, form: _written(folder / "wide.jsonl", lines(form).decode().encode("utf-16")), "UTF-8|utf8"
    ),
    "rows without the field": (_packed("other.jsonl", b'{"story": "a"}\n' * 9), r"no |none "),
}  # fmt: skip


@each_entry
@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_file_that_cannot_be_used_is_an_error_that_names_it(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry, (make, words) = ENTRIES[name], UNUSABLE[kind]
    (tmp_path / "in").mkdir()
    data = make(tmp_path / "in", entry.form)
    before = tree(tmp_path)
    code, said = run(entry.command(data, tmp_path / entry.output), capsys)
    assert code == 1
    assert data.name in said.split("error: ")[-1]
    assert re.search(f"(?s){words}", said), said
    assert tree(tmp_path) == before


@each_entry
def test_a_file_that_may_not_be_read_is_an_error_that_names_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry, really_open = ENTRIES[name], builtins.open
    data = _written(tmp_path / "closed.jsonl", lines(entry.form))

    def refuse(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path) == str(data):  # a mode without permission would not keep root away
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really_open(path, *arguments, **named)

    monkeypatch.setattr(builtins, "open", refuse)
    code, said = run(entry.command(data, tmp_path / entry.output), capsys)
    assert code == 1 and f"error: {data} cannot be read: Permission denied" in said, said
    assert list(tree(tmp_path)) == [data.name]


# --- rows that cannot be used, or look so: counted with their line, or read ---

LONG_WORD = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=1_100_000))
BAD_LINES = {
    "invalid UTF-8": b'{"text": "\xff\xfe"}',
    "a cut character": "好".encode()[:2],
    "NUL bytes": b"\0" * 1_000,
    "a NUL in a row": b'{"text": "\0"}',
    "no JSON": b"Once upon a time",
    "half a row": b'{"text": "Once upon',
    "a list": b'["text"]',
    "another form": b'{"id": 7}',
    "a number": b'{"text": 7, "conversations": 7, "chosen": 7, "rejected": 7}',
    "null": b'{"text": null, "conversations": null, "chosen": null, "rejected": null}',
    "nested too deeply": b"[" * 100_000,
    "half a surrogate": b'{"text": "\\ud800"}',
}


@each_entry
def test_bad_lines_are_counted_with_their_place_and_the_others_are_used(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = ENTRIES[name]
    data = _written(
        tmp_path / "rows.jsonl", lines(entry.form) + b"\n".join([*BAD_LINES.values(), line(entry.form, 99)])
    )
    code, said = run(entry.command(data, tmp_path / entry.output), capsys)
    assert code == 0
    removed = tmp_path / "out.jsonl.removed.jsonl"
    if removed.exists():
        places = [json.loads(each)["line"] for each in removed.read_text().splitlines()]
        assert places == list(range(13, 13 + len(BAD_LINES)))
    else:
        assert said.count("rows.jsonl:13") >= 1 and "invalid UTF-8" in said and "invalid JSON" in said
        counted = f"{len(BAD_LINES)} of {13 + len(BAD_LINES)} rows are not usable"
        assert counted in said or '"unusable": {' in said or f"rows not used: {len(BAD_LINES)}" in said


@each_entry
@pytest.mark.parametrize("kind", ["byte order mark", "CRLF", "no newline at the end", "blank lines between"])
def test_harmless_differences_lose_no_row(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = ENTRIES[name]
    content = {
        "byte order mark": b"\xef\xbb\xbf" + lines(entry.form),
        "CRLF": lines(entry.form).replace(b"\n", b"\r\n"),
        "no newline at the end": lines(entry.form)[:-1],
        "blank lines between": lines(entry.form).replace(b"\n", b"\n \n"),
    }[kind]
    data = _written(tmp_path / "rows.jsonl", content)
    code, said = run(entry.command(data, tmp_path / entry.output), capsys)
    assert code == 0 and "not usable" not in said
    if name == "clean":
        assert "kept 12, removed 0" in said


HUGE = {
    "letters": LONG_WORD,
    "one letter": "a" * len(LONG_WORD),
    "Chinese": "".join(random.Random(2).choices("天地玄黄宇宙洪荒日月盈昃", k=len(LONG_WORD) // 3)),
    "digits": "7" * len(LONG_WORD),
    "spaces": "x" + " " * len(LONG_WORD) + "x",
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "letters") for name in ENTRIES]
    + [(name, kind) for name in ("prepare-text", "train-tokenizer", "clean") for kind in list(HUGE)[1:]],
)
def test_a_row_of_one_huge_word_neither_hangs_nor_stops_the_others(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry, word = ENTRIES[name], HUGE[kind]
    huge = {
        "text": {"text": word},
        "conversation": {"conversations": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": word}]},
        "pair": {"prompt": "Go", "chosen": word, "rejected": f"{word[::-1]}y"},
    }[entry.form]
    data = _written(tmp_path / "rows.jsonl", lines(entry.form) + json.dumps(huge).encode() + b"\n")
    code, said = run(entry.command(data, tmp_path / entry.output), capsys)
    assert code == 0, said
    if name == "clean":
        assert "kept 12, removed 1" in said


# --- a disk without room ---


@contextmanager
def no_room(limit: int) -> Iterator[None]:
    """No file may become larger than `limit` bytes: writing more is an error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("limit", [0, 300, 4_000])
def test_a_full_disk_is_an_error_and_leaves_the_previous_output(
    name: str, limit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = ENTRIES[name]
    output = tmp_path / "results" / entry.output
    output.parent.mkdir()
    data = _written(tmp_path / "rows.jsonl", lines(entry.form, 300))
    argv = entry.command(data, output)
    assert run(argv, capsys)[0] == 0
    if name == "prepare-text":  # which never replaces a folder
        argv = entry.command(data, output.with_name("other"))
    data.write_bytes(lines(entry.form, 310))
    before = tree(output.parent)
    with no_room(limit):
        code, said = run(argv, capsys)
    assert code == 1 and "error: " in said and "too large" in said, said
    left = {path for path in tree(output.parent) if "other.preparing" not in path}
    assert left == set(before)
    assert {path: content for path, content in tree(output.parent).items() if path in before} == before
    assert run(argv, capsys)[0] == 0


def test_a_disk_that_is_full_when_weights_are_written_leaves_those_of_the_last_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = _written(tmp_path / "rows.jsonl", lines("text", 300)), tmp_path / "out"
    argv = ENTRIES["pretrain"].command(data, output)
    assert run(argv, capsys)[0] == 0
    weights = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    assert any(name.endswith(".pth") for name in weights)
    for limit, words in ((30_000, f"{output}.*tokenizer.json: File too large"), (600_000, "could not be saved")):
        with no_room(limit):
            code, said = run([*argv, "--seed", "7"], capsys)
        assert code == 1 and re.search(f"error: .*{words}", said), said
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == weights
