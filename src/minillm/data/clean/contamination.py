"""Training rows that hold text of an evaluation: 13 words in a row (in Chinese, 13 characters) in common."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minillm.data.files import RowReport, read_rows
from minillm.log import UserError

NGRAM = 13
FEWEST_UNITS = 5  # shorter evaluation texts ("Yes.") are no evidence
# One unit is a word, or a character of a script without spaces.
_UNIT = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)
_FACTORS = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(NGRAM)], dtype=np.uint64)


def _units(text: str) -> np.ndarray:
    """A hash for each word or character, uint64 [N]; case, width and punctuation do not count."""
    text = (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()
    return np.array([zlib.crc32(unit.encode()) + 1 for unit in _UNIT.findall(text)], dtype=np.uint64)


def ngram_hashes(text: str) -> np.ndarray:
    """Hashes of the 13-grams of `text`, uint64 [N - 12]; of a text of 5 to 12 units, one hash of the whole."""
    units = _units(text)
    size = min(NGRAM, len(units))
    if size < FEWEST_UNITS:
        return np.zeros(0, dtype=np.uint64)
    count = len(units) - size + 1
    total = np.zeros(count, dtype=np.uint64)
    for place in range(size):
        total += units[place : place + count] * _FACTORS[place]
    total ^= total >> np.uint64(29)
    return total * np.uint64(0xBF58476D1CE4E5B9 + 2 * size)  # the hash of a short whole is no 13-gram's


def evaluation_ngrams(files: Iterable[str]) -> np.ndarray:
    """Sorted hashes of every text in the evaluation files, uint64 [N]. All strings of a row count, whatever its form.

    Raises UserError for a file that cannot be read or holds no text.
    """
    found = [np.zeros(0, dtype=np.uint64)]
    for path in files:
        before = len(found)
        for row in read_rows(Path(path), RowReport()):
            found += [hashes for hashes in map(ngram_hashes, _strings(row.value)) if len(hashes)]
        if len(found) == before:
            raise UserError(f"--decontaminate {path}: there is no text of {FEWEST_UNITS} words or more in it.")
    return np.unique(np.concatenate(found))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def overlaps(text: str, evaluation: np.ndarray) -> bool:
    """Whether `text` has a 13-gram, or, being shorter, its whole in common with the evaluation."""
    hashes = ngram_hashes(text)
    if not len(hashes) or not len(evaluation):
        return False
    places = np.searchsorted(evaluation, hashes)
    places[places == len(evaluation)] = 0
    return bool((evaluation[places] == hashes).any())
