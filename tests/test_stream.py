"""Text tokenized while the model trains: the rows of a store in file order, and a run that resumes to the row."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import TINY, equal, load, without_times

from minillm.cli import main
from minillm.data import stream
from minillm.data.batches import TextBlocks, open_dataset
from minillm.data.files import RowReport
from minillm.data.pool import ahead
from minillm.data.prepare_text import PrepareTextSettings
from minillm.data.prepare_text import run as prepare_text
from minillm.data.stream import TextStream, open_stream
from minillm.log import UserError
from minillm.text.tokenizer import Tokenizer

TEXTS = [f"Story {number}: the 小猫 number {number} likes fish.\n\n" * (1 + number % 7) for number in range(120)]
LENGTH = 32


@lru_cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several chunks and groups even of little data; and no thread may be left behind."""
    before = set(threading.enumerate())
    monkeypatch.setattr(stream, "CHUNK_CHARACTERS", 700)
    monkeypatch.setattr(stream, "GROUP_TOKENS", 100)
    yield
    left = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("Thread")]
    for thread in left:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in left)


def write(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def with_bad_rows(path: Path) -> Path:
    """Two good rows after each bad one."""
    lines = write(path, TEXTS).read_text(encoding="utf-8").splitlines()
    bad = ["{not json", '{"text": ""}', '{"story": "x"}']
    mixed = [line for n, good in enumerate(lines) for line in ([bad[n // 2 % 3]] if n % 2 == 0 else []) + [good]]
    path.write_text("\n".join(mixed) + "\n", encoding="utf-8")
    return path


def opened(*paths: Path | str, **more: Any) -> tuple[TextStream, TextBlocks | None]:
    return open_stream([str(path) for path in paths], tokenizer(), max_seq_len=LENGTH, **more)


def stored(path: Path) -> np.ndarray:
    dataset = open_dataset("pretrain", path, tokenizer(), max_seq_len=LENGTH)
    assert isinstance(dataset, TextBlocks)
    return dataset.rows(np.arange(len(dataset))).tokens


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "txt", "parquet", "folder"])
def test_the_rows_are_those_of_a_store_in_file_order_pass_after_pass(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    if form == "jsonl.gz":
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    elif form == "txt":
        (tmp_path / "a.txt").write_text("<|endoftext|>".join(TEXTS), encoding="utf-8")
    elif form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    elif form == "folder":
        write(tmp_path / "in" / "1.jsonl", TEXTS[:50])
        write(tmp_path / "in" / "2.jsonl", TEXTS[50:])
    source = tmp_path / ("in" if form == "folder" else f"a.{form}")
    rows = stored(source)
    data, held_out = opened(source)
    assert held_out is None
    for start in range(0, 2 * len(rows), 5):
        batch = data.take(start, 5)
        assert batch.tokens.tolist() == np.take(rows, range(start, start + 5), axis=0, mode="wrap").tolist()
        assert batch.sample_ids.tolist() == list(range(start, start + 5)) and batch.loss_mask.all()
        assert batch.tokens.dtype == np.int64 and batch.segments is None
    assert data.epoch(0) >= 1.0
    data.close()


def test_from_any_row_on_it_is_the_same_stream_with_the_same_report(tmp_path: Path) -> None:
    write(tmp_path / "in" / "0.jsonl", TEXTS[:7])
    with_bad_rows(tmp_path / "in" / "1.jsonl")
    write(tmp_path / "in" / "2.jsonl", TEXTS[7:9])
    data, _ = opened(tmp_path / "in")
    count = len(stored(tmp_path / "in")) + 9
    states, rows = [], []
    for slot in range(count):
        states.append(json.loads(json.dumps(data.state())))
        rows.append(data.take(slot, 1).tokens[0].tolist())
    end = data.state()
    data.close()
    for slot in [*range(0, count, 11), count - 9, count - 8, count - 10]:
        again, _ = opened(tmp_path / "in", saved=states[slot])
        assert again.take(slot, count - slot).tokens.tolist() == rows[slot:]
        assert again.state() == end
        again.close()
    report = RowReport.from_dict(end["position"]["report"])
    assert report.counts() == {"empty text": 20, "invalid JSON": 20, "no text field": 20}
    assert report.used == len(TEXTS) + 9
    assert report.places["invalid JSON"][0] == f"{tmp_path / 'in' / '1.jsonl'}:1"


def test_what_was_used_is_not_tokenized_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    data, _ = opened(path)
    data.take(0, 40)
    state = data.state()
    data.close()
    tokenized: list[str] = []
    original = stream.encoded

    def watched(rows: Any, *arguments: Any) -> Any:
        def seen() -> Iterator[Any]:
            for chunk in rows:
                tokenized.extend(chunk[0])
                yield chunk

        return original(seen(), *arguments)

    monkeypatch.setattr(stream, "encoded", watched)
    again, _ = opened(path, saved=state)
    again.take(40, 1)
    again.close()
    assert tokenized[0] == TEXTS[state["position"]["row"]] and state["position"]["row"] > 10


def test_processes_make_the_same_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS[:40])
    rows = stored(path)
    data, _ = opened(path, num_workers=2)
    assert data.take(0, len(rows)).tokens.tolist() == rows.tolist()
    data.close()


def test_the_first_documents_are_held_out_of_every_epoch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    data, held_out = opened(path, held_out_rows=3)
    assert held_out is not None and len(held_out) >= 3
    first = held_out.store.documents
    assert held_out.store.tokens.tolist() == np.concatenate([_ids(text) for text in TEXTS[:first]]).tolist()
    assert held_out.bytes_per_token == sum(len(t.encode()) for t in TEXTS[:first]) / len(held_out.store.tokens)
    rows = stored(write(tmp_path / "rest.jsonl", TEXTS[first:]))
    state = data.state()
    assert data.take(0, 2 * len(rows)).tokens.tolist() == [*rows.tolist(), *rows.tolist()]
    data.close()
    again, same = opened(path, held_out_rows=50, saved=state)
    assert same is not None and same.store.documents == first, "the checkpoint decides what is held out"
    assert again.take(0, 5).tokens.tolist() == rows[:5].tolist()
    again.close()


def _ids(text: str) -> list[int]:
    return [*tokenizer().encode(text), tokenizer().end_of_text_id]


def test_the_rows_of_an_epoch_are_counted_where_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    data, _ = opened(path, count=True)
    assert data.epoch_rows == len(stored(path)) and data.epoch(2 * data.epoch_rows) == 2.0


def test_a_dataset_that_is_streamed_needs_max_steps_and_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    path = write(tmp_path / "a.jsonl", TEXTS)
    rows = stored(path)
    with pytest.raises(UserError, match="Give --max_steps"):
        opened(f"file://{path}", count=True)
    data, _ = opened(f"file://{path}")
    assert data.take(0, 20).tokens.tolist() == rows[:20].tolist()
    again, _ = opened(f"file://{path}", saved=data.state())
    assert again.take(20, 9).tokens.tolist() == rows[20:29].tolist()
    again.close()
    data.close()


def test_data_that_cannot_be_streamed_is_an_error_that_says_so(tmp_path: Path) -> None:
    short = write(tmp_path / "short.jsonl", ["a few words"])
    with pytest.raises(UserError, match="fewer than 32 tokens"):
        opened(short)[0].take(0, 1)
    with pytest.raises(UserError, match="fewer than the 9 rows that are held out"):
        opened(short, held_out_rows=9)
    with pytest.raises(UserError, match="Data not found"):
        opened(tmp_path / "none.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text('{"story": "x"}\n')
    with pytest.raises(UserError, match=r"(?s)no usable text.*'text'"):
        opened(other)[0].take(0, 1)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(write(tmp_path / "a.jsonl", TEXTS).read_bytes())[:-30])
    data, _ = opened(cut)
    with pytest.raises(UserError, match="damaged"):
        data.take(0, 10_000)
    prepare_text(PrepareTextSettings(input=(str(tmp_path / "a.jsonl"),), output_dir=str(tmp_path / "prepared")))
    with pytest.raises(UserError, match="Leave out --streaming"):
        opened(tmp_path / "prepared")


def test_a_checkpoint_is_not_resumed_with_other_files(tmp_path: Path) -> None:
    write(tmp_path / "in" / "b.jsonl", TEXTS[:60])
    data, _ = opened(tmp_path / "in")
    data.take(0, 3)
    state = data.state()
    data.close()
    write(tmp_path / "in" / "c.jsonl", TEXTS[60:])
    opened(tmp_path / "in", saved=state)
    write(tmp_path / "in" / "a.jsonl", TEXTS)
    with pytest.raises(UserError, match=r"has read b\.jsonl as source 1; now --data_path has a\.jsonl there"):
        opened(tmp_path / "in", saved=state)


def test_items_are_made_ahead_and_errors_come_in_their_place() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            if number == 3:
                third.set()
            if number == 4:
                raise UserError("broken")
            yield number

    results = ahead(items(), 2)
    assert next(results) == 0 and third.wait(5) and made[-1] == 3, "two wait, one is on its way"
    assert [next(results) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match="broken"):
        next(results)
    assert list(ahead(iter("abc"), 1)) == ["a", "b", "c"]


def run(out: Path, *words: str) -> int:
    return main(["pretrain", "--streaming", "--out_dir", str(out), *TINY, "--max_seq_len", "32", *words])


def test_a_resumed_stream_ends_with_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_bad_rows(tmp_path / "a.jsonl")
    flags = ("--data_path", str(path), "--max_steps", "60", "--save_every", "30", "--batch_size", "8")
    assert run(tmp_path / "whole", *flags) == 0
    said = capsys.readouterr().err
    assert "[data]   1 x invalid JSON:" in said and "of 180 rows are not usable" in said
    folder = tmp_path / "whole" / "pretrain_32"
    assert run(tmp_path / "again", *flags, "--resume_from", str(folder / "step_000030.pt")) == 0
    one, two = load(folder / "last.pt"), load(tmp_path / "again" / "pretrain_32" / "last.pt")
    for key in ("model_state_dict", "optimizer_state_dict", "rng_state"):
        assert equal(one[key], two[key]), key
    for key in ("progress", "training_log", "validation_log", "data_state"):
        assert equal(without_times(one[key]), without_times(two[key])), key
    assert one["epoch"] >= 1.0 and one["best_val_loss"] is not None
    assert json.loads((folder / "training_config.json").read_text())["streaming"] is True
    assert "rows not used (" in (folder / "README.md").read_text()
    assert "not the same run" not in capsys.readouterr().err
    assert not (tmp_path / ".minillm_cache").exists(), "no store is written"


def test_without_max_steps_the_run_reads_local_files_as_often_as_epochs_say(tmp_path: Path) -> None:
    path, held_out = write(tmp_path / "a.jsonl", TEXTS[:40]), write(tmp_path / "val.jsonl", TEXTS[40:])
    rows = len(stored(path))
    assert run(tmp_path, "--data_path", str(path), "--validation_data", str(held_out), "--epochs", "1.5") == 0
    content = load(tmp_path / "pretrain_32" / "last.pt")
    assert content["step"] == -(-rows * 3 // 8) and content["epoch"] == content["step"] * 4 / rows


def test_settings_that_do_not_go_with_streaming_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    assert main(["sft", "--streaming", "--data_path", str(path), "--out_dir", str(tmp_path), *TINY]) == 1
    assert "minillm pretrain" in capsys.readouterr().err
    assert run(tmp_path, "--data_path", f"{path}:0.5", f"{path}:0.5") == 2
    assert "without weights" in capsys.readouterr().err
    flags = ("--data_path", str(path), "--max_steps", "1")
    assert main(["pretrain", "--out_dir", str(tmp_path), *TINY, *flags]) == 0
    assert run(tmp_path, *flags, "--resume_from", "auto") == 1
    assert "trained without --streaming" in capsys.readouterr().err
    assert main(["pretrain", "--data_path", "someone/texts", *TINY]) == 1
    assert "`minillm pretrain --streaming`" in capsys.readouterr().err
