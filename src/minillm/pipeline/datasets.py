"""Which files each stage trains on: the user's, the cloud's, or demo data made here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from minillm.atomic import write_atomic
from minillm.commands import display, say
from minillm.log import UserError
from minillm.pipeline.environment import DATA_VARIABLES, STAGES, Environment

FILE_NAMES = {"pretrain": "pretrain", "full_sft": "sft", "rlhf": "dpo"}
# Hand-written files, and how often a pass shows them: who it is a model must hear more than once.
SHIPPED = {"full_sft": ("identity_conversations.jsonl", 4), "rlhf": ("preference_pairs.jsonl", 1)}
SMOKE_ROWS = {"pretrain": 64, "full_sft": 16, "rlhf": 8}
EVALUATION_ROWS = 64
PROMPT_SAMPLE, LONGEST_PROMPT = 300, 160
CLOUD_SFT = ("final/sft_mini_512.cleaned.jsonl", "sft_mini_512.jsonl")


@dataclass(frozen=True)
class StageData:
    """The files of one stage. Without `validation` the trainer holds out a part of `train`."""

    train: Path
    validation: Path | None
    is_demo: bool


def prepare(environment: Environment, stages: Iterable[str], *, smoke_test: bool) -> dict[str, StageData]:
    """Find or make the data of each stage, every missing file being an error before any work begins.

    Raises UserError naming the file and the variable that is to be set.
    """
    named = {stage: named_dataset(environment, stage, smoke_test=smoke_test) for stage in stages}
    prepared = {stage: named[stage] or demo_data(environment, stage) for stage in named}
    for stage, data in prepared.items():
        held_out = display(data.validation) if data.validation else "a part held out of it"
        say(f"[data] {stage}: {display(data.train)}, validation: {held_out}")
    if not smoke_test:
        return prepared
    return {stage: _shortened(environment, stage, data) for stage, data in prepared.items()}


def sample_prompts(data: StageData) -> list[tuple[str, str]]:
    """What the finished model is asked, as (title, prompt): three short questions of the user's own conversations.
    [] for demo data, whose questions the report knows."""
    from minillm.data.files import RowReport
    from minillm.data.formats import read_conversations

    if data.is_demo:
        return []
    first = islice(read_conversations(data.train, RowReport()), PROMPT_SAMPLE)
    short = [
        (f"{Path(row.file).name}:{row.line}", row.messages[0]["content"])
        for row in first
        if len(row.messages) == 2 and len(row.messages[0]["content"]) <= LONGEST_PROMPT
    ]
    return short[:: max(1, len(short) // 3)][:3]


def named_dataset(environment: Environment, stage: str, *, smoke_test: bool = False) -> StageData | None:
    """What the user named, or what lies on the cloud; None where the demo data is to be used."""
    path, variable = environment.datasets[stage], DATA_VARIABLES[stage]
    if path is not None:
        if not path.exists():
            raise UserError(_missing(path, f"{variable} names it: correct the path, or unset it to train on demo data"))
        return StageData(path, None, is_demo=False)
    if stage != "full_sft" or not environment.on_cloud:
        return None
    tried = [root / name for name in CLOUD_SFT for root in (environment.cloud_input, environment.cloud_home)]
    found = next((path for path in tried if path.is_file()), None)
    for path in tried[: tried.index(found) + 1] if found else tried:
        say(f"[cloud]   {path}: {'found' if path == found else 'not there'}")
    if found is not None:
        return StageData(clean_conversations(environment, found), None, is_demo=False)
    advice = _missing(environment.cloud_input / CLOUD_SFT[-1], f"Put it there, or set {variable} to your file")
    if not smoke_test:
        raise UserError(advice)
    say(advice)
    say("[data] The smoke test goes on with demo data.")
    return None


def _missing(path: Path, advice: str) -> str:
    return f"[data] Required dataset not found: {display(path)}\n[data] {advice}."


def demo_data(environment: Environment, stage: str) -> StageData:
    """The generated data of a stage, its training part with the repository's hand-written Chinese rows."""
    folder = _generate_demo(environment)
    name = FILE_NAMES[stage]
    train = folder / f"{name}.jsonl"
    file, times = SHIPPED.get(stage, ("", 0))
    shipped = environment.root / "data" / "chinese" / file
    if shipped.is_file():
        train = _joined(folder / f"{name}_with_chinese.jsonl", [train, *[shipped] * times])
    return StageData(train, folder / f"{name}_val.jsonl", is_demo=True)


