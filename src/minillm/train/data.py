"""The data of a run: rows to train on, from a store, a mixture or a stream, and rows to validate with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minillm import processes
from minillm.data.batches import Batch, open_dataset, train_validation_split
from minillm.data.feedback import open_feedback
from minillm.data.instructions import is_prepared_instructions, part_of
from minillm.data.mixture import Mixture, Part
from minillm.data.order import Dataset, Feed
from minillm.data.shards import has_validation
from minillm.data.sources import is_remote
from minillm.data.stream import TextStream, open_stream
from minillm.families.base import Family
from minillm.log import UserError, warn
from minillm.methods.settings import PolicySettings, PreferenceSettings
from minillm.stages import STAGES
from minillm.text.tokenizer import Tokenizer
from minillm.train.settings import Settings


def open_data(
    settings: Settings, stage: str, tokenizer: Tokenizer, family: Family, resumed: dict[str, Any] | None = None
) -> tuple[Feed, Mixture | None, list[str]]:
    """Training rows, validation rows, and the paths of the training data with their weights.

    Raises:
        UserError: data that is missing, damaged, of another form, or not what the checkpoint to resume has read.
    """
    form, file = rows_of(stage, settings)
    paths = settings.data.weighted_paths or [(_default_path(file), None)]

    def opened(source: str, part: str = "train") -> Dataset:
        if form in ("labels", "prompts"):
            return open_feedback(
                form, source, tokenizer, max_seq_len=settings.data.max_seq_len,
                hide_padding=not family.causal, room=room_of_answers(settings) if form == "prompts" else 1,
            )  # fmt: skip
        return open_dataset(
            stage,
            source,
            tokenizer,
            max_seq_len=settings.data.max_seq_len,
            num_workers=settings.data.num_workers,
            tail=family.tail,
            hide_padding=not family.causal,
            part=part,
        )

    def mixed(parts: list[Part]) -> Mixture | None:
        return Mixture(parts, seed=settings.run.seed, pad_id=tokenizer.pad_id) if parts else None

    own = part_of(settings.data.validation_data, "val")
    validation = [Part(own, opened(own, "val" if has_validation(own) else "train"))] if own else []
    if settings.data.streaming:
        names = [path for path, _ in paths]
        stream, held_out = open_stream(
            names,
            tokenizer,
            max_seq_len=settings.data.max_seq_len,
            num_workers=settings.data.num_workers,
            held_out_rows=0 if own else settings.run.eval_samples,
            count=not settings.run.max_steps and processes.is_main(),
            saved=_saved_stream(resumed),
        )
        validation += [Part("the first documents", held_out)] if held_out is not None else []
        return stream, mixed(validation), names
    training = []
    for path, weight in paths:
        _refuse_remote(path)
        source = part_of(path, "train")
        rows = opened(source)
        if not own:
            rows, held_out_rows = _held_out(path, rows, opened, settings.run.seed)
            validation += [Part(source, held_out_rows, weight)] if held_out_rows is not None else []
        training.append(Part(source, rows, weight))
    if not validation:
        warn("one row of data cannot be split: no validation, the training loss decides which checkpoint is best")
    mixture = mixed(training)
    assert mixture is not None
    return mixture, mixed(validation), [_weighted(part, len(training)) for part in training]


class SharedStream:
    """A stream that the main process reads for all of them: each gets its rows of every step, so the order is that of
    one process. A `data.order.Feed`."""

    def __init__(self, stream: TextStream, rows_per_step: int) -> None:
        self.stream, self.rows_per_step = stream, rows_per_step
        self.epoch_rows = stream.epoch_rows = processes.from_main(stream.epoch_rows)
        self._step = -1
        self._tokens = np.zeros((0, 0), np.int64)  # [own rows, L] of the step

    def take(self, slot: int, count: int) -> Batch:
        """The batch of these slots, which are this process's; all of them take the first of a step together."""
        step, place = divmod(slot, self.rows_per_step)
        if step != self._step:
            parts = None
            if processes.is_main():
                rows = self.stream.take(step * self.rows_per_step, self.rows_per_step).tokens
                parts = np.split(rows, processes.size())
            self._step, self._tokens = step, processes.scattered(parts)
        place -= processes.rank() * len(self._tokens)
        tokens = self._tokens[place : place + count]
        return Batch(tokens, np.ones(tokens.shape, dtype=bool), None, None, slot + np.arange(count, dtype=np.int64))

    def epoch(self, slot: int) -> float:
        return self.stream.epoch(slot)

    def describe(self) -> str:
        return self.stream.describe()

    def state(self) -> dict[str, Any]:
        """Of the main process, which alone knows it."""
        return self.stream.state()

    def close(self) -> None:
        self.stream.close()


def room_of_answers(settings: Settings) -> int:
    """Tokens that a prompt must leave. Raises UserError where that is all of max_seq_len."""
    room = settings.of(PolicySettings).max_completion_length
    if room >= settings.data.max_seq_len:
        raise UserError(
            f"--max_completion_length {room} leaves no room for prompts in --max_seq_len {settings.data.max_seq_len}"
        )
    return room


def rows_of(stage: str, settings: Settings) -> tuple[str, str]:
    """The form of a stage's rows and the file they are in where none is named; `--loss kto` reads labelled answers
    where the other preference losses read pairs."""
    if stage == "rlhf" and settings.of(PreferenceSettings).loss == "kto":
        return "labels", "kto.jsonl"
    return STAGES[stage].data, STAGES[stage].data_file


def _default_path(file: str) -> str:
    path = f"data/processed/{file}"
    if not Path(path).exists():
        raise UserError(
            f"no --data_path given and {path} does not exist: minillm data demo --output_dir data/processed"
        )
    return path


def _refuse_remote(path: str) -> None:
    if is_remote(path):
        raise UserError(
            f"Data not found: {path}. A dataset of the hub or an address is read by `minillm pretrain --streaming`, or "
            "prepared once by `minillm data prepare-text` or prepare-instructions."
        )


def _held_out(
    path: str, rows: Dataset, opened: Callable[[str, str], Dataset], seed: int
) -> tuple[Dataset, Dataset | None]:
    """(training rows, validation rows) of one path: those of a prepared folder, else some of the rows."""
    prepared = is_prepared_instructions(Path(path)) and part_of(path, "val")
    if prepared or has_validation(path):
        return rows, opened(prepared or path, "train" if prepared else "val")
    return train_validation_split(rows, seed=seed)


def _weighted(part: Part, parts: int) -> str:
    """What --data_path takes; a single path needs no weight."""
    return part.name if part.weight is None or parts == 1 else f"{part.name}:{part.weight!r}"


def _saved_stream(resumed: dict[str, Any] | None) -> dict[str, Any] | None:
    """Where the checkpoint to resume was in its stream. Raises UserError when it had none."""
    if resumed is None:
        return None
    saved: dict[str, Any] = resumed["data_state"].get("stream") or {}
    if not saved:
        raise UserError("the checkpoint to resume was trained without --streaming: leave the flag out")
    return saved
