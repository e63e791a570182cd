"""A SentencePiece BPE with byte fallback: trained into a tokenizer.model, and as the tokenizer.json with the same ids.

The ten tokens that every tokenizer of ours has come first here too (see tokenizer.py): the control tokens are
SentencePiece's control symbols, the others its user-defined ones. A space is the character U+2581 inside.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

from minillm.log import UserError
from minillm.text.engine import last_pair
from minillm.text.tokenizer import CONTROL_TOKENS, SPECIAL_TOKENS, TAG_TOKENS

SPACE = "\u2581"
UNKNOWN = "<unk>"  # never met, because every byte has a piece; but the format asks for it
SMALLEST_VOCAB = len(SPECIAL_TOKENS) + 1 + 256
# Texts on which another program's tokenizer is tried: cases, digits, spaces, scripts, wide letters.
PROBES = (
    "", "a", " a  b ", "Once upon a time, there were 1,234 millers.", "def f(x):\n\treturn x ** 2\r\n",
    "\u4ece\u524d\u6709\u4e00\u4f4d",
    "caf\u00e9 cafe\u0301 \uff21\uff22 \ufb01\u00a0\u3000x", "\U0001f642\u0661",
)  # fmt: skip
SENTENCE_BYTES = 4_000  # SentencePiece leaves out sentences of more than 4,192


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """The content of a tokenizer.model of at most `vocab_size` pieces. The same texts give the same bytes.

    Raises UserError when sentencepiece is missing, or `vocab_size` leaves no room for bytes and control tokens.
    """
    sentencepiece = _library()
    if vocab_size <= SMALLEST_VOCAB:
        raise UserError(f"--vocab_size {vocab_size} is too small: bytes and control tokens take {SMALLEST_VOCAB}.")
    pad, end_of_text, *others = CONTROL_TOKENS
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False, byte_fallback=True, character_coverage=0.9995, split_digits=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, pad_id=0, pad_piece=pad, eos_id=1, eos_piece=end_of_text, bos_id=-1,
            unk_id=len(SPECIAL_TOKENS), unk_piece=UNKNOWN, control_symbols=others,
            user_defined_symbols=list(TAG_TOKENS), num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(f"SentencePiece could not be trained with --vocab_size {vocab_size}: {error}") from error
    return model.getvalue()


def _library() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            "A SentencePiece tokenizer needs sentencepiece. Install it with: pip install 'minillm-trainer[data]'"
        ) from error
    return sentencepiece


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, in pieces where they are long: the trainer reads no longer ones."""
    for text in texts:
        for line in text.splitlines():
            data = line.encode()
            for start in range(0, len(data), SENTENCE_BYTES):
                yield data[start : start + SENTENCE_BYTES].decode(errors="ignore")


def to_tokenizer_json(model: bytes) -> str:
    """The text of a tokenizer.json that gives the ids of a tokenizer.model (BPE with byte fallback).

    SentencePiece joins the neighbours whose joined piece comes first. A piece is always joined from the same two
    parts, so one merge for each piece, in the order of the pieces, does the same.
    """
    processor = _library().SentencePieceProcessor(model_proto=model)
    count = processor.get_piece_size()
    pieces = [processor.id_to_piece(index) for index in range(count)]
    if not any(processor.is_byte(index) for index in range(count)):
        raise UserError("This tokenizer.model has no byte fallback, so it cannot write every text.")
    special = [i for i in range(count) if pieces[i] in SPECIAL_TOKENS]
    merges, cut = _merges(processor, pieces, special)
    return json.dumps(_description(pieces, special, merges, cut), ensure_ascii=False, indent=1) + "\n"


def _merges(processor: Any, pieces: list[str], special: list[int]) -> tuple[list[list[str]], bool]:
    """The merges of a BPE, and whether text may be cut before spaces: no piece goes on behind one, and words are met
    again."""
    plain = [
        i for i in range(len(pieces))
        if i not in special and not processor.is_control(i) and not processor.is_unknown(i) and not processor.is_byte(i)
    ]  # fmt: skip
    ranks = {pieces[i]: -processor.get_score(i) for i in plain}
    merges = []
    for piece in sorted((piece for piece in ranks if len(piece) > 1), key=lambda piece: ranks[piece]):
        pair = last_pair(piece, lambda left, right: ranks.get(left + right))
        if pair is not None:
            merges.append(list(pair))
    return merges, not any(SPACE in piece.lstrip(SPACE) for piece in ranks)


def foreign_tokenizer_json(model: bytes) -> str:
    """The same of a BPE that another program trained: with a space before a text, without repeated spaces, with an
    unknown piece in place of bytes, as it happens to be. It is tried on texts.

    Raises UserError where SentencePiece gives other ids: it is no BPE, or normalises text.
    """
    import tokenizers

    processor = _library().SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    special = [index for index in range(len(pieces)) if processor.is_control(index)]
    merges, cut = _merges(processor, pieces, special)
    content = _description(pieces, special, merges, cut)
    for token in content["added_tokens"]:
        token["special"] = True
    content["model"]["unk_token"] = processor.id_to_piece(processor.unk_id())
    content["model"]["byte_fallback"] = any(processor.is_byte(index) for index in range(len(pieces)))
    probe = pieces[-1].strip(SPACE) or "a"
    normalizers = [content["normalizer"]]
    if processor.encode(probe, out_type=str)[0].startswith(SPACE):
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        content["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    if processor.encode(f" {probe}  {probe} ") == processor.encode(f"{probe} {probe}"):
        for pattern, instead in (("^ +| +$", ""), (" {2,}", " ")):
            rule = {"type": "Replace", "pattern": {"Regex": pattern}, "content": instead}
            normalizers.insert(0 if pattern[0] == "^" else 1, rule)
    content["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    ours = tokenizers.Tokenizer.from_str(text)
    words = [piece.replace(SPACE, " ") for index, piece in enumerate(pieces) if index not in special]
    for probe in (*PROBES, "".join(words[:2000]), " ".join(words[-2000:])):
        if ours.encode(probe, add_special_tokens=False).ids != processor.encode(probe):
            raise UserError(
                "this SentencePiece tokenizer is no BPE, or changes text before it cuts it, which is not known here"
            )
    return text


def _description(pieces: list[str], special: list[int], merges: list[list[str]], cut: bool) -> dict[str, Any]:
    def token(index: int) -> dict[str, Any]:
        normal = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return {"id": index, "content": pieces[index], **normal, "special": pieces[index] in CONTROL_TOKENS}

    words = {
        "type": "Split",
        "pattern": {"Regex": f"{SPACE}*[^{SPACE}]+|{SPACE}+"},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token(index) for index in special],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": words if cut else None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": UNKNOWN, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)}, "merges": merges,
        },
    }  # fmt: skip
