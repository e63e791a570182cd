"""Text -> token ids at full speed: tiktoken, loaded with the merges and the split rule of a tokenizer.json.

Its ids are those of `tokenizers`, bit for bit, or it is not used. The two agree on a byte-level BPE whose merges
stand in the order of the vocabulary. They may know different versions of Unicode, so the few characters that they
classify differently are found when the engine is built, and a text with one of them is left to `tokenizers`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from minillm.text.train import SPLIT_PATTERN

if TYPE_CHECKING:
    import numpy as np

# Split rules that mean the same to both regex engines.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = SPLIT_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PATTERNS = (GPT2_PATTERN, SPLIT_PATTERN, LLAMA3_PATTERN)
PROBED = (r"\p{L}+", r"\p{N}+", r"\s+", "(?i:[strevmld])+")  # what the patterns distinguish
SAME_UNICODE = {("0.23.3", "0.14.0")}  # versions of tokenizers and tiktoken that agree on every character
LONGEST = 1_000_000  # characters; the regex engine gives up on white space that is longer than that
SMALL_BATCH = 50_000  # characters that are not worth starting threads for
NORMAL_BPE = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
NORMAL_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False}


class NotExpressible(Exception):
    """Why tiktoken cannot stand in for this tokenizer."""


class FastEngine:
    """tiktoken in place of one tokenizer.json. Safe to use from several threads."""

    def __init__(self, json_text: str) -> None:
        """Raises NotExpressible with the reason when the ids could differ, or tiktoken is not installed."""
        try:
            import tiktoken
        except ImportError:
            raise NotExpressible("tiktoken is not installed: pip install 'minillm-trainer[data]'") from None

        description = json.loads(json_text)
        pattern = split_pattern(description)
        ranks = merge_ranks(description["model"])
        added = added_tokens(description["added_tokens"])
        self._all = set(added)
        self._visible = {token for token, special in added.items() if not special}
        ids = {token["content"]: token["id"] for token in description["added_tokens"]}
        # Without any special token tiktoken would look for the empty string, at every position.
        self._core = tiktoken.Encoding(
            "minillm",
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens=ids or {"\0" * 64: max(ranks.values()) + 1},
        )
        disputed = disputed_characters()
        self._disputed = re.compile(f"[{re.escape(disputed)}]") if disputed else None

    def encode(self, text: str, parse_special: bool = False) -> np.ndarray | None:
        """Ids of `text`, uint32 [L]; None where `tokenizers` has to do it.

        Raises UnicodeEncodeError for a lone surrogate.
        """
        if len(text) > LONGEST or (self._disputed and not text.isascii() and self._disputed.search(text)):
            return None
        try:
            return self._core.encode_to_numpy(
                text, allowed_special=self._all if parse_special else self._visible, disallowed_special=()
            )
        except UnicodeEncodeError:
            raise
        except ValueError:  # the regex engine gave up
            return None

    def encode_batch(self, texts: Sequence[str], parse_special: bool = False) -> list[np.ndarray | None]:
        """`encode` of each text, on all cores unless TOKENIZERS_PARALLELISM forbids it."""
        threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "0", "off") else _cores()
        if threads == 1 or len(texts) == 1 or sum(map(len, texts)) < SMALL_BATCH:
            return [self.encode(text, parse_special) for text in texts]
        from concurrent.futures import ThreadPoolExecutor

        size = -(-len(texts) // (4 * threads))
        groups = [texts[start : start + size] for start in range(0, len(texts), size)]
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(lambda group: [self.encode(text, parse_special) for text in group], groups)
            return [ids for part in parts for ids in part]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_pattern(description: dict[str, Any]) -> str:
    """The regex by which a tokenizer.json cuts text before merging. Raises NotExpressible."""
    for name in ("normalizer", "truncation", "padding"):
        if description.get(name) is not None:
            raise NotExpressible(f"it has a {name}")
    steps = description["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise NotExpressible("it is not a byte-level BPE")
    if len(steps) == 1 and steps[0].get("use_regex", True):
        return GPT2_PATTERN
    if len(steps) == 2 and not steps[1].get("use_regex", True) and steps[0]["type"] == "Split":
        split = steps[0]
        if split["behavior"] == "Isolated" and not split["invert"] and split["pattern"].get("Regex") in PATTERNS:
            return str(split["pattern"]["Regex"])
    raise NotExpressible("it cuts text by a rule that is not known here")


def merge_ranks(model: dict[str, Any]) -> dict[bytes, int]:
    """Bytes -> id of every token that merging can reach.

    tiktoken joins the neighbours whose joined bytes have the lowest id, `tokenizers` those whose merge comes first.
    A token is always joined from the same two parts, so both do the same when ids and merges have the same order.
    Raises NotExpressible where they have not.
    """
    unusual = any(model.get(name) not in (value, "") for name, value in NORMAL_BPE.items())
    if model["type"] != "BPE" or model.get("byte_fallback") or unusual:
        raise NotExpressible("it is not a byte-level BPE")
    vocab, byte_of = model["vocab"], byte_characters()
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    order = {pair: index for index, pair in enumerate(pairs)}
    if missing := [character for character in byte_of if character not in vocab]:
        raise NotExpressible(f"{len(missing)} of the 256 bytes are not in its vocabulary")
    ranks = {bytes([byte]): vocab[character] for character, byte in byte_of.items()}
    found: list[tuple[int, int]] = []
    for token, index in vocab.items():
        if len(token) < 2 or not all(character in byte_of for character in token):
            continue
        pair = last_pair(token, lambda left, right: order.get((left, right)))
        if pair is not None:
            ranks[bytes(byte_of[character] for character in token)] = index
            found.append((order[pair], index))
        elif model.get("ignore_merges"):
            raise NotExpressible("its vocabulary has words that merging does not reach")
    ids = [index for _, index in sorted(found)]
    if ids != sorted(ids):
        raise NotExpressible("its merges do not stand in the order of its vocabulary")
    return ranks


def last_pair(token: str, rank: Callable[[str, str], float | None]) -> tuple[str, str] | None:
    """The two parts that `token` is joined from when its characters are merged, lowest rank first, leftmost of
    equals; None when merging stops before."""
    parts = list(token)
    while True:
        ranks = [rank(left, right) for left, right in zip(parts, parts[1:])]
        possible = [value for value in ranks if value is not None]
        if not possible:
            return None
        if len(parts) == 2:
            return parts[0], parts[1]
        place = ranks.index(min(possible))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def added_tokens(entries: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Content -> is it special, of the tokens that are found before text is cut. Raises NotExpressible where it
    could matter in which order they are looked for."""
    for entry in entries:
        if any(entry[flag] != value for flag, value in NORMAL_TOKEN.items()):
            raise NotExpressible(f"its token {entry['content']!r} takes white space or word boundaries into account")
        if not entry["content"][:1].isascii():  # where the text is not to be found, tiktoken goes on a byte later
            raise NotExpressible(f"its token {entry['content']!r} does not begin with an ASCII character")
    contents = {entry["content"] for entry in entries}
    beginnings = {token[:end] for token in contents for end in range(1, len(token))}
    for token in contents:
        inner = {token[start:end] for start in range(len(token)) for end in range(start + 1, len(token) + 1)} - {token}
        if inner & contents or any(token[start:] in beginnings for start in range(1, len(token))):
            raise NotExpressible(f"its token {token!r} and another can overlap")
    return {entry["content"]: entry["special"] for entry in entries}


@lru_cache
def byte_characters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary -> that byte: itself where it is visible,
    else the next one from U+0100."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in sorted(visible)} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


@lru_cache
def disputed_characters() -> str:
    """The characters that the regex engines of `tokenizers` and tiktoken put into different classes; for versions
    other than those that are known to agree this takes about a second."""
    versions = version("tokenizers"), version("tiktoken")
    return "" if versions in SAME_UNICODE else find_disputed_characters()


def find_disputed_characters() -> str:
    """The same, found by trying all of the planes in which Unicode has assigned letters."""
    import tiktoken
    import tokenizers
    from tokenizers.pre_tokenizers import Split

    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x40000)]))
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    disputed: set[str] = set()
    for pattern in PROBED:
        there = Split(tokenizers.Regex(pattern), behavior="removed", invert=True).pre_tokenize_str(every)
        here = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={"\0\0": 256})
        ids = here.encode_to_numpy(every, disallowed_special=())
        disputed |= {*"".join(text for text, _ in there)} ^ {*ids.astype("uint8").tobytes().decode()}
    return "".join(sorted(disputed))
