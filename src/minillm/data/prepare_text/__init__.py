"""`minillm data prepare-text`: text of any size as a folder of token ids that `minillm pretrain --data_path` maps.

The work is done in OUTPUT.preparing and committed every few seconds (state.json): killed or out of disk space, the
same command goes on from there, and the bytes are those of an uninterrupted run. The finished folder takes its name
at the end, whole. Whether a document is for training or validation is decided by its content and the seed, so
neither workers nor order matter, and copies of a text stay on one side.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from minillm import log
from minillm.atomic import clear_leftovers, put_in_place
from minillm.data.executors import LOCAL, Again, ExecutorSettings, run_tasks
from minillm.lock import FolderLock
from minillm.log import UserError

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class PrepareTextSettings:
    """Prepare text for pretraining"""

    input: tuple[str, ...] = field(
        metadata={
            "help": "files, folders or globs (txt, jsonl, parquet, also .gz, .zst); names of hub datasets "
            "(openwebtext, fineweb, fineweb-edu, tinystories, owner/name); addresses (s3://, hf://)"
        }
    )
    output_dir: str = field(metadata={"help": "folder for tokens, tokenizer and config.json"})
    tokenizer: str = field(
        default="", metadata={"help": "an existing tokenizer: folder or file (default: the shipped one)"}
    )
    vocab_size: int = field(
        default=0, metadata={"help": "train a tokenizer of so many entries on the input, e.g. 32000", "min": 0}
    )
    tokenizer_type: str = field(
        default="bpe", metadata={"help": "of the trained tokenizer", "choices": ("bpe", "sentencepiece")}
    )
    text_column: str = field(default="text", metadata={"help": "the field or column that has the text"})
    split: str = field(default="train", metadata={"help": "of a hub dataset"})
    max_seq_len: int = field(default=512, metadata={"help": "tokens a row: how many rows are reported", "min": 8})
    val_fraction: float = field(
        default=0.01, metadata={"help": "share of the documents for validation", "min": 0.0, "max": 0.5}
    )
    seed: int = field(default=42, metadata={"help": "which documents are for validation", "min": 0})
    shard_tokens: str = field(default="100M", metadata={"help": "tokens a file, e.g. 500K, 100M, 1B"})
    num_workers: int = field(
        default=0, metadata={"help": "processes that tokenize (default 0: threads, one a core)", "min": 0}
    )


def run(settings: PrepareTextSettings, executor: ExecutorSettings = LOCAL) -> None:
    """Prepares as the settings say; where Slurm does the work, its last job ends it. Raises UserError for input,
    settings or a disk that cannot be used; what was done until then is kept."""
    from minillm.data.prepare_text import folder
    from minillm.data.prepare_text.tokens import describe, prepare
    from minillm.data.shards import CONFIG_FILE
    from minillm.data.sources import find_sources

    check(settings)
    output = Path(settings.output_dir)
    sources = find_sources(settings.input)
    folder.refuse_input_as_output(sources, output)
    log.info(f"[data] {len(sources):,} sources, {sum(source.size for source in sources) / 1e6:,.1f} MB: checking them")
    identity = folder.identify(settings, sources)
    if folder.is_finished(output, identity):
        log.info(f"[data] {output} is already prepared from the same input with the same settings: nothing to do")
        return
    building = output.with_name(output.name + ".preparing")
    spread = None
    if executor.executor != "local":
        spread = partial(run_tasks, settings=executor, again=Again(run, settings, executor))
    with folder.clear_disk_errors(building), closing(FolderLock(building, "preparing")):
        if not (building / CONFIG_FILE).exists() and not prepare(settings, sources, identity, building, spread):
            return
        for name in (folder.STATE_FILE, "train_lengths.tmp", "val_lengths.tmp"):
            (building / name).unlink(missing_ok=True)
        clear_leftovers(building)
        put_in_place(building, output)  # what stands there is empty, or is_finished would have refused it
    describe(output)


def check(settings: PrepareTextSettings) -> None:
    """Raises UserError for settings that contradict each other."""
    if settings.tokenizer and settings.vocab_size:
        raise UserError("--tokenizer names an existing tokenizer and --vocab_size trains a new one: give one of them.")
    if settings.tokenizer_type == "sentencepiece" and not settings.vocab_size:
        raise UserError("--tokenizer_type sentencepiece is for a new tokenizer: give its --vocab_size too.")
    tokens_of(settings.shard_tokens)


def tokens_of(text: str) -> int:
    """100M -> 100000000. Raises UserError for what is no number of tokens."""
    number, unit = (text[:-1], UNITS[text[-1:].upper()]) if text[-1:].upper() in UNITS else (text, 1)
    try:
        tokens = int(float(number) * unit)
    except (ValueError, OverflowError):
        tokens = 0
    if tokens < 1:
        raise UserError(f"--shard_tokens: {text!r} is not a number of tokens such as 500K, 100M or 1B.")
    return tokens
