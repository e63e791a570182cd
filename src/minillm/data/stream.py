"""`minillm pretrain --streaming`: text straight from files or from a dataset on the hub, tokenized while the model
trains. Nothing is written.

Rows are blocks of max_seq_len tokens in the order of the data, without padding, as `TextBlocks` has them. Where a row
ends is a `Position`: a checkpoint holds one, and reading goes on from there. L max_seq_len, T tokens, N documents.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minillm import log
from minillm.data.batches import Batch, TextBlocks, unusable_rows
from minillm.data.encode import Chunk, encoded
from minillm.data.files import RowReport
from minillm.data.pool import ahead
from minillm.data.sources import Source, find_sources, no_text, read_sources
from minillm.data.store import TokenStore, is_prepared
from minillm.log import UserError

if TYPE_CHECKING:
    from minillm.text.tokenizer import Tokenizer

CHUNK_CHARACTERS = 250_000  # tokenized at once
GROUP_TOKENS, GROUPS_AHEAD = 50_000, 8  # handed from thread to thread at once, and how many may wait
REPORT_FACTOR = 10  # unusable rows are reported at the first, the tenth, the hundredth, ...


@dataclass(frozen=True)
class Position:
    """What comes next: the pass over the data, the source, the rows read of it, and how many tokens of the document
    behind them are used already. report: what became of the rows before it, in the first pass."""

    epoch: int
    source: int
    row: int
    tokens: int
    report: dict[str, Any]


@dataclass(frozen=True)
class Reader:
    """Sources as rows of L tokens, from any position on."""

    sources: Sequence[Source]
    tokenizer: Tokenizer
    max_seq_len: int
    num_workers: int = 0
    start: tuple[int, int] = (0, 0)  # (source, rows read of it) where a pass begins: what lies before is held out

    @property
    def name(self) -> str:
        more = ", ..." if len(self.sources) > 3 else ""
        return ", ".join(source.name for source in self.sources[:3]) + more

    @property
    def dtype(self) -> str:
        return "uint16" if self.tokenizer.vocab_size <= 65_536 else "uint32"

    def rows(self, at: Position) -> Iterator[tuple[np.ndarray, Position]]:
        """Rows [L] and the position behind each, pass after pass, without end. What is left at the end of a pass and
        fills no row is left out.

        Raises UserError as `read_sources`, and when a pass has not one row.
        """
        while True:
            report = RowReport.from_dict(copy.deepcopy(at.report)) if at.epoch == 0 else RowReport(self.name)
            whole, found = (at.source, at.row, at.tokens) == (*self.start, 0), False
            for row in self._pass(at, report):
                found = True
                yield row
            if whole and not found:
                raise UserError(self._no_row(report))
            at = Position(at.epoch + 1, *self.start, 0, report.to_dict() if at.epoch == 0 else at.report)

    def count(self) -> int:
        """How many rows a pass has. Reads and tokenizes all of it."""
        log.info(f"[data] counting the tokens of {self.name}, which --max_steps makes unnecessary")
        report, tokens, size = RowReport(), 0, sum(source.size for source in self.sources)
        with log.progress(size // 1_000 + 1, "[data] counting (KB)") as bar:
            chunks = self._chunks(Position(0, *self.start, 0, report.to_dict()), report, deque())
            for chunk in encoded(chunks, "texts", self.tokenizer, self.dtype, self.num_workers):
                tokens += len(chunk.tokens)
                bar.advance(report.bytes_read // 1_000 - bar.done)
        if tokens < self.max_seq_len:
            raise UserError(self._no_row(report))
        return tokens // self.max_seq_len

    def _pass(self, at: Position, report: RowReport) -> Iterator[tuple[np.ndarray, Position]]:
        """The rows from `at` to the end of the data, once."""
        length, used = self.max_seq_len, at.tokens
        tokens: np.ndarray = np.zeros(0, self.dtype)  # [T] that no row has taken yet
        starts: np.ndarray = np.zeros(0, np.int64)  # [N] where documents begin in them; the first may begin before
        before: list[Position] = []  # of each document
        behind: deque[list[Position]] = deque()
        chunks = self._chunks(at, report, behind)
        for chunk in encoded(chunks, "texts", self.tokenizer, self.dtype, self.num_workers):
            starts = np.concatenate([starts, np.cumsum(chunk.lengths) - chunk.lengths + len(tokens) - used])
            before += behind.popleft()
            tokens = np.concatenate([tokens, chunk.tokens[used:]])
            used = last = 0
            rows = len(tokens) // length
            for end in range(length, rows * length + 1, length):
                last = int(np.searchsorted(starts, end, side="right")) - 1
                yield tokens[end - length : end], replace(before[last], tokens=end - int(starts[last]))
            tokens, starts, before = tokens[rows * length :], starts[last:] - rows * length, before[last:]

    def _chunks(self, at: Position, report: RowReport, behind: deque[list[Position]]) -> Iterator[Chunk]:
        """Texts from `at` on in groups of bounded size; `behind` gets the positions before the texts of each."""
        texts: list[str] = []
        positions: list[Position] = []
        size, before = 0, replace(at, tokens=0)
        start = (at.source, at.row)
        for text, place in read_sources(self.sources, report, column="text", split="train", start=start):
            texts.append(text)
            positions.append(before)
            before = Position(at.epoch, *place, 0, _noted(report, before.report) if at.epoch == 0 else at.report)
            size += len(text)
            if size >= CHUNK_CHARACTERS:
                behind.append(positions)
                yield texts, np.zeros((len(texts), 2), dtype=np.int64)
                texts, positions, size = [], [], 0
        if texts:
            behind.append(positions)
            yield texts, np.zeros((len(texts), 2), dtype=np.int64)

    def _no_row(self, report: RowReport) -> str:
        if not report.used:
            return no_text(self.sources, report, "text")
        held_out = "besides the held-out documents " if self.start != (0, 0) else ""
        return (
            f"{self.name} has {held_out}fewer than {self.max_seq_len} tokens, which do not fill one row: leave out "
            "--streaming, or give a smaller --max_seq_len."
        )


class TextStream:
    """Rows of a reader in their order, made ahead by a thread. Passes over the data follow each other."""

    def __init__(self, reader: Reader, position: Position, epoch_rows: int = 0) -> None:
        self.reader, self.position, self.epoch_rows = reader, position, epoch_rows
        self._said = 0  # unusable rows when they were last reported
        self._groups = ahead(_grouped(reader.rows(position)), GROUPS_AHEAD)
        self._ready: deque[tuple[np.ndarray, Position]] = deque()

    def take(self, slot: int, count: int) -> Batch:
        """The next `count` rows, whose sample ids are the slots."""
        tokens: np.ndarray = np.zeros((count, self.reader.max_seq_len), dtype=np.int64)
        for row in range(count):
            if not self._ready:
                self._ready.extend(next(self._groups))
            tokens[row], position = self._ready.popleft()
            self._move(position)
        return Batch(tokens, np.ones(tokens.shape, dtype=bool), None, None, slot + np.arange(count, dtype=np.int64))

    def _move(self, position: Position) -> None:
        """Notes how far the rows are used, and says what was not usable."""
        unusable = sum(position.report["reasons"].values())
        ended = position.epoch > self.position.epoch == 0 and unusable > 0
        self.position = position
        if ended or unusable >= max(1, self._said * REPORT_FACTOR):
            self._said = unusable
            RowReport.from_dict(position.report).log()

    def epoch(self, slot: int) -> float:
        return slot / self.epoch_rows if self.epoch_rows else float(self.position.epoch)

    def describe(self) -> str:
        report = RowReport.from_dict(self.position.report)
        count = len(self.reader.sources)
        parts = [f"streamed from {count:,} source{'s' if count > 1 else ''} in order"]
        if self.epoch_rows:
            parts.append(f"{self.epoch_rows:,} rows of {self.reader.max_seq_len} an epoch")
        so_far = " so far" if self.position.epoch == 0 else ""
        parts.append(f"{report.used:,} documents read{so_far}")
        return ", ".join(parts + unusable_rows(report))

    def state(self) -> dict[str, Any]:
        return {
            "position": asdict(self.position), "start": list(self.reader.start), "epoch_rows": self.epoch_rows,
            "sources": _names(self.reader.sources),
        }  # fmt: skip

    def close(self) -> None:
        self._groups.close()


def open_stream(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    num_workers: int = 0,
    held_out_rows: int = 0,
    count: bool = False,
    saved: dict[str, Any] | None = None,
) -> tuple[TextStream, TextBlocks | None]:
    """The rows of files and datasets, one after another, and those of the first documents, which are held out.

    held_out_rows: as many documents are held out as fill so many rows; 0: none. count: find out how many rows a pass
    has. saved: the `state()` to go on from, which decides what is held out.
    Raises UserError for a path that cannot be streamed, and for a saved state of other data.
    """
    for path in paths:
        if is_prepared(path):
            raise UserError(f"{path} is prepared: there is nothing to tokenize. Leave out --streaming.")
    reader = Reader(find_sources(paths), tokenizer, max_seq_len, num_workers)
    tokenizer.fast_engine()  # made here, since the thread and this one may both want it
    position = Position(0, 0, 0, 0, RowReport(reader.name).to_dict())
    blocks, epoch_rows = None, 0
    if saved:
        _check_sources(saved, reader.sources)
        held_out_rows = held_out_rows if any(saved["start"]) else 0
        reader = replace(reader, start=tuple(saved["start"]))
        position, epoch_rows = Position(**saved["position"]), saved["epoch_rows"]
    if held_out_rows:
        blocks, behind = _hold_out(reader, held_out_rows)
        if not saved:
            reader, position = replace(reader, start=(behind.source, behind.row)), behind
    if count and not epoch_rows:
        unknown = next((source.name for source in reader.sources if source.path is None), "")
        if unknown:
            raise UserError(f"{unknown}: it is not known how long a streamed dataset is. Give --max_steps.")
        epoch_rows = reader.count()
    return TextStream(reader, position, epoch_rows), blocks


def _hold_out(reader: Reader, rows: int) -> tuple[TextBlocks, Position]:
    """The first documents, up to where a pass begins if that is known, else until they fill so many rows; and the
    position behind them."""
    report = RowReport(reader.name)
    found: list[np.ndarray] = []
    tokens = text_bytes = 0
    for text, place in read_sources(reader.sources, report, column="text", split="train"):
        for chunk in encoded([([text], np.zeros((1, 2), np.int64))], "texts", reader.tokenizer, reader.dtype, 0):
            found.append(chunk.tokens)
            tokens, text_bytes = tokens + len(chunk.tokens), text_bytes + chunk.counts.text_bytes
        enough = place >= reader.start if any(reader.start) else tokens >= rows * reader.max_seq_len
        if enough:
            break
    else:
        if not report.used:
            raise UserError(no_text(reader.sources, report, "text"))
        raise UserError(
            f"{reader.name} has only {tokens:,} tokens, fewer than the {rows} rows that are held out at its beginning. "
            "Give --validation_data or fewer --eval_samples, or leave out --streaming."
        )
    store = TokenStore(
        folder=Path(reader.name),
        kind="texts",
        tokens=np.concatenate(found),
        mask=None,
        offsets=np.cumsum([0, *map(len, found)]).astype(np.int64),
        places=np.zeros((0, 2), dtype=np.int64),
        files=tuple(source.name for source in reader.sources),
        bytes_per_token=text_bytes / tokens,
        report=report,
    )
    blocks = TextBlocks(store, reader.max_seq_len, reader.tokenizer.pad_id)
    return blocks, Position(0, *place, 0, copy.deepcopy(report.to_dict()))


def _check_sources(saved: dict[str, Any], sources: Sequence[Source]) -> None:
    """What was read up to the saved position must still be there, in the same order; more may have come behind it."""
    names, read = _names(sources), saved["position"]["source"] + 1
    for index, name in enumerate(saved["sources"][:read]):
        if index >= len(names) or names[index] != name:
            there = names[index] if index < len(names) else "nothing"
            raise UserError(
                f"The run to resume has read {name} as source {index + 1}; now --data_path has {there} there. Give the "
                "same data in the same order, or start anew without --resume_from."
            )


def _names(sources: Sequence[Source]) -> list[str]:
    return [source.path.name if source.path else source.name for source in sources]


def _noted(report: RowReport, before: dict[str, Any]) -> dict[str, Any]:
    """The report as it is now; it shares with the one before what has not changed."""
    if sum(before["reasons"].values()) == report.unusable:
        return {**before, "used": report.used}
    return copy.deepcopy(report.to_dict())


def _grouped(rows: Iterator[tuple[np.ndarray, Position]]) -> Iterator[list[tuple[np.ndarray, Position]]]:
    """Rows in groups, since handing them from thread to thread one by one would cost more."""
    group: list[tuple[np.ndarray, Position]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row[0])
        if size >= GROUP_TOKENS:
            yield group
            group, size = [], 0
