"""Text to tokens: speed to disk, speed of the loader, peak memory.

    python benchmarks/data.py --check

Speed: `minillm data prepare-text` (reading, hashing, tokenizing, writing) against `encode_batch` of the library
`tokenizers` alone, on texts that are in memory already. Both sides run in processes of their own, in turns, on all
cores of this process; the ids must be equal. Loader: random rows of the prepared folder, against what training
consumes. Memory: the highest resident memory while a large file is prepared and a tokenizer is trained on it.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    ROOT,
    bar_line,
    machine,
    machine_line,
    main,
    median,
    peak_memory_mb,
    spread,
    table,
    write_results,
)

from minillm.config import parse
from minillm.log import UserError, info

SPEED_BAR = 2.0
LOADER_BAR = 50.0
MEMORY_BAR_MB = 1_500.0
SHARED = ROOT.parent / "shared" / "data" / "pretrain_en.jsonl.gz"
PEER_BATCH = 1_000  # texts a call: all at once would take tens of bytes a character


@dataclass(frozen=True)
class DataBenchmark:
    """Text to tokens"""

    data: str = field(
        default="", metadata={"help": "jsonl or jsonl.gz with texts (default: shared text, else demo data)"}
    )
    size_mb: int = field(default=50, metadata={"help": "text to tokenize, made by repetition", "min": 1})
    memory_mb: int = field(default=2_000, metadata={"help": "input whose peak memory is measured", "min": 1})
    vocab_size: int = field(default=32_000, metadata={"help": "tokenizer that is trained meanwhile", "min": 300})
    rounds: int = field(default=3, metadata={"help": "turns of both sides", "min": 1})
    seq: int = field(default=256, metadata={"help": "tokens a row of the loader", "min": 8})
    batch: int = field(default=16, metadata={"help": "rows a batch of the loader", "min": 1})
    training: float = field(
        default=2_200.0, metadata={"help": "tokens/s that training consumes (preset small, two cores)", "above": 0.0}
    )
    check: bool = field(default=False, metadata={"help": "exit with 1 where a bar is missed"})
    results: str = field(default=RESULTS, metadata={"help": "folder for JSON and Markdown"})
    side: str = field(default="", metadata={"help": "used by the benchmark itself: one side, in a process of its own"})
    job: str = field(default="", metadata={"help": "used by the benchmark itself"})


def texts_of(settings: DataBenchmark, folder: Path) -> list[str]:
    """The texts that are repeated."""
    path = Path(settings.data) if settings.data else SHARED
    if not settings.data and not path.is_file():
        from minillm.data.demo import generate_demo

        info(f"[benchmark] {path} is not here: generated demo data take its place")
        generate_demo(folder / "demo")
        path = folder / "demo" / "pretrain.jsonl"
    if not path.is_file():
        raise UserError(f"--data: there is no file {path}")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def write_input(path: Path, texts: list[str], megabytes: int) -> int:
    """A jsonl file of the texts, again and again until there are so many MB of text. Bytes of text in it."""
    size = number = 0
    with path.open("w", encoding="utf-8") as stream:
        while size < megabytes * 1_000_000:
            text = texts[number % len(texts)]
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size, number = size + len(text.encode()), number + 1
    return size


def in_a_process(side: str, **job: Any) -> dict[str, Any]:
    """One side's answer."""
    command = [sys.executable, __file__, "--side", side, "--job", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"the side {side!r} failed ({done.returncode}); its messages are above")
    return json.loads(done.stdout)


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """`minillm data prepare-text`."""
    from minillm.data.prepare_text import PrepareTextSettings, run

    started = time.perf_counter()
    run(PrepareTextSettings(input=(job["input"],), output_dir=job["output"], vocab_size=job["vocab_size"],
                            val_fraction=0.0, shard_tokens="1B"))  # fmt: skip
    return {"seconds": time.perf_counter() - started, "peak_mb": peak_memory_mb()}


def peer(job: dict[str, Any]) -> dict[str, Any]:
    """`tokenizers.encode_batch`; reading and writing the ids for the comparison are not timed."""
    import numpy as np
    import tokenizers

    from minillm.text.tokenizer import ASSETS, CONTROL_TOKENS, TOKENIZER_FILE

    engine = tokenizers.Tokenizer.from_file(str(ASSETS / TOKENIZER_FILE))
    engine.encode_special_tokens = True
    end = engine.token_to_id(CONTROL_TOKENS[1])
    seconds, batch = 0.0, []
    with open(job["input"], encoding="utf-8") as lines, open(job["output"], "wb") as target:
        while True:
            line = lines.readline()
            if line:
                batch.append(json.loads(line)["text"])
            if batch and (len(batch) == PEER_BATCH or not line):
                started = time.perf_counter()
                encoded = engine.encode_batch(batch, add_special_tokens=False)
                seconds += time.perf_counter() - started
                target.write(b"".join(np.array([*item.ids, end], dtype=np.uint16).tobytes() for item in encoded))
                batch = []
            if not line:
                return {"seconds": seconds}


