"""Several sources by weight: shares that hold, every row in its turn, and a run that resumes to the bit."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training import TINY, equal, load, without_times

from minillm.cli import main
from minillm.config import UsageError
from minillm.data.batches import Batch, PairBatch, open_dataset
from minillm.data.mixture import SOURCE_IDS, Mixture, Part
from minillm.data.order import checked_indices, sample_indices
from minillm.data.prepare_text import PrepareTextSettings
from minillm.data.prepare_text import run as prepare_text
from minillm.text.tokenizer import Tokenizer
from minillm.train.settings import DataSettings, split_weights


@lru_cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load()


@dataclass(frozen=True)
class Numbers:
    """Rows that hold their own index."""

    size: int
    row_size: float = 4.0
    bytes_per_token: float = 3.0

    def __len__(self) -> int:
        return self.size

    def rows(self, indices: np.ndarray) -> Batch:
        indices = checked_indices(indices, self.size)
        tokens = np.repeat(indices[:, None], 4, axis=1)
        return Batch(tokens, np.ones(tokens.shape, dtype=bool), None, None, indices)

    def describe(self) -> str:
        return f"{self.size} rows"


def mixture(sizes: list[int], weights: list[float] | None = None, seed: int = 7) -> Mixture:
    given = weights or [None] * len(sizes)
    return Mixture(
        [Part(f"s{n}", Numbers(size), weight) for n, (size, weight) in enumerate(zip(sizes, given))],
        seed=seed, pad_id=0,
    )  # fmt: skip


def order_of(mixed: Mixture, count: int, start: int = 0) -> list[tuple[int, int]]:
    """(source, row) of the slots."""
    ids = mixed.take(start, count).sample_ids
    return [(int(each) // SOURCE_IDS, int(each) % SOURCE_IDS) for each in ids]


SIZES_AND_WEIGHTS = st.integers(1, 6).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(1, 40), min_size=count, max_size=count),
        st.lists(st.floats(0.05, 5.0), min_size=count, max_size=count),
    )
)


@settings(max_examples=60, deadline=None)
@given(SIZES_AND_WEIGHTS)
def test_shares_hold_over_every_stretch_of_slots(case: tuple[list[int], list[float]]) -> None:
    mixed = mixture(*case)
    slots = min(2 * mixed.epoch_rows, 500)
    sources = np.array([mixed.source(slot)[0] for slot in range(slots)])
    for source, rows in enumerate(mixed.taken):
        taken = np.cumsum(sources == source)
        wanted = np.arange(1, slots + 1) * rows / mixed.epoch_rows
        assert np.abs(taken - wanted).max() <= len(mixed.parts)


@settings(max_examples=60, deadline=None)
@given(SIZES_AND_WEIGHTS)
def test_an_epoch_has_all_rows_and_the_longest_source_just_once(case: tuple[list[int], list[float]]) -> None:
    sizes, weights = case
    mixed = mixture(sizes, weights)
    assert all(taken >= size for taken, size in zip(mixed.taken, sizes))
    assert any(taken == size for taken, size in zip(mixed.taken, sizes))
    if mixed.epoch_rows < 2_000:
        counts = Counter(order_of(mixed, mixed.epoch_rows))
        assert set(counts) == {(source, row) for source, size in enumerate(sizes) for row in range(size)}
        for source, (taken, size) in enumerate(zip(mixed.taken, sizes)):
            assert {counts[source, row] - taken // size for row in range(size)} <= {0, 1}


def test_weights_are_reached_and_need_not_sum_to_one() -> None:
    for weights in ([0.7, 0.3], [7.0, 3.0]):
        mixed = mixture([1_000, 100], weights)
        assert mixed.taken == [1_000, 429] and mixed.shares == pytest.approx([0.7, 0.3], abs=1e-3)
    assert "70.0 % s0, 1x an epoch" in mixed.describe() and "30.0 % s1, 4.29x an epoch" in mixed.describe()
    assert mixed.epoch(mixed.epoch_rows * 3) == 3.0


def test_without_weights_every_row_comes_once_an_epoch() -> None:
    mixed = mixture([30, 7, 12])
    for epoch in range(3):
        rows = order_of(mixed, 49, epoch * 49)
        assert sorted(rows) == [(source, row) for source, size in enumerate((30, 7, 12)) for row in range(size)]


def test_a_row_is_a_formula_of_seed_and_slot_however_slots_are_asked_for() -> None:
    mixed, count = mixture([11, 5, 3], [0.5, 0.2, 0.3]), 90
    whole = order_of(mixed, count)
    for size in (1, 4, 7):
        cut = [row for slot in range(0, count, size) for row in order_of(mixed, min(size, count - slot), slot)]
        assert cut == whole
    assert order_of(mixture([11, 5, 3], [0.5, 0.2, 0.3]), 5, 60) == whole[60:65]
    assert order_of(mixture([11, 5, 3], [0.5, 0.2, 0.3], seed=8), count) != whole
    small = [row for source, row in whole if source == 2]
    passes = [small[start : start + 3] for start in range(0, len(small) - 2, 3)]
    assert all(sorted(rows) == [0, 1, 2] for rows in passes) and len({tuple(rows) for rows in passes}) > 1


def test_one_source_is_in_the_order_it_always_had() -> None:
    alone = mixture([13])
    assert alone.take(5, 30).sample_ids.tolist() == sample_indices(7, 5, 30, 13).tolist()
    assert alone.describe() == "13 rows" and alone.bytes_per_token == 3.0 and alone.state() == {}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_tokens_of_conversations_come_by_weight_however_full_the_rows_are(tmp_path: Path) -> None:
    def talks(name: str, words: int, count: int) -> Path:
        talk = [
            {"role": "user", "content": "Say it."},
            {"role": "assistant", "content": " ".join(f"word{n}" for n in range(words))},
        ]
        return write(tmp_path / f"{name}.jsonl", [{"messages": talk}] * count)

    paths = [talks("full", 3, 300), talks("half empty", 22, 60)]
    datasets = [open_dataset("full_sft", path, tokenizer(), max_seq_len=128) for path in paths]
    assert datasets[1].row_size < 0.8 * datasets[0].row_size
    mixed = Mixture(
        [Part(path.name, each, weight) for path, each, weight in zip(paths, datasets, (0.4, 0.6))],
        seed=1, pad_id=tokenizer().pad_id,
    )  # fmt: skip
    batch = mixed.take(0, mixed.epoch_rows)
    real = (batch.segments >= 0).sum(axis=1)
    first = batch.sample_ids < SOURCE_IDS
    assert real[first].sum() / real.sum() == pytest.approx(0.4, abs=0.02)


def test_pairs_of_several_sources_stand_in_one_batch_each_as_in_its_own(tmp_path: Path) -> None:
    def pairs(name: str, text: str) -> Path:
        rows = [{"prompt": f"{text} {n}?", "chosen": f"yes {text} {n}", "rejected": f"no {text}"} for n in range(9)]
        return write(tmp_path / f"{name}.jsonl", rows)

    parts = []
    for name, text in (("short", "this"), ("long", "a much longer text that stands here")):
        dataset = open_dataset("rlhf", pairs(name, text), tokenizer(), max_seq_len=128, hide_padding=True)
        parts.append(Part(name, dataset, 0.5))
    batch = Mixture(parts, seed=3, pad_id=tokenizer().pad_id).take(0, 6)
    assert isinstance(batch, PairBatch) and batch.chosen.tokens.shape == batch.rejected.tokens.shape
    assert {int(each) // SOURCE_IDS for each in batch.sample_ids} == {0, 1}
    for place, sample in enumerate(batch.sample_ids.tolist()):
        own = parts[sample // SOURCE_IDS].dataset.rows(np.array([sample % SOURCE_IDS]))
        width = own.chosen.tokens.shape[1]
        for mine, alone in ((batch.chosen, own.chosen), (batch.rejected, own.rejected)):
            assert mine.tokens[place, :width].tolist() == alone.tokens[0].tolist()
            assert (mine.tokens[place, width:] == tokenizer().pad_id).all() and not mine.loss_mask[place, width:].any()
            assert mine.segments is not None and alone.segments is not None
            assert mine.segments[place, :width].tolist() == alone.segments[0].tolist()
            assert (mine.segments[place, width:] == -1).all()


def test_a_padded_text_beside_full_rows_keeps_its_padding_apart(tmp_path: Path) -> None:
    short = write(tmp_path / "short.jsonl", [{"text": "just this"}])
    long = write(tmp_path / "long.jsonl", [{"text": f"story {n} about the sea"} for n in range(40)])
    parts = [
        Part(path.name, open_dataset("pretrain", path, tokenizer(), max_seq_len=32, hide_padding=True))
        for path in (short, long)
    ]
    batch = Mixture(parts, seed=0, pad_id=tokenizer().pad_id).take(0, 1 + len(parts[1].dataset))
    padded = batch.sample_ids < SOURCE_IDS
    assert padded.sum() == 1 and (batch.segments[~padded] == 0).all()
    assert (batch.segments[padded] == -1).sum() == 32 - parts[0].dataset.row_size


def test_a_number_behind_the_last_colon_is_a_weight_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:2").touch()
    assert split_weights(["a.jsonl:0.7", "b:3", "parts-*.jsonl:1e-1"]) == [
        ("a.jsonl", 0.7), ("b", 3.0), ("parts-*.jsonl", 0.1),
    ]  # fmt: skip
    plain = ["C:\\data\\a.jsonl", "run:2", "at:home/a.jsonl", "half:"]
    assert split_weights(plain) == [(path, None) for path in plain]
    assert split_weights(["C:\\data\\a.jsonl:0.5", "run:2:4"]) == [("C:\\data\\a.jsonl", 0.5), ("run:2", 4.0)]
    assert split_weights(["owner/name:2024"], names_with_colons=True) == [("owner/name:2024", None)]
    assert DataSettings(data_path=("",)).weighted_paths == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a:0", "b:1"], "a:0: 0 is no weight"),
        (["a:-0.5", "b:1"], "-0.5 is no weight"),
        (["a:nan", "b:1"], "nan is no weight"),
        (["a:inf"], "inf is no weight"),
        (["a:0.5", "b"], "b has no weight and others have one"),
        (["a:1", "b:1e-9"], "over 1,000,000 times another"),
    ],
)
def test_impossible_weights_are_refused_before_anything_is_read(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=message):
        split_weights(words)
    assert main(["pretrain", "--data_path", *words]) == 2
    assert message in capsys.readouterr().err


def train(command: str, out: Path, *paths: str, flags: tuple[str, ...] = ()) -> None:
    assert main([command, "--data_path", *paths, "--out_dir", str(out), *TINY, *flags]) == 0


def assert_same_end(one: Path, two: Path) -> None:
    first, second = load(one), load(two)
    for key in ("model_state_dict", "optimizer_state_dict", "progress", "training_log", "validation_log", "data_state"):
        assert equal(without_times(first[key]), without_times(second[key])), key


def test_a_mixture_resumes_to_the_bit_and_is_named_with_its_weights(
    demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tmp_path / "held"
    prepare_text(
        PrepareTextSettings(input=(str(demo_data / "pretrain_val.jsonl"),), output_dir=str(held), val_fraction=0.2)
    )
    paths = (f"{demo_data / 'pretrain.jsonl'}:0.75", f"{held}:0.25")
    flags = ("--max_steps", "6", "--save_every", "3", "--eval_every", "3")
    train("pretrain", tmp_path / "whole", *paths, flags=flags)
    folder = tmp_path / "whole" / "pretrain_32"
    resumed = ("--resume_from", str(folder / "step_000003.pt"))
    train("pretrain", tmp_path / "again", *paths, flags=(*flags, *resumed))
    assert_same_end(folder / "last.pt", tmp_path / "again" / "pretrain_32" / "last.pt")
    said = capsys.readouterr().err
    assert re.search(rf"a mixture of 2 sources, .* rows an epoch; 7[456]\.. % {demo_data / 'pretrain.jsonl'}, 1x", said)
    assert "not the same run" not in said and "ar-pretrain+held-" in said
    saved = json.loads((folder / "training_config.json").read_text())
    assert saved["data_path"] == list(paths)
    assert f"{paths[0]} {paths[1]}: a mixture of 2 sources" in (folder / "README.md").read_text()
    assert main(["pretrain", "--config", str(folder / "training_config.json"), "--max_steps", "1"]) == 0
    again = json.loads((folder / "training_config.json").read_text())
    assert again["data_path"] == list(paths)


@pytest.mark.parametrize(("command", "name"), [("sft", "sft"), ("dpo", "dpo")])
def test_other_stages_mix_files_and_globs(command: str, name: str, demo_data: Path, tmp_path: Path) -> None:
    paths = (f"{demo_data / name}.jsonl:1", f"{demo_data}/{name}_v*.jsonl:1")
    train(command, tmp_path, *paths, flags=("--max_steps", "2"))
    folder = tmp_path / ("full_sft_32" if command == "sft" else "rlhf_32")
    content = load(folder / "last.pt")
    assert content["train_config"]["data_path"] == [f"{demo_data / name}.jsonl:1.0", f"{demo_data}/{name}_v*.jsonl:1.0"]
    assert content["best_val_loss"] is not None, "each source holds out rows"


def test_folders_of_different_tokenizers_do_not_mix(
    tmp_path: Path, demo_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(demo_data / "pretrain_val.jsonl")
    prepare_text(PrepareTextSettings(input=(text,), output_dir=str(tmp_path / "a")))
    prepare_text(PrepareTextSettings(input=(text,), output_dir=str(tmp_path / "b"), vocab_size=300))
    assert main(["pretrain", "--data_path", str(tmp_path / "a"), str(tmp_path / "b"), *TINY]) == 1
    assert "another tokenizer than that of" in capsys.readouterr().err
