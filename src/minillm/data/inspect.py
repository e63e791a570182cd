"""`minillm data inspect PATH`: what training will see. A batch in colour, and numbers about the whole.

Green is trained, dim is seen but not trained, grey is padding. Without colour (a log file, NO_COLOR) trained
text stands in [[ ]], padding is counted, and | marks where a document or conversation ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from minillm.data.batches import Batch, PairBatch, sample_indices
from minillm.data.feedback import LabelBatch, PromptBatch
from minillm.data.formats import PURPOSES
from minillm.data.stats import Opened, StatsSettings, measure, opened
from minillm.log import UserError

if TYPE_CHECKING:
    from minillm.text.tokenizer import Tokenizer

TRAINED, SEEN, PADDING, BOUNDARY = "green", "dim", "bright_black", "bold magenta"
BAR_WIDTH = 40


@dataclass(frozen=True)
class InspectSettings(StatsSettings):
    """Settings of `minillm data inspect`."""

    rows: int = field(default=4, metadata={"help": "rows to show"})
    seed: int = field(default=0, metadata={"help": "which rows are shown: the first that training with it sees"})


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a row that are treated alike; kind: trained, seen, padding or boundary."""

    kind: str
    text: str


def run(settings: InspectSettings) -> None:
    """Shows a batch and a summary on stdout. Raises UserError as `open_dataset` does."""
    if settings.rows < 0:
        raise UserError(f"--rows is {settings.rows}; it must not be negative.")
    dataset, tokenizer, stage = opened(settings)
    output = _Output()
    output.line(f"{settings.path} as data for {PURPOSES[stage]}, max_seq_len {settings.max_seq_len}")
    output.legend()
    count = min(settings.rows, len(dataset))
    batch = dataset.rows(sample_indices(settings.seed, 0, count, len(dataset)))
    for row in range(count):
        for title, spans in _shown(batch, row, tokenizer):
            output.row(title, spans)
    for line in summary(dataset, tokenizer):
        output.line(line)


def _shown(
    batch: Batch | PairBatch | LabelBatch | PromptBatch, row: int, tokenizer: Tokenizer
) -> Iterator[tuple[str, Iterator[Span]]]:
    """A title and spans for a row; both sides of a pair, a prompt with the answer that is expected."""
    heading = f"--- row {batch.sample_ids[row]}"
    if isinstance(batch, PromptBatch):
        ids = batch.prompts[row]
        title = f"{heading}: {len(ids)} tokens, expected answer: {_visible(batch.answers[row])}"
        yield title, iter([Span("seen", tokenizer.decode(ids, skip_special=False))])
        return
    if isinstance(batch, PairBatch):
        sides = {" chosen": batch.chosen, " rejected": batch.rejected}
    elif isinstance(batch, LabelBatch):
        sides = {f" label {str(bool(batch.labels[row])).lower()}": batch.answers}
    else:
        sides = {"": batch}
    for side, rows in sides.items():
        yield f"{heading}{side}: {_row_counts(rows, row, tokenizer)}", row_spans(rows, row, tokenizer)


def row_spans(batch: Batch, row: int, tokenizer: Tokenizer) -> Iterator[Span]:
    """The row as spans of trained, seen and padding tokens, with a boundary after every document."""
    tokens, mask = batch.tokens[row], batch.loss_mask[row]
    segments = batch.segments[row] if batch.segments is not None else np.zeros(len(tokens), dtype=np.int32)
    kinds = np.where(mask, 1, np.where((tokens == tokenizer.pad_id) | (segments < 0), 2, 0))
    is_end = tokens == tokenizer.end_of_text_id
    breaks = np.flatnonzero((np.diff(kinds) != 0) | (np.diff(segments) != 0) | is_end[:-1]) + 1
    for start, end in zip([0, *breaks], [*breaks, len(tokens)], strict=True):
        if start and (is_end[start - 1] or segments[start] != segments[start - 1]):
            yield Span("boundary", "|")
        if kinds[start] == 2:
            yield Span("padding", f"<{end - start} padding>")
        else:
            text = tokenizer.decode(tokens[start:end].tolist(), skip_special=False)
            yield Span("trained" if kinds[start] else "seen", text)