def loader(job: dict[str, Any]) -> dict[str, Any]:
    """Rows of a prepared folder in the order of training, for about two seconds."""
    from minillm.data.batches import open_dataset, sample_indices
    from minillm.text.tokenizer import Tokenizer

    data = open_dataset("pretrain", job["folder"], Tokenizer.load(job["folder"]), max_seq_len=job["seq"])
    started, batches = time.perf_counter(), 0
    while time.perf_counter() - started < 2.0:
        data.rows(sample_indices(0, batches * job["batch"], job["batch"], len(data)))
        batches += 1
    return {"tokens_per_second": batches * job["batch"] * job["seq"] / (time.perf_counter() - started)}


SIDES = {"ours": ours, "peer": peer, "loader": loader}


def measure(settings: DataBenchmark, folder: Path) -> dict[str, Any]:
    """All three questions, with files in `folder`."""
    texts = texts_of(settings, folder)
    source = folder / "speed.jsonl"
    megabytes = write_input(source, texts, settings.size_mb) / 1e6
    speeds: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(settings.rounds):
        for side in ("ours", "peer") if turn % 2 == 0 else ("peer", "ours"):
            place = folder / f"{side}{turn}"
            seconds = in_a_process(side, input=str(source), output=str(place), vocab_size=0)["seconds"]
            speeds[side].append(megabytes / seconds)
            info(f"[benchmark] round {turn + 1} {side}: {megabytes / seconds:.1f} MB/s")
    identical = (folder / "ours0" / "train_tokens.bin").read_bytes() == (folder / "peer0").read_bytes()
    rows = in_a_process("loader", folder=str(folder / "ours0"), seq=settings.seq, batch=settings.batch)
    large = folder / "memory.jsonl"
    write_input(large, texts, settings.memory_mb)
    memory = in_a_process("ours", input=str(large), output=str(folder / "memory"), vocab_size=settings.vocab_size)
    return {"mb_per_second": speeds, "identical": identical, **rows, "memory": memory}


def run(argv: Sequence[str]) -> int:
    (settings,) = parse("benchmarks/data.py", __doc__ or "", [DataBenchmark], argv)
    if settings.side:
        print(json.dumps(SIDES[settings.side](json.loads(settings.job))))
        return 0
    where = machine()
    Path(settings.results).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.results, prefix=".data-") as folder:
        result = measure(settings, Path(folder))
    speeds = result["mb_per_second"]
    ratios = [mine / theirs for mine, theirs in zip(speeds["ours"], speeds["peer"])]
    rows = [
        ["prepare-text, to disk", f"{spread(speeds['ours'], 1)} MB/s"],
        ["tokenizers.encode_batch, in memory", f"{spread(speeds['peer'], 1)} MB/s"],
        ["ratio within a round", spread(ratios, 2)],
        ["ids", "identical" if result["identical"] else "DIFFERENT"],
        ["loader", f"{result['tokens_per_second']:,.0f} tokens/s"],
        [f"peak memory, {settings.memory_mb:,} MB of text", f"{result['memory']['peak_mb']:,.0f} MiB"],
    ]
    bars = [
        bar_line("times the speed of tokenizers", median(ratios), SPEED_BAR, at_least=True),
        (f"{'met' if result['identical'] else 'MISSED'}: identical ids", result["identical"]),
        bar_line("loader, times training", result["tokens_per_second"] / settings.training, LOADER_BAR, at_least=True),
        bar_line("peak MiB", result["memory"]["peak_mb"], MEMORY_BAR_MB, at_least=False),
    ]
    markdown = "\n\n".join(
        [
            "# Text to tokens",
            machine_line(where),
            f"{settings.size_mb} MB of text, {settings.rounds} rounds; a tokenizer of {settings.vocab_size:,} entries "
            f"was trained while memory was measured ({result['memory']['seconds']:.0f} s).",
            table(["what", "measured: median (range)"], rows),
            "\n".join(f"- {line}" for line, _ in bars),
        ]
    )
    data = {"machine": where, "settings": asdict(settings), "ratios": ratios, **result}
    write_results(settings.results, "data", data, markdown)
    return int(settings.check and not all(met for _, met in bars))


if __name__ == "__main__":
    main(run)
