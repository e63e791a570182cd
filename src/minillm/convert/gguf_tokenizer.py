"""A tokenizer.json in the form of a GGUF file: entries, their kinds, merges or scores, and how text is cut.

llama.cpp knows ways to cut text by name only. Which ids it makes of a text is compared with ours in the export's check.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from minillm.log import UserError

if TYPE_CHECKING:
    from minillm.text.tokenizer import Tokenizer

# The kinds of entries, as the format numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut, and what llama.cpp calls it.
CUTS = {
    _WORDS + r"\p{N}" + _REST: "qwen2",  # ours, too
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    "gpt2": "gpt-2",
    "digits gpt2": "smollm",
}


class GgufTokenizer(NamedTuple):
    """What the file says about a tokenizer, entry by entry."""

    model: str  # gpt2: byte-level BPE; llama: SentencePiece's BPE
    cut: str  # name of the way text is cut; empty for SentencePiece
    tokens: list[str]
    kinds: list[int]
    merges: list[str]  # byte-level BPE: "left right", the first one is applied first
    scores: list[float]  # SentencePiece: the highest is joined first
    space_prefix: bool  # SentencePiece: a space is put before a text
    normalizes: str  # byte-level BPE: what is done to a text first, which llama.cpp does not do; "" is nothing


def describe(tokenizer: Tokenizer, vocab_size: int) -> GgufTokenizer:
    """The tokenizer as the format wants it, with entries up to the model's `vocab_size`.

    Raises:
        UserError: it is no BPE, or cuts text in a way that llama.cpp has no name for.
    """
    content = json.loads(tokenizer.json_text)
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise UserError(f"the tokenizer is of type {model.get('type')}: in a GGUF file we can write BPE only")
    tokens = [f"[unused {index}]" for index in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    pieces = bool(model.get("byte_fallback"))
    for token, index in model["vocab"].items():
        tokens[index], kinds[index] = token, NORMAL
        if pieces and re.fullmatch("<0x[0-9A-F]{2}>", token):
            kinds[index] = BYTE
        elif token == model.get("unk_token"):
            kinds[index] = UNKNOWN
    for added in content.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        if kinds[added["id"]] != UNKNOWN:
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if not pairs and not pieces:
        raise UserError("the tokenizer has no merges, every byte is a token: llama.cpp does not take such a vocabulary")
    if not pieces:
        merges = [f"{left} {right}" for left, right in pairs]
        return GgufTokenizer(
            "gpt2", _cut(content.get("pre_tokenizer")), tokens, kinds, merges, [], False, _changes(content)
        )
    scores = [-float(len(pairs))] * vocab_size  # of what no merge makes, which is never asked for
    for rank, (left, right) in reversed(list(enumerate(pairs))):
        scores[model["vocab"][left + right]] = -float(rank)
    return GgufTokenizer("llama", "", tokens, kinds, [], scores, _puts_space_first(content), "")


def _cut(pre_tokenizer: dict[str, Any] | None) -> str:
    parts = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    found = []
    for part in parts:
        if part.get("type") == "Split":
            found.append(part.get("pattern", {}).get("Regex", ""))
        elif part.get("type") == "Digits":
            found.append("digits" if part.get("individual_digits") else "runs of digits")
        elif part.get("type") == "ByteLevel":
            found += ["gpt2"] * bool(part.get("use_regex", True))
        else:
            found.append(str(part.get("type")))
    name = CUTS.get(" ".join(found))
    if name is None:
        raise UserError(
            f"the tokenizer cuts text in a way that has no name known here in llama.cpp ({' '.join(found) or 'none'}): "
            "in a GGUF file it would give other ids"
        )
    return name


def _changes(content: dict[str, Any]) -> str:
    normalizer = content.get("normalizer") or {}
    return " ".join(str(part.get("type")) for part in normalizer.get("normalizers", [normalizer] if normalizer else []))


def _puts_space_first(content: dict[str, Any]) -> bool:
    """Is a space put before a text, as Llama 2's tokenizer does?"""
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
