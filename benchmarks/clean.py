"""Speed and memory of `minillm data clean`.

    python benchmarks/clean.py --rows 200000
    python benchmarks/clean.py --rows 1000000 --modes similar --data ../shared/data/sft_mini_512.jsonl

Rows are made from pieces of the conversations in --data (by default of generated demo data), in another order for each
row, with the lengths of the originals. Of twenty rows one is repeated as it is and one in capitals. Each mode cleans
them in a process of its own; memory is the highest sum over that process and its workers.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import RESULTS, machine, machine_line, main, table, write_results

from minillm.config import parse
from minillm.data.files import RowReport
from minillm.data.formats import read_conversations
from minillm.log import UserError, info

MODES: dict[str, list[str]] = {
    "off": ["--near_duplicates", "off"],
    "same": ["--near_duplicates", "same"],
    "similar": ["--near_duplicates", "similar"],
    "languages": ["--near_duplicates", "off", "--languages", "en,zh"],
    "mask_pii": ["--near_duplicates", "off", "--mask_pii"],
    "decontaminate": ["--near_duplicates", "off", "--decontaminate"],
}
PIECE = re.compile(r"[^\n，。,.;；]{0,40}(?:[\n，。,.;；]\s*|\s+|$)|\S{40}")


@dataclass(frozen=True)
class CleanBenchmark:
    """Speed and memory of the cleaner"""

    rows: int = field(default=200_000, metadata={"help": "rows to clean", "min": 100})
    data: str = field(default="", metadata={"help": "conversations to make rows from; default: demo data"})
    modes: str = field(default="off,same,similar", metadata={"help": f"of {', '.join(MODES)}"})
    num_workers: int = field(default=-1, metadata={"help": "as in minillm data clean"})
    results: str = field(default=RESULTS, metadata={"help": "folder for JSON and Markdown"})


def varied_rows(data: Path, count: int) -> Iterator[str]:
    """`count` conversations as JSON lines, from pieces of those in `data`; the same ones every time."""
    conversations = [row.messages for row in read_conversations(data, RowReport())]
    pools: dict[tuple[bool, str], list[str]] = {}
    lengths: list[tuple[bool, list[tuple[str, int]]]] = []
    for messages in conversations:
        wide = not messages[-1]["content"][:50].isascii()
        for message in messages:
            pools.setdefault((wide, message["role"]), []).extend(filter(None, PIECE.findall(message["content"])))
        lengths.append((wide, [(message["role"], len(message["content"])) for message in messages]))
    generator = random.Random(0)
    earlier: list[str] = []
    for number in range(count):
        if number % 20 == 19:
            yield generator.choice(earlier)
            continue
        if number % 20 == 9:
            yield json.dumps(json.loads(generator.choice(earlier).upper().lower()), ensure_ascii=False)
            continue
        wide, turns = generator.choice(lengths)
        messages = []
        for role, length in turns:
            pool = pools[wide, role]
            text = "".join(generator.choices(pool, k=length // 8 + 2))
            messages.append({"role": role, "content": text[: max(length, 12)]})
        row = json.dumps({"conversations": messages}, ensure_ascii=False)
        if len(earlier) < 10_000:
            earlier.append(row)
        yield row


def resident_mb(process: int) -> float:
    """Memory of a process and all below it, in MiB; shared pages count once for each process that has them."""
    total = 0.0
    try:
        for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1]) / 2**10
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                total += resident_mb(int(child))
    except OSError:  # it has ended, or there is no /proc
        pass
    return total


def measure(source: Path, rows: int, flags: list[str], folder: Path) -> dict[str, Any]:
    """One run of the cleaner: seconds, rows/s, peak memory, counts."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "minillm", "data", "clean", str(source), "--output", str(folder / "out.jsonl")]
    started, used = time.perf_counter(), _children_seconds()
    process = subprocess.Popen([*command, "--report", str(report), *flags], stderr=subprocess.PIPE, text=True)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, resident_mb(process.pid))
        time.sleep(0.1)
    seconds = time.perf_counter() - started
    if process.returncode:
        assert process.stderr is not None
        raise UserError(f"the cleaner failed: {process.stderr.read()}")
    counts = json.loads(report.read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "cpu_seconds": _children_seconds() - used,
        "rows_per_second": rows / seconds,
        "peak_mb": peak,
        "reasons": counts["reasons"],
    }


def _children_seconds() -> float:
    """Processor time of ended processes of ours, which says more than the clock on a machine that has other work."""
    times = os.times()
    return times.children_user + times.children_system


def run(argv: Sequence[str]) -> int:
    (settings,) = parse("benchmarks/clean.py", __doc__ or "", [CleanBenchmark], argv)
    modes = settings.modes.split(",")
    if wrong := [mode for mode in modes if mode not in MODES]:
        raise UserError(f"--modes: {wrong[0]!r} is not one of {', '.join(MODES)}")
    facts = machine()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = Path(settings.data) if settings.data else _demo(folder)
        source = folder / "rows.jsonl"
        with open(source, "w", encoding="utf-8") as stream:
            for row in varied_rows(data, settings.rows):
                stream.write(row + "\n")
        size = source.stat().st_size
        for mode in modes:
            flags = [*MODES[mode], *([str(data)] if mode == "decontaminate" else [])]
            flags += ["--min_chars", "1", "--num_workers", str(settings.num_workers)]
            info(f"[benchmark] {mode}: {settings.rows:,} rows, {size / 2**20:,.0f} MiB")
            results.append({"mode": mode, **measure(source, settings.rows, flags, folder)})
    header = ["mode", "rows/s", "MiB/s", "seconds", "CPU seconds", "peak MiB", "removed"]
    lines = [
        [
            each["mode"], f"{each['rows_per_second']:,.0f}", f"{size / 2**20 / each['seconds']:,.1f}",
            f"{each['seconds']:,.1f}", f"{each['cpu_seconds']:,.1f}", f"{each['peak_mb']:,.0f}",
            ", ".join(f"{count:,} {reason}" for reason, count in each["reasons"].items()),
        ]
        for each in results
    ]  # fmt: skip
    markdown = f"{settings.rows:,} rows of {size / settings.rows:,.0f} bytes on average\n\n{table(header, lines)}\n\n"
    markdown += machine_line(facts)
    content = {"rows": settings.rows, "bytes": size, "machine": facts, "results": results}
    write_results(settings.results, "clean", content, markdown)
    return 0


def _demo(folder: Path) -> Path:
    from minillm.data.demo import generate_demo

    generate_demo(folder / "demo", size=2_000, seed=0)
    return folder / "demo" / "sft.jsonl"


if __name__ == "__main__":
    main(run)
