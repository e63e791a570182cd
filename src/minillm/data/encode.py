"""Rows -> token ids in chunks of bounded size, in order, on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minillm.data.formats import Conversation, Document, RowReport, read_conversations, read_documents
from minillm.data.pool import in_order
from minillm.data.preferences import (
    CheckablePrompt,
    LabelledAnswer,
    Pair,
    read_labelled,
    read_pairs,
    read_prompts,
    shared_prefix,
)

if TYPE_CHECKING:
    from minillm.text.tokenizer import Tokenizer

CHUNK_CHARACTERS = 1_000_000
PIECE_CHARACTERS = 200_000  # a longer text is encoded in pieces: the encoder needs some 50 bytes a character

Row = Document | Conversation | Pair | LabelledAnswer | CheckablePrompt
READERS: dict[str, Callable[[Any, RowReport], Iterator[Any]]] = {
    "texts": read_documents,
    "conversations": read_conversations,
    "pairs": read_pairs,
    "labels": read_labelled,
    "prompts": read_prompts,
}


@dataclass
class Counts:
    """Sums over what was encoded; `text_bytes` are the UTF-8 bytes that the trained tokens stand for."""

    tokens: int = 0
    trained_tokens: int = 0
    text_bytes: int = 0

    def add(self, other: Counts) -> None:
        self.tokens += other.tokens
        self.trained_tokens += other.trained_tokens
        self.text_bytes += other.text_bytes


@dataclass
class EncodedChunk:
    """Ids of some documents one after another: tokens uint16/uint32 [T], mask uint8 [T] (empty for texts),
    lengths int64 [N], places int64 [N, 2]."""

    tokens: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    places: np.ndarray
    counts: Counts


Chunk = tuple[list[Any], np.ndarray]


def chunks(rows: Iterable[Row], kind: str, files: dict[str, int]) -> Iterator[Chunk]:
    """Groups rows into (items to encode, places [n, 2]); `files` collects file name -> index."""
    items: list[Any] = []
    places: list[tuple[int, int]] = []
    size = 0
    for row in rows:
        place = (files.setdefault(row.file, len(files)), row.line)
        if isinstance(row, Document):
            items.append(row.text)
            size += len(row.text)
        elif isinstance(row, Conversation | LabelledAnswer | CheckablePrompt):
            items.append(row.messages)
            size += sum(len(message["content"]) for message in row.messages)
        else:
            items.append((row.chosen, row.rejected))
            size += sum(len(message["content"]) for message in row.chosen + row.rejected)
            places.append(place)
        places.append(place)
        if size >= CHUNK_CHARACTERS:
            yield items, np.array(places, dtype=np.int64)
            items, places, size = [], [], 0
    if items:
        yield items, np.array(places, dtype=np.int64)


def encoded(
    rows: Iterable[Chunk], kind: str, tokenizer: Tokenizer, dtype: str, num_workers: int
) -> Iterator[EncodedChunk]:
    """Encodes chunks in order, with only a few of them in memory.

    Either here, where the tokenizer's own threads use all cores, or in `num_workers` processes, which also
    spread the Python around the tokenizer.
    """
    if num_workers < 2:
        for chunk in rows:
            yield _encode(chunk, kind, tokenizer, dtype)
        return
    yield from in_order(rows, _encode_alone, (kind, tokenizer, dtype), num_workers)


def _encode_alone(chunk: Chunk, kind: str, tokenizer: Tokenizer, dtype: str) -> EncodedChunk:
    """As `_encode`, in a process of its own: one process per core is enough."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return _encode(chunk, kind, tokenizer, dtype)


def _encode(chunk: Chunk, kind: str, tokenizer: Tokenizer, dtype: str) -> EncodedChunk:
    items, places = chunk
    ids, masks, text_bytes = ENCODERS[kind](items, tokenizer)
    tokens = _joined(ids, dtype)
    mask = _joined(masks, "uint8")
    trained = int(mask.sum()) if kind != "texts" else len(tokens)
    lengths = np.array([len(i) for i in ids], dtype=np.int64)
    return EncodedChunk(tokens, mask, lengths, places, Counts(len(tokens), trained, text_bytes))


def _joined(parts: list[Any], dtype: str) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=dtype) for part in parts]) if parts else np.zeros(0, dtype)


