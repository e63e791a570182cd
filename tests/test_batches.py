"""Rows hold exactly the tokens of the data, in an order that is a formula of seed and slot."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from minillm.data.batches import (
    Batch,
    PackedConversations,
    PreferencePairs,
    TextBlocks,
    open_dataset,
    sample_indices,
    split_rows,
    train_validation_split,
)
from minillm.data.packing import fit_to_row, pack_best_fit
from minillm.log import UserError
from minillm.text.chat import encode_chat
from minillm.text.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
USER = {"role": "user", "content": "Tell me more."}


@lru_cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load()


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def talk(*answers: str) -> list[dict[str, str]]:
    return [message for text in answers for message in (USER, answer(text))]


def text_blocks(tmp_path: Path, length: int, count: int = 40) -> TextBlocks:
    rows = [{"text": f"Story number {i} about the sea and 大海."} for i in range(count)]
    dataset = open_dataset("pretrain", write(tmp_path / "t.jsonl", rows), tokenizer(), max_seq_len=length)
    assert isinstance(dataset, TextBlocks)
    return dataset


def conversations(tmp_path: Path, rows: list, length: int) -> PackedConversations:
    path = write(tmp_path / "c.jsonl", [{"conversations": row} for row in rows])
    dataset = open_dataset("full_sft", path, tokenizer(), max_seq_len=length)
    assert isinstance(dataset, PackedConversations)
    return dataset


def pairs(tmp_path: Path, rows: list[tuple[str, str, str]], length: int) -> PreferencePairs:
    written = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows]
    dataset = open_dataset("rlhf", write(tmp_path / "p.jsonl", written), tokenizer(), max_seq_len=length)
    assert isinstance(dataset, PreferencePairs)
    return dataset


def all_rows(dataset: TextBlocks | PackedConversations) -> Batch:
    return dataset.rows(np.arange(len(dataset)))


def test_text_blocks_are_the_stream_cut_without_padding(tmp_path: Path) -> None:
    dataset = text_blocks(tmp_path, 16)
    batch = all_rows(dataset)
    stream = np.asarray(dataset.store.tokens, dtype=np.int64)
    assert batch.tokens.ravel().tolist() == stream[: len(dataset) * 16].tolist()
    assert batch.tokens.dtype == np.int64 and batch.loss_mask.all()
    assert batch.positions is None and batch.segments is None
    assert dataset.left_out == len(stream) - len(dataset) * 16 < 16
    assert f"{len(dataset)} rows of 16" in dataset.describe()


def test_fewer_tokens_than_one_block_make_one_padded_row(tmp_path: Path) -> None:
    dataset = text_blocks(tmp_path, 64, count=1)
    batch, real = all_rows(dataset), len(dataset.store.tokens)
    assert batch.tokens.shape == (1, 64) and real < 64
    assert batch.tokens[0].tolist() == [*dataset.store.tokens.tolist(), *[tokenizer().pad_id] * (64 - real)]
    assert batch.loss_mask[0].tolist() == [True] * real + [False] * (64 - real)


def test_every_conversation_stands_whole_in_one_row(tmp_path: Path) -> None:
    rows = [talk("word " * (3 * i % 17 + 1), "end") for i in range(30)] + [talk(f"number {i}") for i in range(30)]
    dataset = conversations(tmp_path, rows, 96)
    batch = all_rows(dataset)
    found = []
    assert batch.segments is not None and batch.positions is not None
    for row in range(len(dataset)):
        for segment in range(int(batch.segments[row].max()) + 1):
            inside = batch.segments[row] == segment
            assert batch.positions[row][inside].tolist() == list(range(inside.sum()))
            found.append((batch.tokens[row][inside].tolist(), batch.loss_mask[row][inside].tolist()))
        padding = batch.segments[row] == -1
        assert (batch.tokens[row][padding] == tokenizer().pad_id).all()
        assert not batch.loss_mask[row][padding].any() and not batch.positions[row][padding].any()
    assert sorted(found) == sorted(encode_chat(tokenizer(), row) for row in rows)
    assert dataset.packing_efficiency > 0.9


def test_ignore_tokens_follow_conversations_and_nothing_visible_tells_where_they_end(tmp_path: Path) -> None:
    rows = [talk("word " * (3 * i % 17 + 1), f"end {i}") for i in range(60)]
    path = write(tmp_path / "c.jsonl", [{"conversations": row} for row in rows])
    dataset = open_dataset("full_sft", path, tokenizer(), max_seq_len=96, tail=7)
    assert isinstance(dataset, PackedConversations)
    batch, found, tails = all_rows(dataset), [], []
    assert batch.segments is not None and batch.positions is not None
    for row in range(len(dataset)):
        assert not batch.tokens[row][batch.segments[row] == -1].any()  # padding stays padding (id 0)
        for segment in range(int(batch.segments[row].max()) + 1):
            inside = batch.segments[row] == segment
            tokens, mask = batch.tokens[row][inside], batch.loss_mask[row][inside]
            ignored = tokens == tokenizer().ignore_id
            tails.append(int(ignored.sum()))
            assert batch.positions[row][inside].tolist() == list(range(inside.sum()))
            assert not mask[ignored].any() and ignored[len(tokens) - tails[-1] :].all()
            found.append((tokens[~ignored].tolist(), mask[~ignored].tolist()))
    # without the line break that the template puts after the last turn
    wanted = [tuple(part[:-1] for part in encode_chat(tokenizer(), row)) for row in rows]
    assert sorted(found) == sorted(wanted)
    assert all(tokens[-1] == tokenizer().end_of_turn_id and mask[-1] for tokens, mask in found)
    assert set(tails) == set(range(8))
    assert max(np.bincount(tails)) < 20  # of all lengths about as many


def test_tails_belong_to_conversations_and_end_with_the_row(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [{"conversations": talk("word " * (i % 13 + 1))} for i in range(60)])
    datasets = [open_dataset("full_sft", path, tokenizer(), max_seq_len=64, tail=9) for _ in range(2)]
    one, two = (dataset.rows(np.array([3, 0])) for dataset in datasets)
    assert isinstance(one, Batch) and isinstance(two, Batch)
    assert np.array_equal(one.tokens, two.tokens)
    assert (one.tokens == tokenizer().ignore_id).any()
    whole = encode_chat(tokenizer(), talk("one"))[0]
    write(path, [{"conversations": talk("one")} for _ in range(20)])
    full = open_dataset("full_sft", path, tokenizer(), max_seq_len=len(whole) - 1, tail=9)
    assert isinstance(full, PackedConversations)
    assert all_rows(full).tokens.tolist() == [whole[:-1]] * 20  # no room: no tail


def test_padding_is_a_segment_of_its_own_for_models_that_look_ahead(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"text": "A short story about the sea."}])
    dataset = open_dataset("pretrain", path, tokenizer(), max_seq_len=64, hide_padding=True)
    assert isinstance(dataset, TextBlocks)
    batch, real = all_rows(dataset), len(dataset.store.tokens)
    assert batch.segments is not None and batch.segments[0].tolist() == [0] * real + [-1] * (64 - real)
    path = write(tmp_path / "p.jsonl", [{"prompt": "Sky?", "chosen": "Blue. " * 9, "rejected": "No."}])
    pair = open_dataset("rlhf", path, tokenizer(), max_seq_len=128, hide_padding=True)
    assert isinstance(pair, PreferencePairs)
    both = pair.rows(np.array([0]))
    for side, length in zip((both.chosen, both.rejected), pair.lengths):
        assert side.segments is not None
        assert side.segments[0].tolist() == [0] * length + [-1] * (side.tokens.shape[1] - length)
    assert both.rejected.segments is not None and (both.rejected.segments == -1).any()


def test_rows_do_not_depend_on_the_batch_they_come_in(tmp_path: Path) -> None:
    dataset = conversations(tmp_path, [talk("word " * (i % 13 + 1)) for i in range(60)], 64)
    whole = all_rows(dataset)
    picked = dataset.rows(np.array([3, 0, 3]))
    for name in ("tokens", "loss_mask", "positions", "segments", "sample_ids"):
        assert np.array_equal(getattr(picked, name), getattr(whole, name)[[3, 0, 3]])
    assert dataset.rows(np.array([], dtype=int)).tokens.shape == (0, 64)
    with pytest.raises(IndexError):
        dataset.rows(np.array([len(dataset)]))


def test_a_long_conversation_is_cut_after_the_last_answer_that_fits(tmp_path: Path) -> None:
    long = talk("one", "two", "three " * 40)
    dataset = conversations(tmp_path, [long, talk("short")], 64)
    batch = all_rows(dataset)
    assert batch.segments is not None
    kept = batch.tokens[0][batch.segments[0] == 0].tolist()
    assert kept == encode_chat(tokenizer(), long[:4])[0][: len(kept)]
    assert kept[-1] == tokenizer().end_of_turn_id
    assert dataset.truncated == 1 and "1 truncated at a turn boundary" in dataset.describe()


def test_losing_only_the_last_line_break_is_not_a_truncation(tmp_path: Path) -> None:
    whole = encode_chat(tokenizer(), talk("one"))[0]
    dataset = conversations(tmp_path, [talk("one")], len(whole) - 1)
    assert all_rows(dataset).tokens[0].tolist() == whole[:-1]
    assert dataset.truncated == 0


def test_a_first_exchange_that_does_not_fit_is_dropped_and_counted_with_its_place(tmp_path: Path) -> None:
    dataset = conversations(tmp_path, [talk("short"), talk("long " * 99, "short")], 32)
    reason = "first exchange longer than max_seq_len"
    assert dataset.report.counts() == {reason: 1}
    assert dataset.report.places[reason] == [f"{tmp_path / 'c.jsonl'}:2"]
    assert reason in dataset.describe() and "1 conversations" in dataset.describe()
    with pytest.raises(UserError, match="--max_seq_len"):
        conversations(tmp_path, [talk("long " * 99)], 32)


def test_pairs_stand_beside_each_other_padded_to_the_longest(tmp_path: Path) -> None:
    dataset = pairs(tmp_path, [("Sky?", "Blue.", "No idea, sorry."), ("Sea?", "Also blue. " * 9, "Dry.")], 512)
    batch = dataset.rows(np.array([1, 0]))
    chosen, rejected = batch.chosen, batch.rejected
    assert chosen.tokens.shape == rejected.tokens.shape and chosen.tokens.shape[1] % 16 == 0
    assert dataset.rows(np.array([0])).chosen.tokens.shape[1] < chosen.tokens.shape[1]
    assert batch.sample_ids.tolist() == chosen.sample_ids.tolist() == [1, 0]
    ids, mask = encode_chat(tokenizer(), [{"role": "user", "content": "Sky?"}, answer("Blue.")])
    padding = chosen.tokens.shape[1] - len(ids)
    assert chosen.tokens[1].tolist() == ids + [tokenizer().pad_id] * padding
    assert chosen.loss_mask[1].tolist() == mask + [False] * padding
    trained = rejected.tokens[1][rejected.loss_mask[1]]
    assert tokenizer().decode(trained.tolist()) == "No idea, sorry."


def test_answers_of_pairs_are_cut_at_the_limit_and_pairs_without_room_are_dropped(tmp_path: Path) -> None:
    rows = [
        ("Sky?", "It is blue. " * 40, "No idea."),
        ("Long " * 60, "Yes.", "No."),
        ("Same?", "a b c " * 60 + "x", "a b c " * 60 + "y"),
    ]
    dataset = pairs(tmp_path, rows, 56)
    assert len(dataset) == 1 and dataset.truncated == 1
    assert dataset.rows(np.array([0])).chosen.tokens.shape == (1, 56)
    assert dataset.report.places == {
        "prompt leaves no room for the answers in max_seq_len": [f"{tmp_path / 'p.jsonl'}:{line}" for line in (2, 3)]
    }
    with pytest.raises(UserError, match="--max_seq_len"):
        pairs(tmp_path, rows[1:2], 56)


def test_every_epoch_shows_every_row_once_in_another_order() -> None:
    epochs = sample_indices(7, 0, 30, 10).reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_the_row_of_a_slot_is_a_pure_function_of_seed_and_slot() -> None:
    whole = sample_indices(7, 0, 57, 10)
    assert (
        np.concatenate([sample_indices(7, s, min(8, 57 - s), 10) for s in range(0, 57, 8)]).tolist() == whole.tolist()
    )
    assert sample_indices(7, 23, 3, 10).tolist() == whole[23:26].tolist()
    assert sample_indices(8, 0, 57, 10).tolist() != whole.tolist()
    assert sample_indices(0, 0, 6, 6).tolist() == [4, 5, 1, 2, 0, 3]  # on every machine and NumPy
    assert len(sample_indices(0, 5, 0, 6)) == 0
    with pytest.raises(ValueError):
        sample_indices(0, 0, 1, 0)


def test_held_out_rows_are_never_trained(tmp_path: Path) -> None:
    dataset = text_blocks(tmp_path, 8, count=200)
    train, validation = train_validation_split(dataset, seed=3)
    assert validation is not None
    held_out = validation.rows(np.arange(len(validation))).sample_ids
    trained = train.rows(np.arange(len(train))).sample_ids
    assert sorted([*trained, *held_out]) == list(range(len(dataset)))
    assert len(validation) == min(32, len(dataset) // 10) and validation.bytes_per_token == dataset.bytes_per_token
    again = train_validation_split(dataset, seed=3)[1]
    assert again is not None and again.rows(np.arange(1)).sample_ids[0] == held_out[0]
    assert "held-out" in validation.describe()


def test_the_split_holds_out_at_least_one_row_and_at_most_512(tmp_path: Path) -> None:
    dataset = text_blocks(tmp_path, 8, count=3)
    validation = train_validation_split(dataset, seed=0)[1]
    assert validation is not None and len(validation) == 1
    assert [len(split_rows(size, seed=0)[1]) for size in (1, 2, 100, 1_000, 5_000, 1_000_000)] == [
        0,
        1,
        10,
        32,
        100,
        512,
    ]
    single = text_blocks(tmp_path, 512, count=1)
    assert train_validation_split(single, seed=0) == (single, None)


def test_best_fit_packs_tightly_deterministically_and_fast() -> None:
    assert pack_best_fit(np.array([5, 3, 3, 5, 8]), 8).documents.tolist() == [0, 2, 1, 3, 4]
    lengths = np.random.default_rng(0).integers(1, 400, 100_000)
    started = time.perf_counter()
    packing = pack_best_fit(lengths, 512)
    assert time.perf_counter() - started < 2
    assert sorted(packing.documents.tolist()) == list(range(len(lengths)))
    filled = np.add.reduceat(lengths[packing.documents], packing.row_offsets[:-1])
    assert filled.max() <= 512 and filled.mean() > 0.99 * 512
    with pytest.raises(ValueError):
        pack_best_fit(np.array([9]), 8)


def test_fit_to_row_keeps_nothing_of_a_first_answer_that_ends_too_late() -> None:
    offsets = np.array([0, 4, 10, 16])
    mask = np.array([0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0])
    kept, truncated = fit_to_row(offsets, mask, 4)
    assert kept.tolist() == [4, 2, 0] and truncated.tolist() == [False, True, True]


def test_prepared_ids_are_rows_of_pretraining(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(64))
    dataset = open_dataset("pretrain", tmp_path / "ids.npy", tokenizer(), max_seq_len=16)
    assert np.array_equal(dataset.rows(np.array([1])).tokens[0], np.arange(16, 32))  # type: ignore[union-attr]


def test_bytes_per_token_counts_only_what_is_trained(tmp_path: Path) -> None:
    dataset = conversations(tmp_path, [talk("four")], 64)
    trained = int(all_rows(dataset).loss_mask.sum())
    assert dataset.bytes_per_token == pytest.approx(4 / trained)


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a stage"):
        open_dataset("party", tmp_path, tokenizer(), max_seq_len=8)
    with pytest.raises(UserError, match="at least 2"):
        open_dataset("pretrain", tmp_path, tokenizer(), max_seq_len=1)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize(
    ("stage", "name", "rows"),
    [
        ("pretrain", "pretrain_zh_val.jsonl", 231),
        ("full_sft", "sft_mini_512.jsonl", 1710),
        ("rlhf", "dpo_pairs.jsonl", 600),
    ],
)
def test_real_data_is_read_and_delivered_fast(tmp_path: Path, stage: str, name: str, rows: int) -> None:
    dataset = open_dataset(stage, SHARED / name, tokenizer(), max_seq_len=256, cache_dir=tmp_path)
    assert dataset.store.report.used == rows
    order = sample_indices(0, 0, 512, len(dataset))
    started, tokens = time.perf_counter(), 0
    for start in range(0, len(order), 16):
        batch = dataset.rows(order[start : start + 16])
        tokens += batch.tokens.size if isinstance(batch, Batch) else 2 * batch.chosen.tokens.size
    assert tokens / (time.perf_counter() - started) > 2_000_000
