"""minillm evaluate: checkpoints of any family side by side. Likelihood, accuracy, what they write, and how fast.

Only one of the models is in memory at a time; the judge reads the texts when all are written. docs/evaluation.md
describes what is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.atomic import write_text
from minillm.config import UsageError
from minillm.eval.comparison import markdown, tables
from minillm.eval.output import make_room
from minillm.log import UserError, info

if TYPE_CHECKING:
    import numpy as np

    from minillm.checkpoint.model import OpenedCheckpoint
    from minillm.data.batches import PackedConversations, TextBlocks
    from minillm.eval.generation import Prompt, Unjudged
    from minillm.families.base import Family, Sampling

SCHEMA_VERSION = 1
METRICS = ("perplexity", "accuracy", "generation", "speed")


@dataclass(frozen=True)
class EvaluateSettings:
    """Evaluate checkpoints on held-out data, side by side"""

    checkpoint: tuple[str, ...] = field(metadata={"help": "full checkpoints (.pt) or flat weights (.pth)"})
    data_path: str = field(metadata={"help": "held-out data: texts or conversations", "aliases": ("data_dir",)})
    architecture: str = field(
        default="",
        metadata={
            "help": "of all checkpoints (default: as each says, else by its keys)",
            "choices": ("", "ar", "diffusion", "sdd"),
        },
    )
    metrics: str = field(
        default="perplexity,accuracy", metadata={"help": "perplexity,accuracy (default), generation, speed"}
    )
    stage: str = field(
        default="",
        metadata={
            "help": "how to read the data (default: as the checkpoint's stage)",
            "choices": ("", "pretrain", "sft"),
        },
    )
    held_out_seed: int = field(
        default=-1,
        metadata={
            "help": "data_path is training data: only the rows that a run with this --seed and --max_seq_len, and no "
            "validation data of its own, held out (default: all rows)",
            "min": -1,
        },
    )
    eval_samples: int = field(default=128, metadata={"help": "rows read for perplexity and accuracy", "min": 1})
    noise_samples: int = field(
        default=4, metadata={"help": "diffusion, sdd: noise draws of each row for perplexity and accuracy", "min": 1}
    )
    num_samples: int = field(default=100, metadata={"help": "texts that are generated", "min": 1})
    judge: str = field(
        default="", metadata={"help": "an ar checkpoint that says how likely generated texts are (default: none)"}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "longest generated text in tokens", "min": 1})
    temperature: float = field(default=1.0, metadata={"help": "0: always the most probable token", "min": 0.0})
    steps: int = field(
        default=0, metadata={"help": "diffusion, sdd: steps a text (default 0: one token a step)", "min": 0}
    )
    block_length: int = field(
        default=32, metadata={"help": "diffusion, sdd: tokens of a block (0: all at once)", "min": 0}
    )
    order: str = field(
        default="random",
        metadata={
            "help": "diffusion, sdd: which positions are written first. At temperature 1 random order samples what the "
            "model believes, the most confident first is far more uniform (default random)",
            "choices": ("random", "confidence"),
        },
    )
    max_seq_len: int = field(default=512, metadata={"help": "tokens a row", "min": 8})
    batch_size: int = field(default=4, metadata={"help": "rows at once", "min": 1})
    tokenizer: str = field(
        default="", metadata={"help": "tokenizer.json or its folder, for all checkpoints (default: their own)"}
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, mps"})
    seed: int = field(default=42, metadata={"help": "which rows are taken, and all randomness", "min": 0})
    output: str = field(
        default="", metadata={"help": "write this JSON file, and beside it tables (.md) and charts (.png)"}
    )

    def __post_init__(self) -> None:
        for name in self.chosen:
            if name not in METRICS:
                raise UsageError(f"--metrics: {name!r} is not one of {', '.join(METRICS)}")
        if not self.chosen:
            raise UsageError(f"--metrics: give some of {', '.join(METRICS)}, with commas between them")

    @property
    def chosen(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.metrics.split(",") if name.strip())

    @property
    def writes(self) -> bool:
        return "generation" in self.chosen or "speed" in self.chosen


def open_model(path: str, settings: EvaluateSettings) -> tuple[OpenedCheckpoint, Family]:
    """The checkpoint and its family, or the family that --architecture names.

    Raises:
        UserError: the weights cannot be read, or are not of such a family.
    """
    from minillm.checkpoint.model import open_checkpoint
    from minillm.families import saved_family
    from minillm.models.allocator import keep_freed_memory
    from minillm.models.transformer import LanguageModel

    keep_freed_memory()
    opened = open_checkpoint(path, tokenizer=settings.tokenizer, device=settings.device)
    wanted = settings.architecture
    if wanted and wanted != opened.architecture:
        config = opened.model.config
        if bool(config.denoiser) != (wanted == "sdd"):
            have = "has" if config.denoiser else "lacks"
            raise UserError(f"{path} is no {wanted} model: it {have} the embedding that sdd models alone have")
        model = LanguageModel(replace(config, causal=wanted == "ar"))
        model.load_state_dict(opened.model.state_dict())
        model.to(opened.model.head_weight.device)
        family = {**opened.family, "architecture": wanted, "denoiser": config.denoiser or "aggregate"}
        opened = replace(opened, model=model.eval().requires_grad_(False), family=family)
    return opened, saved_family(opened.family, opened.tokenizer)


def open_data(
    opened: OpenedCheckpoint, family: Family, stage: str, settings: EvaluateSettings
) -> TextBlocks | PackedConversations:
    """The held-out rows, as this family reads them."""
    from minillm.data.batches import PreferencePairs, open_dataset
    from minillm.data.instructions import part_of
    from minillm.data.shards import has_validation

    path = part_of(settings.data_path, "val")
    if not path:
        raise UserError(f"{settings.data_path} was prepared without a held-out part: give a file of held-out data")
    limit = opened.model.config.max_position_embeddings
    if settings.max_seq_len > limit:
        raise UserError(f"{opened.path} has {limit} positions: --max_seq_len {settings.max_seq_len} is too long")
    data = open_dataset(
        stage,
        path,
        opened.tokenizer,
        max_seq_len=settings.max_seq_len,
        tail=family.tail,
        hide_padding=not family.causal,
        part="val" if has_validation(settings.data_path) else "train",
    )
    assert not isinstance(data, PreferencePairs)  # --stage has no such choice
    return data


def identity(opened: OpenedCheckpoint) -> dict[str, Any]:
    """Which checkpoint it is."""
    from minillm.checkpoint.files import sha256

    return {
        "path": str(opened.path),
        "sha256": sha256(opened.path),
        "architecture": opened.architecture,
        "stage": opened.stage,
        "step": opened.step,
        "parameters": sum(each.numel() for each in opened.model.parameters()),
        "tokenizer": opened.tokenizer.fingerprint,
    }


def evaluate_model(path: str, settings: EvaluateSettings) -> tuple[dict[str, Any], list[Unjudged]]:
    """(one entry of `models`, the texts of it that the judge should read)."""
    from minillm.eval import likelihood as rows

    opened, family = open_model(path, settings)
    stage = settings.stage or ("sft" if opened.speaks_in_turns else "pretrain")
    data = open_data(opened, family, stage, settings)
    available = _rows(data, settings)
    result: dict[str, Any] = {"checkpoint": identity(opened), "data": {"stage": stage, "rows": len(available)}}
    result.update(dict.fromkeys(METRICS))
    if "perplexity" in settings.chosen or "accuracy" in settings.chosen:
        draws = rows.draws_of(family, settings.noise_samples)
        order = choose_rows(available, settings.eval_samples, settings.seed)
        found = rows.measure(
            opened, family, data, order, seed=settings.seed, batch_size=settings.batch_size, draws=draws
        )
        if "perplexity" in settings.chosen:
            result["perplexity"] = rows.perplexity_section(found, family.likelihood, draws)
        if "accuracy" in settings.chosen:
            result["accuracy"] = rows.accuracy_section(found, family.ordered)
    unjudged: list[Unjudged] = []
    if settings.writes:
        from minillm.eval.generation import choose_prompts

        order = choose_rows(available, settings.num_samples, settings.seed)
        prompts, skipped = choose_prompts(opened, data, order, settings.num_samples, settings.max_new_tokens)
        unjudged = _write(opened, family, prompts, skipped, settings, result)
    return result, unjudged


def _rows(data: TextBlocks | PackedConversations, settings: EvaluateSettings) -> np.ndarray:
    """The rows that may be read: all, or those that training held out."""
    import numpy as np

    from minillm.data.order import split_rows
    from minillm.data.shards import has_validation

    if settings.held_out_seed < 0 or has_validation(settings.data_path):
        return np.arange(len(data))
    held_out = split_rows(len(data), settings.held_out_seed)[1]
    if not len(held_out):
        raise UserError(f"{settings.data_path} has one row only: training held nothing out of it")
    return held_out


def choose_rows(available: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` of these rows, int64, in a seeded order."""
    from minillm.data.order import sample_indices

    return available[sample_indices(seed, 0, min(len(available), count), len(available))]