def _row_counts(batch: Batch, row: int, tokenizer: Tokenizer) -> str:
    padding = int(((batch.tokens[row] == tokenizer.pad_id) & ~batch.loss_mask[row]).sum())
    trained, total = int(batch.loss_mask[row].sum()), batch.tokens.shape[1]
    return f"{total} tokens, {trained} trained, {total - trained - padding} seen only, {padding} padding"


def summary(dataset: Opened, tokenizer: Tokenizer) -> list[str]:
    """Lines about the whole: counts, lengths, packing, what is truncated or there twice, what is unusable and why."""
    numbers = measure(dataset, tokenizer)
    lines = ["", "Summary", f"  {dataset.describe()}"]
    if numbers["bytes_per_trained_token"] is not None:
        lines.append(f"  text bytes per trained token: {numbers['bytes_per_trained_token']:.2f}")
    if numbers["answers"] is not None:
        lines.append("  answers: {distinct:,} different, {numbers:,} are numbers".format(**numbers["answers"]))
    if numbers["packing_efficiency"] is not None:
        lines.append(f"  packing efficiency: {100 * numbers['packing_efficiency']:.1f} % of the tokens are not padding")
    if numbers["truncated"] is not None:
        lines.append(f"  truncated: {numbers['truncated']:,} ({100 * (numbers['truncated_share'] or 0):.1f} %)")
    lines += ["  tokens per document before truncation:", *_bars(numbers["document_tokens"]["histogram"])]
    twice = numbers["duplicates"]
    lines.append(f"  the same as an earlier document: {twice['documents']:,} ({100 * twice['share']:.1f} %)")
    for each in twice["most_frequent"]:
        lines.append(f"    {each['times']:,} x {each['first']}: {_visible(' '.join(each['text'].split()))[:80]}")
    if not numbers["unusable"]:
        return [*lines, "  rows not used: none"]
    lines.append(f"  rows not used: {sum(numbers['unusable'].values()):,}")
    for reason, count in numbers["unusable"].items():
        lines.append(f"    {count:,} x {reason}: {', '.join(numbers['unusable_places'][reason])}")
    return lines


def _bars(bins: list[dict[str, int]]) -> list[str]:
    width, most = len(f"{bins[-1]['up_to']:,}"), max(each["documents"] for each in bins)
    lines = []
    for each in bins:
        bar = "#" * (-(-BAR_WIDTH * each["documents"] // most))
        lines.append(f"    up to {each['up_to']:>{width},}: {each['documents']:>8,} {bar}".rstrip())
    return lines


class _Output:
    """Writes to stdout: with rich and colours on a terminal, as plain text with marks elsewhere."""

    def __init__(self) -> None:
        forced = bool(os.environ.get("FORCE_COLOR"))
        self.colour = (sys.stdout.isatty() or forced) and not os.environ.get("NO_COLOR")
        self.console: Any = None
        if self.colour:
            from rich.console import Console

            self.console = Console(force_terminal=True, highlight=False, markup=False)

    def line(self, text: str) -> None:
        if self.console:
            self.console.print(text, soft_wrap=True)
        else:
            print(text)

    def legend(self) -> None:
        if self.console:
            from rich.text import Text

            parts = [("trained ", TRAINED), ("seen, not trained ", SEEN), ("padding ", PADDING)]
            self.console.print(Text.assemble(*parts, ("| ", BOUNDARY), "end of a document or conversation"))
        else:
            print("[[trained]] seen, not trained <padding> | end of a document or conversation")

    def row(self, title: str, spans: Iterator[Span]) -> None:
        if not self.console:
            print(title)
            print("".join(f"[[{span.text}]]" if span.kind == "trained" else span.text for span in spans))
            return
        from rich.text import Text

        styles = {"trained": TRAINED, "seen": SEEN, "padding": PADDING, "boundary": BOUNDARY}
        self.console.print(Text(title, style="bold"))
        self.console.print(Text.assemble(*((_visible(span.text), styles[span.kind]) for span in spans)))


def _visible(text: str) -> str:
    """Without control characters, which could recolour or clear a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
