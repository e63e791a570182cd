"""Every input is tokenized once: the store is reused while nothing changed, and rebuilt when anything did."""

from __future__ import annotations

import json
import multiprocessing
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from minillm.data import encode, store
from minillm.data.store import TokenStore, build_store, cache_root, is_prepared, open_prepared
from minillm.log import UserError
from minillm.text.chat import encode_chat
from minillm.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "How many apples?"}


@lru_cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load()


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(path: Path, count: int = 5) -> Path:
    return write(path, [{"text": f"Story {i}: 小猫 likes fish number {i}."} for i in range(count)])


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def documents(built: TokenStore) -> list[list[int]]:
    return [built.tokens[a:b].tolist() for a, b in zip(built.offsets, built.offsets[1:], strict=False)]


def test_texts_are_stored_as_their_ids_each_ended_by_end_of_text(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl")
    built = build_store(path, tokenizer(), kind="texts")
    originals = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert documents(built) == [[*tokenizer().encode(t), tokenizer().end_of_text_id] for t in originals]
    assert built.tokens.dtype == np.uint16 and built.mask is None and built.documents == 5
    assert built.bytes_per_token == pytest.approx(sum(len(t.encode()) for t in originals) / len(built.tokens))
    assert built.place(3) == f"{path}:4"


def test_conversations_are_stored_exactly_as_encode_chat_gives_them(tmp_path: Path) -> None:
    conversation = [USER, answer("Three. 三个"), USER, answer("<think>hm</think> Four <|im_end|>")]
    path = write(tmp_path / "a.jsonl", [{"messages": conversation}, {"messages": [USER, answer("x" * 50)]}])
    built = build_store(path, tokenizer(), kind="conversations")
    ids, mask = encode_chat(tokenizer(), conversation)
    end = len(ids)
    assert built.mask is not None
    assert documents(built)[0] == ids and built.mask[:end].astype(bool).tolist() == mask


def test_pairs_train_only_what_follows_their_common_turns(tmp_path: Path) -> None:
    common = [USER, answer("Three."), USER]
    row = {"chosen": [*common, answer("Four.")], "rejected": [*common, answer("No idea.")]}
    built = build_store(write(tmp_path / "a.jsonl", [row]), tokenizer(), kind="pairs")
    assert built.mask is not None and built.documents == 2
    for side, expected in zip((0, 1), ("Four.", "No idea."), strict=True):
        span = slice(built.offsets[side], built.offsets[side + 1])
        trained = built.tokens[span][built.mask[span] == 1].tolist()
        assert trained[-1] == tokenizer().end_of_turn_id
        assert tokenizer().decode(trained) == expected


def test_an_unchanged_input_is_not_tokenized_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = texts(tmp_path / "a.jsonl")
    first = build_store(path, tokenizer(), kind="texts")
    monkeypatch.setattr(store, "encoded", lambda *a: pytest.fail("tokenized again"))
    assert documents(build_store(path, tokenizer(), kind="texts")) == documents(first)
    assert first.folder.parent == tmp_path / ".minillm_cache"


def test_a_changed_input_tokenizer_or_kind_gets_its_own_store(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl")
    first = build_store(path, tokenizer(), kind="texts")
    other = Tokenizer(tokenizer().json_text, tokenizer().chat_template + " ")
    texts(path, 6)
    changed = build_store(path, tokenizer(), kind="texts")
    assert len({first.folder, changed.folder, build_store(path, other, kind="texts").folder}) == 3
    assert changed.documents == 6


@pytest.mark.parametrize("damage", ["shorter", "flipped", "missing", "meta"])
def test_a_damaged_store_is_built_again_with_a_warning(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = texts(tmp_path / "a.jsonl")
    good = build_store(path, tokenizer(), kind="texts")
    expected = documents(good)
    file = good.folder / ("meta.json" if damage == "meta" else "tokens.bin")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(bytes(content[:-4]) if damage in ("shorter", "meta") else bytes(content))
    assert documents(build_store(path, tokenizer(), kind="texts")) == expected
    assert "damaged" in capsys.readouterr().err
    assert [p.name for p in good.folder.parent.iterdir()] == [good.folder.name]


def test_unusable_rows_are_reported_again_when_the_store_is_reused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": ""}])
    for _ in range(2):
        report = build_store(path, tokenizer(), kind="texts").report
        assert f"1 x empty text: {path}:2" in capsys.readouterr().err
        assert (report.used, report.counts()) == (1, {"empty text": 1})


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [{"story": "x"}])
    with pytest.raises(UserError, match="no usable row"):
        build_store(path, tokenizer(), kind="texts")
    assert list((tmp_path / ".minillm_cache").iterdir()) == []

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.np, "save", full)
    with pytest.raises(UserError, match="No space left.*MINILLM_CACHE_DIR"):
        build_store(texts(tmp_path / "b.jsonl"), tokenizer(), kind="texts")
    assert list((tmp_path / ".minillm_cache").iterdir()) == []


def test_a_store_made_under_another_path_names_the_path_asked_for(tmp_path: Path) -> None:
    first, second = tmp_path / "one" / "a.jsonl", tmp_path / "two" / "a.jsonl"
    for path in (first, second):
        path.parent.mkdir()
        write(path, [{"text": "A story."}, {"words": "none"}])
    cache = tmp_path / "cache"
    made = build_store(first, tokenizer(), kind="texts", cache_dir=cache)
    found = build_store(second, tokenizer(), kind="texts", cache_dir=cache)
    assert found.folder == made.folder and found.place(0) == f"{second}:1"
    assert [place for places in found.report.places.values() for place in places] == [f"{second}:2"]


def test_the_cache_goes_where_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINILLM_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    data = tmp_path / "data"
    data.mkdir()
    path = texts(data / "a.jsonl")
    assert cache_root(path) == data / ".minillm_cache" == cache_root(data) == cache_root(f"{data}/*.jsonl")
    (data / ".minillm_cache").rmdir()
    data.chmod(0o555)
    try:
        assert cache_root(path) == tmp_path / "home" / "minillm"
        assert not (data / ".minillm_cache").exists()
        monkeypatch.setenv("MINILLM_CACHE_DIR", str(tmp_path / "chosen"))
        assert cache_root(path) == tmp_path / "chosen"
        assert cache_root(path, tmp_path / "argument") == tmp_path / "argument"
        with pytest.raises(UserError, match="MINILLM_CACHE_DIR"):
            cache_root(path, data / "no")
    finally:
        data.chmod(0o755)


def _build(path: str, results: multiprocessing.Queue) -> None:
    built = build_store(path, Tokenizer.load(), kind="texts")
    results.put((str(built.folder), int(built.tokens.astype(np.int64).sum())))


def test_two_processes_may_build_the_same_store_at_once(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl", 3_000)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    builders = [context.Process(target=_build, args=(str(path), results)) for _ in range(2)]
    for builder in builders:
        builder.start()
    found = {results.get(timeout=60) for _ in builders}
    for builder in builders:
        builder.join()
    assert len(found) == 1
    assert [p.name for p in (tmp_path / ".minillm_cache").iterdir()] == [Path(next(iter(found))[0]).name]


def test_a_good_store_that_appears_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = texts(tmp_path / "a.jsonl")
    original = store._put_in_place

    def overtaken(beside: Path, folder: Path, fingerprint: str) -> None:
        monkeypatch.setattr(store, "_put_in_place", original)
        build_store(path, tokenizer(), kind="texts")
        os.utime(folder / "meta.json", (1, 1))
        original(beside, folder, fingerprint)

    monkeypatch.setattr(store, "_put_in_place", overtaken)
    built = build_store(path, tokenizer(), kind="texts")
    assert (built.folder / "meta.json").stat().st_mtime == 1


def test_processes_and_threads_give_the_same_ids_in_the_same_order() -> None:
    rows = [([f"chunk {i}", "中文" * i], np.array([[0, i], [0, i]])) for i in range(1, 7)]
    here = list(encode.encoded(rows, "texts", tokenizer(), "uint16", 0))
    there = list(encode.encoded(rows, "texts", tokenizer(), "uint16", 2))
    assert [c.tokens.tolist() for c in here] == [c.tokens.tolist() for c in there]
    assert [c.places.tolist() for c in here] == [c.places.tolist() for c in there]


def test_a_very_long_text_is_encoded_in_pieces_without_loss(tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog " * 6_000 + "字" * 250_000
    built = build_store(write(tmp_path / "a.jsonl", [{"text": text}]), tokenizer(), kind="texts")
    assert tokenizer().decode(built.tokens.tolist()) == text
    assert built.documents == 1 and (built.tokens == tokenizer().end_of_text_id).sum() == 1


def test_what_a_killed_builder_left_is_removed_after_a_day(tmp_path: Path) -> None:
    path = texts(tmp_path / "a.jsonl")
    for name, age in ((".old.building", 1), (".new.building", None)):
        left = tmp_path / ".minillm_cache" / name
        left.mkdir(parents=True)
        if age is not None:
            os.utime(left, (age, age))
    build_store(path, tokenizer(), kind="texts")
    names = {p.name for p in (tmp_path / ".minillm_cache").iterdir()}
    assert ".new.building" in names and ".old.building" not in names


def test_prepared_token_files_are_read_and_checked(tmp_path: Path) -> None:
    ids = np.arange(300, dtype=np.int32)
    np.save(tmp_path / "a.npy", ids)
    ids.astype(np.uint16).tofile(tmp_path / "a.bin")
    for name in ("a.npy", "a.bin"):
        assert is_prepared(tmp_path / name)
        assert open_prepared(tmp_path / name, tokenizer(), kind="texts").tokens.tolist() == ids.tolist()
    np.save(tmp_path / "big.npy", ids + tokenizer().vocab_size)
    np.save(tmp_path / "flat.npy", ids.astype(np.float32))
    (tmp_path / "bad.npy").write_bytes(b"nothing of the kind")
    (tmp_path / "odd.bin").write_bytes(b"12345")
    (tmp_path / "none.bin").touch()
    for name, words in {
        "big.npy": "another tokenizer",
        "flat.npy": "whole numbers",
        "bad.npy": "not a readable",
        "odd.bin": "multiple of 2",
        "none.bin": "is empty",
    }.items():
        with pytest.raises(UserError, match=words):
            open_prepared(tmp_path / name, tokenizer(), kind="texts")
    with pytest.raises(UserError, match="minillm pretrain"):
        open_prepared(tmp_path / "a.npy", tokenizer(), kind="pairs")


def test_the_folder_of_a_store_is_data_too(tmp_path: Path) -> None:
    built = build_store(texts(tmp_path / "a.jsonl"), tokenizer(), kind="texts")
    assert is_prepared(built.folder)
    assert documents(open_prepared(built.folder, tokenizer(), kind="texts")) == documents(built)
    with pytest.raises(UserError, match="holds texts, but pairs"):
        open_prepared(built.folder, tokenizer(), kind="pairs")
    other = Tokenizer(tokenizer().json_text, tokenizer().chat_template + " ")
    with pytest.raises(UserError, match="another tokenizer"):
        open_prepared(built.folder, other, kind="texts")
    (built.folder / "tokens.bin").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        open_prepared(built.folder, tokenizer(), kind="texts")


def test_a_chat_template_that_writes_no_answers_is_refused(tmp_path: Path) -> None:
    questions = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    other = Tokenizer(tokenizer().json_text, questions)
    path = write(tmp_path / "a.jsonl", [{"messages": [USER, answer("Three.")]}])
    with pytest.raises(UserError, match="no token of any answer would be trained"):
        build_store(path, other, kind="conversations")
