"""Train a byte-level BPE: on the user's text, or on the built-in corpus that gave the shipped tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minillm.log import UserError, info
from minillm.text.chat import CHAT_TEMPLATE
from minillm.text.tokenizer import CONTROL_TOKENS, SPECIAL_TOKENS, Tokenizer

# How text is cut before merges apply (the rule of Qwen2, which other programs implement too): contractions,
# letters with at most one sign before them, single digits, runs of signs, white space.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SHIPPED_VOCAB_SIZE = 6400
_SMALLEST = len(SPECIAL_TOKENS) + 256
_WORD = re.compile(r"[^\W_]")
LONG_WORD = 500  # characters; the time that a word takes grows with the square of its length


@dataclass(frozen=True)
class TrainTokenizerSettings:
    """Settings of `minillm data train-tokenizer`."""

    output_dir: str = field(metadata={"help": "folder that gets tokenizer.json and tokenizer_config.json"})
    input: tuple[str, ...] = field(
        default=(),
        metadata={"help": "text to learn from (jsonl, txt, parquet, also .gz); none: the built-in corpus"},
    )
    vocab_size: int = field(
        default=SHIPPED_VOCAB_SIZE, metadata={"help": "entries of the vocabulary, control tokens included"}
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int, output_dir: Path) -> Tokenizer:
    """Learn a tokenizer of at most `vocab_size` entries from `texts` and save it in `output_dir`.

    The same texts in the same order give the same files, byte for byte. Raises UserError when `vocab_size`
    leaves no room for the 256 bytes and the control tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < _SMALLEST:
        raise UserError(f"--vocab_size {vocab_size} is too small: bytes and control tokens take {_SMALLEST}.")
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    engine.train_from_iterator((piece for text in texts for piece in without_long_words(text)), trainer)
    description = json.loads(engine.to_str())
    for added in description["added_tokens"]:
        added["special"] = added["content"] in CONTROL_TOKENS
    tokenizer = Tokenizer(json.dumps(description, ensure_ascii=False, indent=1) + "\n", CHAT_TEMPLATE)
    tokenizer.save(output_dir)
    return tokenizer


def without_long_words(text: str) -> Iterator[str]:
    """`text` as it is, or in short pieces where there may be a word (or run of spaces or signs) of 2 * LONG_WORD."""
    pieces = [text[start : start + LONG_WORD] for start in range(0, len(text), LONG_WORD)]
    whole = (piece for piece in pieces if len(piece) == LONG_WORD)
    if any(piece.isalpha() or piece.isspace() or not _WORD.search(piece) for piece in whole):
        yield from pieces
    else:
        yield text


def run(settings: TrainTokenizerSettings) -> None:
    """Train as the settings say and report what came out. Raises UserError where that cannot be read or written."""
    if settings.vocab_size < _SMALLEST:
        raise UserError(f"--vocab_size must be at least {_SMALLEST}, not {settings.vocab_size}.")
    texts = _read_inputs(settings.input) if settings.input else _built_in()
    try:
        tokenizer = train_tokenizer(texts, settings.vocab_size, Path(settings.output_dir))
    except OSError as error:
        raise UserError(f"{settings.output_dir} cannot be written: {error.strerror or error}.") from error
    info(f"[tokenizer] {tokenizer.vocab_size:,} entries -> {settings.output_dir}")
    if tokenizer.vocab_size < settings.vocab_size:
        info(f"[tokenizer] the text is too small for {settings.vocab_size:,} entries; it gave fewer")


def _built_in() -> Iterator[str]:
    from minillm.data.demo.corpus import tokenizer_corpus

    info("[tokenizer] no --input: learning from the built-in corpus")
    return tokenizer_corpus()


def _read_inputs(paths: Iterable[str]) -> Iterator[str]:
    from minillm.data.formats import RowReport, read_texts

    for path in paths:
        report = RowReport(source=path)
        yield from read_texts(path, report)
        report.log()