def _generate_demo(environment: Environment) -> Path:
    """DATA_DIR with demo data in it: as it lies there, or generated. Replaces no other files: UserError.

    A mark beside the data says which generator made it here, so that a newer one replaces it; what somebody
    made with `minillm data demo` has a manifest and no mark, and is used as it is.
    """
    from minillm.data import demo

    folder = environment.data_dir
    mark, generator = folder / ".run_sh_demo", _digest(Path(demo.__file__).parent)
    names = [f"{name}{end}.jsonl" for name in FILE_NAMES.values() for end in ("", "_val")]
    present = [name for name in names if (folder / name).is_file()]
    made_here = mark.is_file()
    if len(present) == len(names) and _is_demo(folder):
        if not made_here or mark.read_text(encoding="utf-8") == generator:
            return folder
    elif present and not made_here and not _is_demo(folder):
        raise UserError(
            f"[data] {display(folder / present[0])} is there and is not demo data, so it is not replaced.\n"
            "[data] To train on your files set PRETRAIN_JSON, SFT_JSON and DPO_JSON; "
            "for demo data set DATA_DIR to another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text("unfinished", encoding="utf-8")
    say(f"[data] Generating demo data: minillm data demo --output_dir {display(folder)}")
    counts = demo.generate_demo(folder, size=demo.DEFAULT_SIZE, seed=0)
    say("[data] Rows: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    mark.write_text(generator, encoding="utf-8")
    return folder


def _digest(package: Path) -> str:
    digest = hashlib.sha256()
    for part in sorted([*package.glob("*.py"), *package.glob("*.txt")]):
        digest.update(part.read_bytes())
    return digest.hexdigest()


def _is_demo(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("generator") == "minillm data demo"


def clean_conversations(environment: Environment, source: Path) -> Path:
    """Clean the cloud's conversations into data/final/sft_high_quality.jsonl and say what was kept."""
    from minillm.data import clean

    target = environment.root / "data" / "final" / "sft_high_quality.jsonl"
    say(f"[data] Cleaning: minillm data clean {display(source)} --output {display(target)}")
    clean.run(clean.CleanSettings(input=str(source), output=str(target)))
    return target


def evaluation_file(environment: Environment) -> Path | None:
    """Rows to try a found pretrain checkpoint on, or None when the user's file is not there (any more)."""
    named = environment.datasets["pretrain"]
    if named is None:
        return demo_data(environment, "pretrain").validation
    if not named.exists():
        say(f"[data] {display(named)} is not there: the checkpoint is not evaluated")
        return None
    return write_head(named, "pretrain", environment.data_dir / "evaluation" / "pretrain.jsonl", EVALUATION_ROWS)


def _shortened(environment: Environment, stage: str, data: StageData) -> StageData:
    target = environment.data_dir / "smoke" / f"{FILE_NAMES[stage]}.jsonl"
    write_head(data.train, stage, target, SMOKE_ROWS[stage])
    return StageData(target, data.validation, data.is_demo)


def write_head(source: Path, stage: str, target: Path, rows: int) -> Path:
    """Write the first `rows` usable rows of `source`, in any readable form, as plain JSON lines."""
    import orjson

    lines = (orjson.dumps(row) + b"\n" for row in islice(read_stage_rows(source, stage), rows))
    write_atomic(target, lambda beside: beside.write_bytes(b"".join(lines)))
    return target


def read_stage_rows(source: Path, stage: str, report: Any = None) -> Iterator[dict[str, Any]]:
    """The usable rows of a file as the stage understands them: {"text"}, {"conversations"} or a pair."""
    from minillm.data.formats import RowReport, read_conversations, read_texts
    from minillm.data.preferences import read_pairs

    assert stage in STAGES
    report = report or RowReport()
    if stage == "pretrain":
        yield from ({"text": text} for text in read_texts(source, report))
    elif stage == "full_sft":
        yield from ({"conversations": row.messages} for row in read_conversations(source, report))
    else:
        yield from ({"chosen": row.chosen, "rejected": row.rejected} for row in read_pairs(source, report))


def _joined(target: Path, sources: list[Path]) -> Path:
    """Concatenate files of JSON lines."""
    parts = [source.read_bytes().rstrip(b"\n") + b"\n" for source in sources]
    write_atomic(target, lambda beside: beside.write_bytes(b"".join(parts)))
    return target
