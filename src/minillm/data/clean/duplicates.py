"""Duplicates: the same messages, the same letters and digits, and texts that have nearly all their 5-grams in common.

The last are found with MinHash. A row is 64 numbers for what was asked and 64 for what was answered, the share of equal
ones estimates the Jaccard similarity of the 5-grams of characters. Bands of these numbers say which rows to compare.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from minillm.data.formats import Message

SHINGLE = 5  # characters of the normal form
PERMUTATIONS = 64  # for either side of a conversation
BANDS = 16
SIMILARITY = 0.9  # of the questions and of the answers
LEADERS = 8  # rows of one band to which the others of that band are compared
BLOCK = 1 << 15  # characters at once: the numbers in work stay in the processor's cache

_NOT_TEXT = re.compile(r"[\W_]+")
_NUMBERS = re.compile(r"\d+")
_ASCII_BYTES = bytes(code for code in range(128) if not chr(code).isalnum())

_random = np.random.Generator(np.random.PCG64(0x5EED))
_SEEDS = _random.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32)
_FACTORS = _random.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32) | np.uint32(1)


def exact_key(serialized: bytes) -> bytes:
    """16 bytes that stand for messages as they are written."""
    return hashlib.blake2b(serialized, digest_size=16).digest()


def normal_form(text: str) -> str:
    """The letters and digits of `text` after NFKC and case folding; all of it where it has neither."""
    if text.isascii():
        return text.encode().lower().translate(None, _ASCII_BYTES).decode() or text.strip()
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _NOT_TEXT.sub("", folded) or text.strip()


def same_key(messages: Sequence[Message], normal: Sequence[str]) -> bytes:
    """16 bytes that stand for the normal forms of messages, with their roles."""
    joined = "\0".join(f"{message['role']}\0{text}" for message, text in zip(messages, normal, strict=True))
    return hashlib.blake2b(joined.encode(), digest_size=16).digest()


def two_sides(messages: Sequence[Message], normal: Sequence[str]) -> tuple[str, str]:
    """(what was asked, what was answered) in normal form. System turns, which many rows share, are left out."""
    pairs = list(zip(messages, normal, strict=True))
    asked = "".join(text for message, text in pairs if message["role"] in ("user", "tool"))
    return asked, "".join(text for message, text in pairs if message["role"] == "assistant")


def signatures(sides: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """(MinHash values uint16 [N, 2, 64], band keys uint64 [N, 16]) of N conversations."""
    texts = [text.ljust(SHINGLE) for pair in sides for text in pair]
    mins = np.empty((len(texts), PERMUTATIONS), dtype=np.uint16)
    first = size = 0
    for index, text in enumerate(texts):
        size += len(text)
        if size >= BLOCK or index == len(texts) - 1:
            mins[first : index + 1] = _minimums(texts[first : index + 1])
            first, size = index + 1, 0
    values = mins.reshape(len(sides), 2, PERMUTATIONS)
    halves = values.view(np.uint64)  # [N, 2, 16]: four values each
    keys = halves[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ halves[:, 1] * np.uint64(0xC2B2AE3D27D4EB4F)
    # Rows with other numbers in them are other rows: sums by a template differ in nothing else.
    numbers = [hashlib.blake2b(" ".join(_NUMBERS.findall("".join(pair))).encode(), digest_size=8) for pair in sides]
    keys ^= np.frombuffer(b"".join(number.digest() for number in numbers), dtype=np.uint64)[:, None]
    return values, keys


def _minimums(texts: Sequence[str]) -> np.ndarray:
    """The least hash of the shingles of each text under every permutation, its low 16 bits: uint16 [N, 64]."""
    lengths = np.array([len(text) for text in texts])
    ends = np.cumsum(lengths)
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    count = len(codes) - SHINGLE + 1
    hashes = codes[:count] * np.uint32(1)
    for place in range(1, SHINGLE):
        hashes = hashes * np.uint32(0x01000193) + codes[place : place + count]
    hashes ^= hashes >> np.uint32(16)
    hashes *= np.uint32(0x85EBCA6B)
    hashes ^= hashes >> np.uint32(13)
    hashes *= np.uint32(0xC2B2AE35)
    hashes ^= hashes >> np.uint32(16)
    hashes = np.append(hashes, np.uint32(0))  # a place for the last segment's end
    # Segments of shingles that lie within one text, and between them those that do not, whose results are left out.
    borders = np.stack((ends - lengths, ends - SHINGLE + 1), axis=1).ravel()
    result = np.empty((len(texts), PERMUTATIONS), dtype=np.uint16)
    work = np.empty_like(hashes)
    for index in range(PERMUTATIONS):
        np.bitwise_xor(hashes, _SEEDS[index], out=work)
        np.multiply(work, _FACTORS[index], out=work)
        result[:, index] = np.minimum.reduceat(work, borders)[::2]
    return result


def similar_rows(values: Sequence[np.ndarray], keys: Sequence[np.ndarray]) -> dict[int, int]:
    """Rows that resemble an earlier one that stays: row -> that row, both counted over all chunks.

    values: uint16 [n, 2, 64] of each chunk; keys: uint64 [n, 16] of each chunk.
    """
    if not values:
        return {}
    all_values = np.concatenate(values)
    alike: dict[int, set[int]] = {}
    for band in range(BANDS):
        column = np.concatenate([chunk[:, band] for chunk in keys])
        order = np.argsort(column, kind="stable")
        sorted_keys = column[order]
        changes = np.flatnonzero(sorted_keys[1:] != sorted_keys[:-1]) + 1
        starts = np.concatenate(([0], changes))
        ends = np.concatenate((changes, [len(order)]))
        for group in np.flatnonzero(ends - starts > 1):
            members = order[starts[group] : ends[group]]
            for _ in range(LEADERS):
                leader, members = members[0], members[1:]
                equal = (all_values[members] == all_values[leader]).mean(axis=2).min(axis=1) >= SIMILARITY
                for member in members[equal].tolist():
                    alike.setdefault(member, set()).add(int(leader))
                members = members[~equal]
                if len(members) < 2:
                    break
    removed: dict[int, int] = {}
    for row in sorted(alike):
        staying = [first for first in alike[row] if first not in removed]
        if staying:
            removed[row] = min(staying)
    return removed
