"""From sources to the files of a prepared folder: the tokenizer, the tokens, config.json; from where it was left."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minillm import log
from minillm.data.encode import CHUNK_CHARACTERS, Chunk, EncodedChunk, encoded
from minillm.data.executors import FileTasks, folder_for
from minillm.data.files import RowReport
from minillm.data.prepare_text.folder import STATE_FILE, read_state, text_hash, write_json
from minillm.data.shards import CONFIG_FILE, FORMAT, FORMAT_VERSION, PARTS, PartWriter, read_config
from minillm.data.sources import Source, no_text, read_sources
from minillm.data.store import file_sha256
from minillm.log import UserError
from minillm.text.tokenizer import SENTENCEPIECE_FILE, Tokenizer

if TYPE_CHECKING:
    from minillm.data.prepare_text import PrepareTextSettings

COMMIT_SECONDS = 5.0
SAMPLE_CHARACTERS = 50_000_000  # what a tokenizer is trained on
Place = tuple[int, int]


def prepare(
    settings: PrepareTextSettings, sources: Sequence[Source], identity: dict[str, Any], building: Path,
    spread: Callable[[FileTasks], bool] | None = None,
) -> bool:  # fmt: skip
    """Fills `building` up to config.json, from where it was left. `spread` has the sources tokenized elsewhere; when
    it says that they are not yet, nothing more is done and the answer is False."""
    state = read_state(building, identity)
    writers: dict[str, PartWriter] = {}
    tasks = None
    try:
        tokenizer = _tokenizer(settings, sources, building, trained=bool(state.get("tokenizer")))
        state.setdefault("tokenizer", text_hash(tokenizer.json_text))
        write_json(building / STATE_FILE, state)
        dtype = "uint16" if tokenizer.vocab_size <= 65_536 else "uint32"
        if spread:
            folder = folder_for(Path(settings.output_dir), {**identity, "trained": state["tokenizer"]})
            tasks = FileTasks(tokenized_source, sources, (settings, tokenizer, dtype), folder)
            if not state.get("done"):
                if not spread(tasks):
                    return False
                state = {name: state[name] for name in ("identity", "tokenizer")}  # putting together starts anew
                write_json(building / STATE_FILE, state)
        for part in PARTS:
            writers[part] = PartWriter(building, part, dtype, identity["shard_tokens"])
            writers[part].restore(state.get(part, {"shards": [], "documents": 0, "text_bytes": 0}))
        if "place" in state and not state.get("done"):
            done = sum(writer.documents for writer in writers.values())
            log.info(f"[data] going on in {building} after {done:,} documents")
        report = RowReport.from_dict(state["report"]) if "report" in state else RowReport(", ".join(settings.input))
        if not state.get("done"):
            if tasks:
                _put_together(tasks, writers, report)
                _commit(building, state, writers, report.to_dict())
            else:
                _tokenize(settings, sources, tokenizer, dtype, writers, report, state, building)
        if not writers["train"].documents:
            raise UserError(no_text(sources, report, settings.text_column))
        _finish(settings, sources, identity, building, tokenizer, dtype, writers, report)
        if tasks:
            tasks.remove()
        return True
    except UserError:
        if not tasks and not state.get("train", {}).get("documents"):
            shutil.rmtree(building, ignore_errors=True)  # nothing to go on from
        raise
    finally:
        for writer in writers.values():
            with suppress(OSError):  # a full disk has been reported already
                writer.close()


def _tokenizer(settings: PrepareTextSettings, sources: Sequence[Source], building: Path, *, trained: bool) -> Tokenizer:
    """The tokenizer, with its files in `building`: the one named, or one trained now if that is not yet done."""
    if trained:
        return Tokenizer.load(building)
    if not settings.vocab_size:
        tokenizer = Tokenizer.load(settings.tokenizer or None)
        tokenizer.save(building)
        model = Path(settings.tokenizer) / SENTENCEPIECE_FILE
        if settings.tokenizer and model.is_file():
            shutil.copyfile(model, building / SENTENCEPIECE_FILE)
        return tokenizer
    started = time.monotonic()
    texts = sample(settings, sources)
    if settings.tokenizer_type == "sentencepiece":
        from minillm.text.chat import CHAT_TEMPLATE
        from minillm.text.sentencepiece_bpe import to_tokenizer_json, train_sentencepiece

        content = train_sentencepiece(texts, settings.vocab_size)
        (building / SENTENCEPIECE_FILE).write_bytes(content)
        tokenizer = Tokenizer(to_tokenizer_json(content), CHAT_TEMPLATE)
        tokenizer.save(building)
    else:
        from minillm.text.train import train_tokenizer

        tokenizer = train_tokenizer(texts, settings.vocab_size, building)
    seconds = time.monotonic() - started
    log.info(f"[tokenizer] {tokenizer.vocab_size:,} entries, trained in {log.format_duration(seconds)}")
    if tokenizer.vocab_size < settings.vocab_size:
        log.info(f"[tokenizer] the text is too small for {settings.vocab_size:,} entries; it gave fewer")
    return tokenizer


def sample(settings: PrepareTextSettings, sources: Sequence[Source]) -> Iterator[str]:
    """Training texts to learn a tokenizer from: the beginning of every source, in equal shares."""
    share, used = SAMPLE_CHARACTERS // len(sources), 0
    report = RowReport()
    for source in sources:
        left = share
        for text, _ in read_sources([source], report, column=settings.text_column, split=settings.split):
            if not is_validation(text.encode(), settings):
                yield text[:left]
                left, used = left - len(text), used + 1
            if left <= 0:
                break
    if not used:
        raise UserError(no_text(sources, report, settings.text_column))


def is_validation(raw: bytes, settings: PrepareTextSettings) -> bool:
    """Is this text (UTF-8) for validation?"""
    key = settings.seed.to_bytes(16, "little")
    number = int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=key).digest(), "little")
    return number < settings.val_fraction * 2**64


def _tokenize(
    settings: PrepareTextSettings, sources: Sequence[Source], tokenizer: Tokenizer, dtype: str,
    writers: dict[str, PartWriter], report: RowReport, state: dict[str, Any], building: Path,
) -> None:  # fmt: skip
    """Writes the tokens of everything behind the state's place, committing as it goes."""
    behind: deque[tuple[Place, str]] = deque()  # of each chunk on its way: the place after it, and the report there

    def feed() -> Iterator[Chunk]:
        start = tuple(state.get("place", (0, 0)))
        for chunk, place, counts in _chunks(settings, sources, report, start):
            behind.append((place, counts))
            yield chunk

    size = sum(source.size for source in sources)
    started = spoken = time.monotonic()
    tokens = text_bytes = 0
    tokenizer.fast_engine()  # says here if it is not used
    with log.progress(size // 1_000 + 1 if size else None, "[data] tokenizing (KB)") as bar:
        for chunk in encoded(feed(), "texts", tokenizer, dtype, settings.num_workers):
            place, counts = behind.popleft()
            _write(chunk, writers)
            tokens, text_bytes = tokens + chunk.counts.tokens, text_bytes + chunk.counts.text_bytes
            bar.advance((report.bytes_read if size else text_bytes) // 1_000 - bar.done)
            if time.monotonic() - spoken >= COMMIT_SECONDS:
                _commit(building, state, writers, json.loads(counts), place)
                spoken = time.monotonic()
    _commit(building, state, writers, report.to_dict())
    seconds = max(time.monotonic() - started, 1e-9)
    log.info(
        f"[data] {tokens:,} tokens in {log.format_duration(seconds)}: {text_bytes / seconds / 1e6:.1f} MB/s, "
        f"{tokens / seconds:,.0f} tokens/s"
    )


def _write(chunk: EncodedChunk, writers: dict[str, PartWriter]) -> None:
    held_out = chunk.places[:, 0] == 1
    of_token = np.repeat(held_out, chunk.lengths)
    for part, documents, ids in (("train", ~held_out, ~of_token), ("val", held_out, of_token)):
        size = int(chunk.places[documents, 1].sum())
        writers[part].write(chunk.tokens[ids], chunk.lengths[documents], size)


def _commit(
    building: Path, state: dict[str, Any], writers: dict[str, PartWriter], report: dict[str, Any],
    place: Place | None = None,
) -> None:  # fmt: skip
    """What was written so far is kept from now on; without a place, that is all there is."""
    state.update({part: writer.commit() for part, writer in writers.items()}, report=report)
    state.update({"place": place} if place else {"done": True})
    write_json(building / STATE_FILE, state)


def tokenized_source(
    source: Source, settings: PrepareTextSettings, tokenizer: Tokenizer, dtype: str
) -> Iterator[EncodedChunk | RowReport]:
    """The tokens of one source and, last, what became of its rows: a task of its own, for one core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    report = RowReport()
    chunks = (chunk for chunk, _, _ in _chunks(settings, [source], report, (0, 0)))
    yield from encoded(chunks, "texts", tokenizer, dtype, 0)
    yield report


def _put_together(tasks: FileTasks, writers: dict[str, PartWriter], report: RowReport) -> None:
    """Writes the tokens of all sources, which tasks have left, in order."""
    for result in tasks.results():
        if isinstance(result, RowReport):
            report.merge(result)
        else:
            _write(result, writers)


def _chunks(
    settings: PrepareTextSettings, sources: Sequence[Source], report: RowReport, start: Any
) -> Iterator[tuple[Chunk, Place, str]]:
    """Texts in groups of bounded size, each text with (is validation, UTF-8 bytes); the place behind the group, and
    the report there as JSON."""
    texts: list[str] = []
    facts: list[tuple[int, int]] = []
    size, place = 0, start
    for text, place in read_sources(sources, report, column=settings.text_column, split=settings.split, start=start):
        raw = text.encode()
        texts.append(text)
        facts.append((int(is_validation(raw, settings)), len(raw)))
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield (texts, np.array(facts, dtype=np.int64)), place, json.dumps(report.to_dict())
            texts, facts, size = [], [], 0
    if texts:
        yield (texts, np.array(facts, dtype=np.int64)), place, json.dumps(report.to_dict())


def _finish(
    settings: PrepareTextSettings, sources: Sequence[Source], identity: dict[str, Any], building: Path,
    tokenizer: Tokenizer, dtype: str, writers: dict[str, PartWriter], report: RowReport,
) -> None:  # fmt: skip
    """Final names, offsets, hashes and, last, config.json; may be repeated."""
    parts = {part: writer.finish() for part, writer in writers.items()}
    for entry in filter(None, parts.values()):
        entry["rows"] = max(1, entry["tokens"] // settings.max_seq_len)
    names = [name for entry in filter(None, parts.values()) for name in (*entry["files"], entry["offsets"])]
    names += [path.name for path in building.glob("tokenizer*")]
    config = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "fingerprint": text_hash(json.dumps(identity)),
        "kind": "texts", "dtype": dtype, "vocab_size": tokenizer.vocab_size,
        "tokenizer": text_hash(tokenizer.json_text), "end_of_text_id": tokenizer.end_of_text_id,
        "max_seq_len": settings.max_seq_len, **parts,
        "source": {"input": list(settings.input), "names": [source.name for source in sources]},
        "identity": identity, "report": report.to_dict(),
        "sha256": {name: file_sha256(building / name) for name in sorted(names)},
    }  # fmt: skip
    write_json(building / CONFIG_FILE, config)
    report.log()
    if settings.val_fraction and not parts["val"]:
        log.warn("no document fell to validation: there are too few. Training will hold out rows of its own")


def describe(output: Path) -> None:
    """Says what is in a prepared folder."""
    config = read_config(output)
    for part in PARTS:
        if config[part]:
            entry, files = config[part], len(config[part]["files"])
            log.info(
                f"[data] {part}: {entry['documents']:,} documents, {entry['tokens']:,} tokens in {files:,} "
                f"file{'s' if files > 1 else ''}, {entry['rows']:,} rows of {config['max_seq_len']}"
            )
    log.info(f"[data] train on it with: minillm pretrain --data_path {output} --max_seq_len {config['max_seq_len']}")
