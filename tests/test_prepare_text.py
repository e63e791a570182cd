"""Text becomes a folder of tokens: all of it, in order, once; and no accident leaves anything half done."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.cli import execute
from minillm.data import batches, files, prepare_text, shards
from minillm.data.batches import open_dataset
from minillm.data.prepare_text import PrepareTextSettings, run, tokens
from minillm.data.shards import PartWriter, ShardedTokens, has_validation, is_prepared_text, map_part, read_config
from minillm.data.store import is_prepared, open_prepared
from minillm.lock import FolderLock
from minillm.log import UserError
from minillm.text.tokenizer import SPECIAL_TOKENS, Tokenizer

SHIPPED = Tokenizer.load()
SOURCE = Path(__file__).resolve().parents[1] / "src"
TEXTS = [f"Story {number}: the 小猫 number {number} likes fish.\n\n" * (1 + number % 5) for number in range(200)]


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({column: text, "id": n}, ensure_ascii=False) + "\n" for n, text in enumerate(texts))
    path.write_text(lines, encoding="utf-8")
    return path


def prepare(*sources: Path | str, output: Path, **more: Any) -> Path:
    run(PrepareTextSettings(input=tuple(map(str, sources)), output_dir=str(output), **more))
    return output


def documents(folder: Path, part: str) -> list[list[int]]:
    ids, offsets = map_part(folder, part)
    return [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def encoded(texts: list[str], tokenizer: Tokenizer = SHIPPED) -> list[list[int]]:
    return [[*tokenizer.encode(text), tokenizer.end_of_text_id] for text in texts]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commits after every few documents."""
    monkeypatch.setattr(tokens, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(tokens, "CHUNK_CHARACTERS", 1_000)
    yield


def test_every_document_is_there_once_in_order_and_ended(tmp_path: Path) -> None:
    folder = prepare(write(tmp_path / "a.jsonl", TEXTS), output=tmp_path / "out", val_fraction=0.1)
    train, val = documents(folder, "train"), documents(folder, "val")
    every = encoded(TEXTS)
    assert 5 < len(val) < 40
    assert train == [ids for ids in every if ids not in val] and val == [ids for ids in every if ids in val]
    config = read_config(folder)
    assert config["dtype"] == "uint16" and config["val"]["documents"] == len(val)
    assert config["train"]["text_bytes"] + config["val"]["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert sorted(content(folder)) == sorted([*config["sha256"], "config.json"])
    assert {"train_tokens.bin", "val_tokens.bin", "tokenizer.json", "tokenizer_config.json"} <= set(content(folder))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]


def test_a_side_depends_on_the_text_and_the_seed_alone(tmp_path: Path) -> None:
    first = prepare(write(tmp_path / "a.jsonl", TEXTS), output=tmp_path / "first", val_fraction=0.2)
    parts = [TEXTS[:50], TEXTS[50:] + TEXTS[:20]]
    for number, texts in enumerate(parts):
        write(tmp_path / "more" / f"{1 - number}.jsonl", texts)
    second = prepare(tmp_path / "more", output=tmp_path / "second", val_fraction=0.2)
    val = documents(first, "val")
    assert all(ids in val for ids in documents(second, "val")), "copies of a text are on one side"
    assert not any(ids in val for ids in documents(second, "train"))
    other = prepare(tmp_path / "a.jsonl", output=tmp_path / "other", val_fraction=0.2, seed=1)
    assert documents(other, "val") != val


def test_workers_change_nothing(tmp_path: Path, small_chunks: None) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    here = prepare(source, output=tmp_path / "here")
    there = prepare(source, output=tmp_path / "there", num_workers=2)
    assert content(here) == content(there)


def test_several_files_are_read_as_one(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    whole = prepare(source, output=tmp_path / "whole", val_fraction=0.1)
    cut = prepare(source, output=tmp_path / "cut", val_fraction=0.1, shard_tokens="0.5K")
    sizes = read_config(cut)["train"]["shard_tokens"]
    assert len(sizes) > 5 and all(500 <= size < 700 for size in sizes[:-1])
    assert (cut / "train_tokens_00001.bin").is_file() and not (cut / "train_tokens.bin").exists()
    assert documents(cut, "train") == documents(whole, "train")
    one, many = (open_dataset("pretrain", folder, SHIPPED, max_seq_len=64) for folder in (whole, cut))
    rows = np.arange(len(one))
    assert len(one) == len(many) and np.array_equal(one.rows(rows).tokens, many.rows(rows).tokens)  # type: ignore[union-attr]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 30), st.integers(0, 30))
def test_a_slice_of_several_files_is_that_of_the_whole(sizes: list[int], start: int, stop: int) -> None:
    whole = np.arange(sum(sizes), dtype=np.uint16)
    cuts = np.cumsum(sizes)[:-1]
    assert np.array_equal(ShardedTokens(np.split(whole, cuts))[start:stop], whole[start:stop])


def test_pretraining_reads_the_folder_with_its_tokenizer_and_its_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    folder = prepare(source, output=tmp_path / "out", vocab_size=290, val_fraction=0.1, max_seq_len=32)
    sizes = ["--hidden_size", "32", "--num_hidden_layers", "1", "--max_steps", "1", "--batch_size", "2"]
    arguments = [*sizes, "--max_seq_len", "32", "--no_wandb", "--out_dir", str(tmp_path / "run")]
    opened = []
    original = open_prepared

    def watch(*arguments: Any, **named: Any) -> Any:
        opened.append((str(arguments[0]), named["part"]))
        return original(*arguments, **named)

    monkeypatch.setattr(batches, "open_prepared", watch)
    execute(["pretrain", "--data_path", str(folder), *arguments])
    assert opened == [(str(folder), "train"), (str(folder), "val")]
    saved = Tokenizer.load(tmp_path / "run" / "pretrain_32")
    assert saved.json_text == Tokenizer.load(folder).json_text and saved.vocab_size == 290


def test_a_prepared_folder_is_checked_before_it_is_used(tmp_path: Path) -> None:
    folder = prepare(write(tmp_path / "a.jsonl", TEXTS), output=tmp_path / "out")
    assert is_prepared(folder) and is_prepared_text(folder) and has_validation(folder)
    with pytest.raises(UserError, match="holds texts, but pairs"):
        open_prepared(folder, SHIPPED, kind="pairs")
    vocabulary = json.loads(SHIPPED.json_text)
    vocabulary["model"]["merges"].pop()
    with pytest.raises(UserError, match="another tokenizer"):
        open_prepared(folder, Tokenizer(json.dumps(vocabulary), ""), kind="texts")
    with (folder / "train_tokens.bin").open("rb+") as stream:
        stream.write(b"\1\1\1\1")
    with pytest.raises(UserError, match=r"train_tokens\.bin is not what was written"):
        open_prepared(folder, SHIPPED, kind="texts")
    assert open_prepared(folder, SHIPPED, kind="texts", part="val").documents > 0


def test_running_again_does_nothing_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    folder = prepare(source, output=tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    prepare(source, output=folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert "nothing to do" in capsys.readouterr().err


def test_other_input_or_settings_for_the_same_folder_are_refused_by_name(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    folder = prepare(source, output=tmp_path / "out")
    before = content(folder)
    with pytest.raises(UserError, match="--seed: there 42, now 7"):
        prepare(source, output=folder, seed=7)
    write(source, TEXTS[:-1])
    with pytest.raises(UserError, match=r"a\.jsonl has changed"):
        prepare(source, output=folder)
    with pytest.raises(UserError, match=r"b\.jsonl is new"):
        prepare(source, write(tmp_path / "b.jsonl", TEXTS), output=folder)
    assert content(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(UserError, match="something else"):
        prepare(source, output=tmp_path / "mine")
    with pytest.raises(UserError, match="holds the input"):
        prepare(source, output=tmp_path)


PROGRAM = """
import sys, time
from minillm.data.prepare_text import PrepareTextSettings, run, tokens
if __name__ == "__main__":
    tokens.COMMIT_SECONDS, tokens.CHUNK_CHARACTERS = 0.0, 1_000
    write_json = tokens.write_json
    def slowly(path, value):
        write_json(path, value)
        time.sleep(0.05)
    tokens.write_json = slowly
    run(PrepareTextSettings(input=tuple(sys.argv[2:]), output_dir=sys.argv[1], shard_tokens="3K", vocab_size=500))
"""


def test_killed_and_started_again_the_bytes_are_those_of_one_run(tmp_path: Path, small_chunks: None) -> None:
    sources = [write(tmp_path / "a.jsonl", TEXTS[:150]), write(tmp_path / "b.jsonl", [*TEXTS[150:], "", *TEXTS[:20]])]
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as stream:
        stream.write(sources[0].read_bytes())
    sources[0] = tmp_path / "a.jsonl.gz"
    output, building = tmp_path / "out", tmp_path / "out.preparing"
    command = [sys.executable, "-c", PROGRAM, str(output), *map(str, sources)]
    for wanted in (2, 30, 60):  # documents behind the commit at which it is killed
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SOURCE)}, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            try:
                state = json.loads((building / "state.json").read_text())
            except (OSError, ValueError):
                state = {}
            if state.get("train", {}).get("documents", 0) >= wanted:
                break
            time.sleep(0.005)
        assert process.poll() is None, "it was to be killed while it worked"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists(), "nothing half done stands under the final name"
        with (building / "train_tokens_00000.bin").open("ab") as stream:
            stream.write(b"what was written after the last commit")
    settings_of = {"shard_tokens": "3K", "vocab_size": 500}
    prepare(*sources, output=output, **settings_of)
    one_run = prepare(*sources, output=tmp_path / "whole", **settings_of)
    assert content(output) == content(one_run)
    assert read_config(output)["report"]["reasons"] == {"empty text": 1}


def test_stopped_while_it_is_finished_it_finishes_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    whole = prepare(source, output=tmp_path / "whole")
    # the second: behind config.json, before the folder is renamed
    for place, stop in ((tokens, "file_sha256"), (prepare_text, "put_in_place")):
        with monkeypatch.context() as patch:
            patch.setattr(place, stop, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare(source, output=tmp_path / stop)
        assert not (tmp_path / stop).exists()
        assert content(prepare(source, output=tmp_path / stop)) == content(whole)


def test_a_full_disk_loses_nothing(tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    calls = iter(range(1_000))
    original = shards._sync

    def full(stream: Any) -> None:
        if next(calls) == 20:
            raise OSError(28, "No space left on device")
        original(stream)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_sync", full)
        with pytest.raises(UserError, match="No space left on device.*it goes on"):
            prepare(source, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = json.loads((tmp_path / "out.preparing" / "state.json").read_text())["train"]["documents"]
    assert 0 < done < len(TEXTS)
    with pytest.raises(UserError, match="--seed: there 42, now 1"):
        prepare(source, output=tmp_path / "out", seed=1)
    whole = prepare(source, output=tmp_path / "whole")
    assert content(prepare(source, output=tmp_path / "out")) == content(whole)


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    other = FolderLock(tmp_path / "out.preparing", "preparing")
    with pytest.raises(UserError, match="Another process is preparing .*out.preparing"):
        prepare(source, output=tmp_path / "out")
    other.close()
    prepare(source, output=tmp_path / "out")


def test_every_form_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = write(tmp_path / "lines.jsonl", TEXTS, column="story").read_bytes()
    with gzip.open(tmp_path / "lines.jsonl.gz", "wb") as stream:
        stream.write(lines)
    frames = [zstandard.compress(lines[:5_000]), zstandard.compress(lines[5_000:])]
    (tmp_path / "lines.jsonl.zst").write_bytes(b"".join(frames))
    table = pyarrow.table({"story": TEXTS, "id": list(range(len(TEXTS)))})
    parquet.write_table(table, tmp_path / "table.parquet", row_group_size=30)
    marked = "<|endoftext|>".join(TEXTS).encode()
    (tmp_path / "plain.txt").write_bytes(marked)
    (tmp_path / "plain.txt.zst").write_bytes(zstandard.ZstdCompressor().compressobj().compress(b"") or b"")
    (tmp_path / "plain.txt.zst").write_bytes(zstandard.compress(marked))
    for number, name in enumerate(("lines.jsonl", "lines.jsonl.gz", "lines.jsonl.zst", "table.parquet")):
        folder = prepare(tmp_path / name, output=tmp_path / f"o{number}", text_column="story", val_fraction=0.0)
        assert documents(folder, "train") == encoded(TEXTS) and not has_validation(folder)
    for number, name in enumerate(("plain.txt", "plain.txt.zst"), 10):
        folder = prepare(tmp_path / name, output=tmp_path / f"o{number}", text_column="story", val_fraction=0.0)
        assert documents(folder, "train") == encoded([text.strip("\r\n") for text in TEXTS])
    folder = prepare(
        str(tmp_path / "lines.json*"), tmp_path / "plain.txt", output=tmp_path / "all", text_column="story"
    )
    assert sum(read_config(folder)[part]["documents"] for part in ("train", "val")) == 4 * len(TEXTS)


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet"])
def test_what_datasets_streams_is_read_and_gone_on_with(
    tmp_path: Path, form: str, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    path = write(tmp_path / "a.jsonl", TEXTS, column="story")
    if form == "jsonl.gz":
        with gzip.open(tmp_path / "a.jsonl.gz", "wb") as stream:
            stream.write(path.read_bytes())
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"story": TEXTS, "n": [1] * len(TEXTS)}), tmp_path / "a.parquet")
    address = f"file://{tmp_path}/a.{form}"
    writes = iter(range(1_000))
    original = tokens.write_json

    def stopped(path: Path, value: Any) -> None:
        original(path, value)
        if next(writes) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokens, "write_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare(address, output=tmp_path / "out", text_column="story", val_fraction=0.0)
    folder = prepare(address, output=tmp_path / "out", text_column="story", val_fraction=0.0)
    assert documents(folder, "train") == encoded(TEXTS)
    with pytest.raises(UserError, match="has no column 'text'.*story|no story field|no text field"):
        prepare(address, output=tmp_path / "other")


def test_a_dataset_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    asked = []

    def refuse(*arguments: Any, **named: Any) -> None:
        asked.append((*arguments, named["split"], named["streaming"]))
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for name in ("tinystories", "fineweb-edu", "someone/texts:small"):
        with pytest.raises(UserError, match=f"{name} .*no route to the hub"):
            prepare(name, output=tmp_path / "out")
    assert asked == [
        ("roneneldan/TinyStories", None, "train", True),
        ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True),
        ("someone/texts", "small", "train", True),
    ]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"Data not found: data/story\.jsnol|Data not found"):
        prepare(tmp_path / "story.jsnol", output=tmp_path / "out")


def damaged(folder: Path, kind: str) -> tuple[Path, str]:
    """(input, what the error says)"""
    write(folder / "good.jsonl", TEXTS)
    data = (folder / "good.jsonl").read_bytes()
    if kind == "gz":
        (folder / "bad.jsonl.gz").write_bytes(gzip.compress(os.urandom(3_000).hex().encode() + data)[:-500])
        return folder / "bad.jsonl.gz", "damaged"
    if kind == "zst":
        zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
        (folder / "bad.jsonl.zst").write_bytes(zstandard.compress(data)[:-20])
        return folder / "bad.jsonl.zst", "damaged"
    if kind == "not zst":
        pytest.importorskip("zstandard", reason="zstandard is not installed")
        (folder / "bad.txt.zst").write_bytes(data)
        return folder / "bad.txt.zst", "damaged"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": TEXTS}), folder / "bad.parquet")
        (folder / "bad.parquet").write_bytes((folder / "bad.parquet").read_bytes()[:-200])
        return folder / "bad.parquet", "parquet"
    if kind == "empty file":
        (folder / "bad.jsonl").touch()
        return folder / "bad.jsonl", "empty"
    if kind == "no data":
        (folder / "none").mkdir()
        (folder / "none" / "picture.png").touch()
        return folder / "none", "no data files"
    if kind == "column":
        return write(folder / "bad.jsonl", TEXTS, column="story"), "--text_column"
    if kind == "long column":
        return write(folder / "bad.jsonl", ["x"] * 1_500, column="story"), "none of the first 1,000 rows.*id, story"
    raise ValueError(kind)


@pytest.mark.parametrize("kind", ["gz", "zst", "not zst", "parquet", "empty file", "no data", "column", "long column"])
def test_input_that_cannot_be_used_is_an_error_that_says_so_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    path, words = damaged(tmp_path / "in", kind)
    for more in ({}, {"vocab_size": 300}):
        with pytest.raises(UserError, match=f"(?s){words}"):
            prepare(path, output=tmp_path / "out", **more)
    assert [each.name for each in tmp_path.iterdir()] == ["in"]


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_BYTES", 2_000_000)
    rows = [json.dumps({"text": text}).encode() for text in ("one", "a" * 1_000_000, "b" * 2_500_000, "", "last")]
    bad = [b'{"text": "\xff\xfe"}', b"{not json", b'{"text": 7}', b'{"text": "\\ud800"}', b"[1]"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*rows, *bad]) + b"\n")
    folder = prepare(path, output=tmp_path / "out", val_fraction=0.0)
    assert documents(folder, "train") == encoded(["one", "a" * 1_000_000, "last"])
    assert read_config(folder)["report"]["reasons"] == {
        "a line longer than 2 MB": 1, "empty text": 1, "invalid UTF-8": 1, "invalid JSON": 2,
        "text is not a string": 1, "not a JSON object": 1,
    }  # fmt: skip


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    description = json.loads(SHIPPED.json_text)
    description["model"]["vocab"] |= {f"unused{number}": number for number in range(6_400, 70_000)}
    large = Tokenizer(json.dumps(description), "")
    large.save(tmp_path / "tokenizer")
    folder = prepare(write(tmp_path / "a.jsonl", TEXTS), output=tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    assert read_config(folder)["dtype"] == "uint32"
    store = open_prepared(folder, Tokenizer.load(folder), kind="texts")
    assert store.tokens.dtype == np.uint32 and large.decode(store.tokens[: store.offsets[1]].tolist()) in TEXTS


def test_a_tokenizer_is_trained_on_the_text_that_is_not_held_out(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["zyzzyva loves zyzzyva"] * 3 + TEXTS)
    folder = prepare(source, output=tmp_path / "out", vocab_size=420)
    own = Tokenizer.load(folder)
    assert 300 < own.vocab_size <= 420
    texts = sorted(documents(folder, "train") + documents(folder, "val"))
    assert texts == sorted(encoded(["zyzzyva loves zyzzyva"] * 3 + TEXTS, own))
    assert content(prepare(source, output=tmp_path / "again", vocab_size=420)) == content(folder)


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    for more, words in (
        ({"tokenizer": str(tmp_path), "vocab_size": 500}, "give one of them"),
        ({"tokenizer_type": "sentencepiece"}, "--vocab_size"),
        ({"shard_tokens": "many"}, "'many' is not a number of tokens"),
        ({"vocab_size": 100}, "too small"),
        ({"vocab_size": 100, "tokenizer_type": "sentencepiece"}, "too small"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(source, output=tmp_path / "out", **more)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_part_goes_back_to_its_last_commit(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path, "train", "uint16", shard_tokens=5)
    writer.write(np.arange(6, dtype=np.uint16), np.array([2, 4]), 10)
    state = writer.commit()
    writer.write(np.arange(9, dtype=np.uint16), np.array([3, 6]), 10)
    writer.close()
    again = PartWriter(tmp_path, "train", "uint16", shard_tokens=5)
    again.restore(state)
    assert (again.tokens, again.documents, again.text_bytes) == (6, 2, 10)
    again.write(np.array([7], dtype=np.uint16), np.array([1]), 1)
    assert again.finish() == {
        "files": ["train_tokens_00000.bin", "train_tokens_00001.bin"], "offsets": "train_offsets.npy",
        "shard_tokens": [6, 1], "tokens": 7, "documents": 3, "text_bytes": 11,
    }  # fmt: skip
    assert np.load(tmp_path / "train_offsets.npy").tolist() == [0, 2, 6, 7]
    (tmp_path / "train_tokens_00001.bin").unlink()
    with pytest.raises(UserError, match="damaged"):
        PartWriter(tmp_path, "train", "uint16", 5).restore({"shards": [6, 1], "documents": 3, "text_bytes": 11})


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    place = tmp_path_factory.mktemp("sentencepiece")
    code = Path(__file__).read_text(encoding="utf-8").split("\n\n\n")
    source = write(place / "a.jsonl", [*TEXTS, *code])
    return prepare(source, output=place / "out", vocab_size=800, tokenizer_type="sentencepiece")


PIECES = [
    *SPECIAL_TOKENS, "<unk>", "<0x41>", "  ", "    ", "\n", "\t", "\r\n", "▁", "aaaa", "----", "小猫", "世界", "🙂",
    "12", "é", "e\u0301", "\0", "the ", " of", "    return", "\u3000", "\u00a0",
]  # fmt: skip
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
awkward_text = st.lists(st.one_of(any_text, st.sampled_from(PIECES)), max_size=10).map("".join)


def test_a_sentencepiece_model_and_its_tokenizer_json_give_the_same_ids(sentencepiece_folder: Path) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    ours = Tokenizer.load(sentencepiece_folder)
    assert model.get_piece_size() == ours.vocab_size <= 800
    assert [model.id_to_piece(index) for index in range(10)] == list(SPECIAL_TOKENS)
    assert [ours.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(10))

    @settings(max_examples=300, deadline=None)
    @given(awkward_text)
    def check(text: str) -> None:
        ids = ours.encode(text)
        assert ids == model.encode(text)
        shown = text.replace("▁", " ")  # SentencePiece's own sign for a space
        assert ours.decode(ids) == shown and ours.token_bytes(ids) == len(shown.encode())

    check()
    every = TEXTS + [Path(__file__).read_text(encoding="utf-8")]
    assert ours.encode_batch(every) == model.encode(every)


def test_a_folder_with_only_a_sentencepiece_model_is_a_tokenizer(sentencepiece_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes())
    whole = Tokenizer.load(sentencepiece_folder)
    assert Tokenizer.load(tmp_path).json_text == whole.json_text
    assert Tokenizer.load(tmp_path / "tokenizer.model").json_text == whole.json_text
    (tmp_path / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="not a tokenizer.model"):
        Tokenizer.load(tmp_path)


def test_an_existing_sentencepiece_tokenizer_is_taken_over_whole(sentencepiece_folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    folder = prepare(source, output=tmp_path / "out", tokenizer=str(sentencepiece_folder))
    for name in ("tokenizer.model", "tokenizer.json"):
        assert (folder / name).read_bytes() == (sentencepiece_folder / name).read_bytes()