def _encode_texts(texts: list[str], tokenizer: Tokenizer) -> tuple[list[Any], list[Any], int]:
    """Each text followed by the end-of-text token, as arrays [L]; before it what the tokenizer begins texts with."""
    pieces: list[str] = []
    owner: list[int] = []
    for index, text in enumerate(texts):
        for piece in _pieces(text):
            pieces.append(piece)
            owner.append(index)
    parts: list[list[np.ndarray]] = [[] for _ in texts]
    for index, piece_ids in zip(owner, tokenizer.encode_arrays(pieces), strict=True):
        parts[index].append(np.asarray(piece_ids, dtype=np.uint32))
    begin = np.array(tokenizer.begin_ids, dtype=np.uint32)
    end = np.array([tokenizer.end_of_text_id], dtype=np.uint32)
    ids = [np.concatenate([begin, *document, end]) for document in parts]
    return ids, [], sum(len(text.encode()) for text in texts)


def _pieces(text: str) -> Iterator[str]:
    """A very long text in pieces, cut before white space, where a byte-level BPE begins a new word anyway."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        cut = max(text.rfind(" ", start + 1, limit), text.rfind("\n", start + 1, limit))
        cut = cut if cut > start + PIECE_CHARACTERS // 2 else limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def _encode_conversations(
    conversations: list[list[dict[str, str]]], tokenizer: Tokenizer
) -> tuple[list[list[int]], list[Any], int]:
    from minillm.text.chat import encode_chats

    ids, masks = encode_chats(tokenizer, conversations)
    return ids, masks, sum(_answer_bytes(messages) for messages in conversations)


def _answer_bytes(messages: list[dict[str, str]]) -> int:
    return sum(len(m["content"].strip().encode()) for m in messages if m["role"] == "assistant")


def _encode_pairs(
    pairs: list[tuple[list[dict[str, str]], list[dict[str, str]]]], tokenizer: Tokenizer
) -> tuple[list[list[int]], list[Any], int]:
    """Chosen and rejected in turn; answers in the part that both have in common are not trained."""
    ids, masks, text_bytes = _encode_conversations([side for pair in pairs for side in pair], tokenizer)
    for index, (chosen, rejected) in enumerate(pairs):
        common = chosen[: shared_prefix(chosen, rejected)]
        answers = sum(message["role"] == "assistant" for message in common)
        text_bytes -= 2 * _answer_bytes(common)
        for side in (2 * index, 2 * index + 1):
            masks[side] = _without_first_answers(np.asarray(masks[side], dtype=np.uint8), answers)
    return ids, masks, text_bytes


def _encode_labelled(
    conversations: list[list[dict[str, str]]], tokenizer: Tokenizer
) -> tuple[list[list[int]], list[Any], int]:
    """A label judges the last answer: earlier ones are not trained."""
    ids, masks, _ = _encode_conversations(conversations, tokenizer)
    for index, messages in enumerate(conversations):
        answers = sum(message["role"] == "assistant" for message in messages)
        masks[index] = _without_first_answers(np.asarray(masks[index], dtype=np.uint8), answers - 1)
    return ids, masks, sum(_answer_bytes(messages[-1:]) for messages in conversations)


def _encode_prompts(
    prompts: list[list[dict[str, str]]], tokenizer: Tokenizer
) -> tuple[list[list[int]], list[Any], int]:
    """Each with what the chat template puts before an answer; nothing of it is trained."""
    from minillm.text.chat import encode_chats

    ids, _ = encode_chats(tokenizer, prompts, add_generation_prompt=True)
    return ids, [np.zeros(len(each), dtype=np.uint8) for each in ids], 0


def _without_first_answers(mask: np.ndarray, answers: int) -> np.ndarray:
    """The mask [L] without its first `answers` runs of ones."""
    if answers:
        ends = np.flatnonzero((mask == 1) & (np.append(mask[1:], 0) == 0))
        mask[: ends[answers - 1] + 1] = 0
    return mask


ENCODERS: dict[str, Callable[[list[Any], Any], tuple[list[Any], list[Any], int]]] = {
    "texts": _encode_texts,
    "conversations": _encode_conversations,
    "pairs": _encode_pairs,
    "labels": _encode_labelled,
    "prompts": _encode_prompts,
}