def _write(
    opened: OpenedCheckpoint,
    family: Family,
    prompts: Sequence[Prompt],
    skipped: int,
    settings: EvaluateSettings,
    result: dict[str, Any],
) -> list[Unjudged]:
    """Fill in generation and speed."""
    from minillm.eval import speed
    from minillm.eval.answers import write_answers
    from minillm.eval.generation import generation_section

    sampling = sampling_of(opened, settings)
    unjudged: list[Unjudged] = []
    if "generation" in settings.chosen:
        answers = write_answers(opened, family, [p.tokens for p in prompts], sampling, settings.batch_size)
        result["generation"], unjudged = generation_section(opened, prompts, skipped, answers)
    if "speed" in settings.chosen:
        info(f"[evaluate] {opened.path}: measuring speed")
        result["speed"] = speed.speed_section(opened, family, prompts, sampling)
        if settings.judge and not family.ordered:
            points, more = speed.quality_by_steps(opened, family, prompts, sampling, settings.batch_size)
            result["speed"]["quality_by_steps"] = points
            unjudged += more
    return unjudged


def sampling_of(opened: OpenedCheckpoint, settings: EvaluateSettings) -> Sampling:
    """How texts are written, as the settings say."""
    from minillm.families.base import Sampling

    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        stop_ids=(opened.tokenizer.end_of_text_id, opened.tokenizer.end_of_turn_id),
        seed=settings.seed,
        steps=settings.steps,
        block_length=settings.block_length,
        order=settings.order,
    )


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Everything that is written to the JSON file.

    Raises:
        UserError: a checkpoint, the judge or the data cannot be used, or sacrebleu is missing where texts are
            generated.
    """
    from minillm.eval.text_metrics import sacrebleu_metrics

    if "generation" in settings.chosen:
        sacrebleu_metrics()  # said before the long work
    # Opened again when the texts are written, so that memory is measured without it.
    judged_by = identity(_open_judge(settings)[0]) if settings.judge else None
    models, unjudged = [], []
    for path in settings.checkpoint:
        info(f"[evaluate] {path}")
        result, texts = evaluate_model(path, settings)
        models.append(result)
        unjudged += texts
    if judged_by and unjudged:
        from minillm.eval.generation import judge_texts

        judge_texts(*_open_judge(settings), unjudged, settings.seed, settings.batch_size)
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "evaluate",
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("checkpoint", "judge", "output")},
        "judge": judged_by,
        "models": models,
    }


def _open_judge(settings: EvaluateSettings) -> tuple[OpenedCheckpoint, Family]:
    from minillm.checkpoint.model import open_checkpoint
    from minillm.families import saved_family

    if not settings.writes:
        raise UserError("--judge reads generated texts: it needs --metrics with generation or speed")
    opened = open_checkpoint(settings.judge, device=settings.device)
    if opened.architecture != "ar":
        raise UserError(
            f"--judge {settings.judge} is a {opened.architecture} model, which gives a bound at most: "
            "give an ar checkpoint"
        )
    return opened, saved_family(opened.family, opened.tokenizer)


def run(settings: EvaluateSettings) -> None:
    """Print the tables; write JSON, Markdown and charts if asked.

    Raises:
        UserError: as `evaluate`, or the output cannot be written.
    """
    output = Path(settings.output)
    if settings.output:
        make_room(output, ".md", ".png")  # before the long work
    result = evaluate(settings)
    print(tables(result), file=sys.stdout)
    if settings.output:
        from minillm.eval.charts import draw

        write_text(output, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        picture = draw(result, output.with_suffix(".png"))
        write_text(output.with_suffix(".md"), markdown(result, output.with_suffix(".png").name if picture else ""))
