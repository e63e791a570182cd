"""`minillm data demo`: text, instructions and preference pairs about a small invented world.

Everything is written by the code of this package, English and Chinese, from a seed. The same settings give
the same bytes on any machine. What validation holds, training never shows: a person meets an object, two
numbers are added, a fact is asked for on one side of the split only, and no prompt occurs on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm.atomic import write_atomic, write_text
from minillm.data.demo import passages, preferences, tasks
from minillm.data.demo.dice import Dice
from minillm.data.demo.world import World
from minillm.log import UserError, info

DEFAULT_SIZE = 2200
SMALLEST_VALIDATION = 40
LANGUAGES = ("en", "zh")
# At the end of its choices a kind has said everything; then another kind is drawn instead.
TRIES = 50
Row = dict[str, Any]


@dataclass(frozen=True)
class DemoSettings:
    """Settings of `minillm data demo`."""

    output_dir: str = field(metadata={"help": "folder for the generated files"})
    size: int = field(
        default=DEFAULT_SIZE,
        metadata={"help": "pretraining documents; instructions and pairs follow in proportion"},
    )
    seed: int = field(default=0, metadata={"help": "another seed, another world"})


def run(settings: DemoSettings) -> None:
    """Generate as the settings say and report what was written."""
    counts = generate_demo(Path(settings.output_dir), size=settings.size, seed=settings.seed)
    rows = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    info(f"[demo] {rows} -> {settings.output_dir}")


def generate_demo(output_dir: Path, *, size: int = DEFAULT_SIZE, seed: int = 0) -> dict[str, int]:
    """Write pretrain, sft and dpo .jsonl files, each with its _val.jsonl, and manifest.json.

    `size` is the number of pretraining documents; there are about 0.63 times as many conversations and
    0.17 times as many preference pairs. Returns the number of rows by file name without its ending. Files
    that were there are replaced, each only when its successor is complete. Raises UserError for a size
    below 1.
    """
    if size < 1:
        raise UserError(f"--size must be at least 1, not {size}.")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    plan = {"pretrain": size, "sft": max(16, round(size * 0.63)), "dpo": max(8, round(size * 0.168))}
    held_prompts: set[str] = set()  # what validation asks, training never asks
    counts: dict[str, int] = {}
    for name in plan:
        rows = list(_rows(name, max(SMALLEST_VALIDATION, round(plan[name] * 0.03)), seed, True, set()))
        held_prompts.update(prompt for row in rows for prompt in prompts(row))
        counts[f"{name}_val"] = _write(output_dir / f"{name}_val.jsonl", iter(rows))
    for name, count in plan.items():
        counts[name] = _write(output_dir / f"{name}.jsonl", _rows(name, count, seed, False, held_prompts))
    counts = {f"{name}{end}": counts[f"{name}{end}"] for name in plan for end in ("", "_val")}
    manifest = {"generator": "minillm data demo", "format": 1, "size": size, "seed": seed, "rows": counts}
    text = json.dumps(manifest, indent=2) + "\n"
    write_text(output_dir / "manifest.json", text)
    return counts


def prompts(row: Row) -> list[str]:
    """What must not occur on both sides: the questions of a row, the text of a pretraining document."""
    if "text" in row:
        return [row["text"]]
    messages = row["conversations"] if "conversations" in row else row["chosen"]
    return [message["content"] for message in messages if message["role"] == "user"]


def _rows(name: str, count: int, seed: int, validation: bool, forbidden: set[str]) -> Iterator[Row]:
    """`count` different rows without a forbidden prompt; fewer only if the world has no more to say."""
    make: Callable[[World, Dice, bool], Row]
    make = {"pretrain": _document, "sft": tasks.conversation, "dpo": preferences.pair}[name]
    worlds = {language: World(seed, language) for language in LANGUAGES}
    seen: set[str] = set()
    side = "validation" if validation else "training"
    for index in range(count):
        dice = Dice(seed, name, side, index)
        for _ in range(TRIES):
            row = make(worlds[LANGUAGES[index % 2]], dice, validation)
            key = _identity(row)
            if key in seen or not forbidden.isdisjoint(prompts(row)):
                continue
            seen.add(key)
            yield row
            break


def _document(world: World, dice: Dice, validation: bool) -> Row:
    return {"text": passages.document(world, dice, validation), "language": world.language}


def _identity(row: Row) -> str:
    return json.dumps([row.get(key) for key in ("text", "conversations", "chosen", "rejected")], ensure_ascii=False)


def _write(path: Path, rows: Iterator[Row]) -> int:
    count = 0

    def write(beside: Path) -> None:
        nonlocal count
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1

    write_atomic(path, write)
    return count
