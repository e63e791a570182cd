"""The flags that all training stages share, and those of one method. No torch here: help must be quick."""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from minillm.config import UsageError
from minillm.families.settings import FamilySettings
from minillm.models.config import LINEAR_LAYERS, ModelSettings

MOST_TIMES = 1_000_000  # that a weight may be of another
Group = TypeVar("Group")
OPTIMIZERS = ("adamw", "muon", "adamw8bit")
CHECKPOINTING = ("none", "selective", "full")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DataSettings:
    """Data"""

    data_path: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "training data: a file, folder, glob or prepared folder (default: data/processed/<stage>.jsonl); "
            "several are mixed: by size, or by weight as in a.jsonl:0.7 b.jsonl:0.3",
            "aliases": ("data_dir",),
        },
    )
    validation_data: str = field(
        default="",
        metadata={
            "help": "held-out data (default: a seeded 2 % of the training rows, at least 32 where there are enough)"
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "pretrain: tokenize while training, in the order of the data and without a store; data_path may "
            "then name datasets of the hub and addresses, too"
        },
    )
    tokenizer: str = field(
        default="", metadata={"help": "tokenizer.json or its folder (default: the checkpoint's, else the shipped one)"}
    )
    max_seq_len: int = field(default=512, metadata={"help": "tokens a row", "min": 8})
    num_workers: int = field(
        default=0, metadata={"help": "processes that tokenize (default 0: threads of the tokenizer)", "min": 0}
    )

    def __post_init__(self) -> None:
        weighted = self.weighted_paths
        if self.streaming and any(weight is not None for _, weight in weighted):
            raise UsageError("--streaming reads one path after another: give --data_path without weights")

    @property
    def weighted_paths(self) -> list[tuple[str, float | None]]:
        """Each path with its weight; None where it has none."""
        return split_weights([text for text in self.data_path if text], names_with_colons=self.streaming)


def split_weights(texts: Sequence[str], *, names_with_colons: bool = False) -> list[tuple[str, float | None]]:
    """(path, weight) of each PATH:WEIGHT; the weight is None for what ends in no number or is there under its whole
    name. names_with_colons: what stands before the colon must be there, as in owner/name:2024 it is not.

    Raises UsageError for a weight that is not above 0, and when some have a weight and others have none.
    """
    found: list[tuple[str, float | None]] = []
    for text in texts:
        path, _, number = text.rpartition(":")
        try:
            weight = float(number) if path else None
        except ValueError:
            weight = None
        if weight is None or _is_there(text) or names_with_colons and not _is_there(path):
            found.append((text, None))
        elif not (math.isfinite(weight) and weight > 0):
            raise UsageError(f"--data_path {text}: {number} is no weight. Give a number above 0, as in {path}:0.5")
        else:
            found.append((path, weight))
    without = [path for path, weight in found if weight is None]
    if without and len(without) < len(found):
        raise UsageError(
            f"--data_path: {without[0]} has no weight and others have one. Give all of them a weight, or none: then "
            "each counts by its size"
        )
    weights = [weight for _, weight in found if weight is not None]
    if weights and max(weights) > MOST_TIMES * min(weights):
        raise UsageError(f"--data_path: one weight is over {MOST_TIMES:,} times another: leave the small one out")
    return found


def _is_there(path: str) -> bool:
    return Path(path).exists() or glob.has_magic(path) and bool(glob.glob(path, recursive=True))


@dataclass(frozen=True)
class RunSettings:
    """Run"""

    out_dir: str = field(
        default="out", metadata={"help": "where the run folder and the flat weights go", "aliases": ("output_dir",)}
    )
    pretrained_path: str = field(
        default="",
        metadata={
            "help": "weights to start from (.pth, .pt or .safetensors)",
            "aliases": ("pretrained_checkpoint",),
        },
    )
    load_from_remote: bool = field(default=False, metadata={"help": "look for weights in the cloud folder only"})
    resume_from: str = field(
        default="", metadata={"help": "go on with an interrupted run: a checkpoint, or auto for this run's newest"}
    )
    epochs: float = field(default=1.0, metadata={"help": "passes over the data", "above": 0})
    max_steps: int = field(default=0, metadata={"help": "optimizer steps (default 0: as epochs say)", "min": 0})
    batch_size: int = field(
        default=8,
        metadata={
            "help": "rows (pairs for dpo) a batch; auto: 8, and as many of a step's rows at once as fit (default 8)",
            "min": 1,
            "words": {"auto": 0},
        },
    )
    grad_accum_steps: int = field(
        default=1,
        metadata={"help": "batches an optimizer step", "aliases": ("accumulation_steps",), "min": 1},
    )
    micro_batch_size: int = field(
        default=0,
        metadata={
            "help": "rows the model sees at once: speed and memory (experts are balanced within it; default 0: auto)",
            "min": 0,
        },
    )
    shards: int = field(
        default=0,
        metadata={
            "help": "processes that share one copy of weights, gradients and optimizer state: 1 each has its own, all "
            "of them FSDP, a divisor in between both (default 0: by the model's size)",
            "min": 0,
        },
    )
    seed: int = field(default=42, metadata={"help": "weights, order of data and noise", "min": 0, "max": 2**53})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, mps"})
    dtype: str = field(
        default="auto",
        metadata={"help": "precision of the arithmetic; weights stay float32", "choices": DTYPES},
    )
    compile: str = field(
        default="auto",
        metadata={
            "help": "torch.compile; auto: where the run is long enough",
            "choices": ("auto", "on", "off"),
            "bare": "on",
        },
    )
    gradient_checkpointing: str = field(
        default="none",
        metadata={
            "help": "compute parts of a layer again for its gradient instead of keeping them: less memory, more time "
            "(selective: the feed-forward part; full: all of it; bare: full)",
            "choices": CHECKPOINTING,
            "bare": "full",
        },
    )
    eval_every: int = field(default=0, metadata={"help": "steps between evaluations (default 0: ten a run)", "min": 0})
    eval_samples: int = field(default=128, metadata={"help": "validation rows an evaluation", "min": 1})
    save_every: int = field(
        default=0,
        metadata={"help": "steps between checkpoints (default 0: five a run)", "aliases": ("save_interval",), "min": 0},
    )
    keep_last: int = field(default=2, metadata={"help": "step_*.pt files that are kept", "min": 0})
    log_every: int = field(default=10, metadata={"help": "steps between logged lines", "min": 1})
    profile: int = field(
        default=0,
        metadata={
            "help": "steps to profile once the run is warm: trace and summary in RUN/profile (bare: 3; default off)",
            "min": 0,
            "max": 100,
            "bare": "3",
        },
    )
    timeout: float = field(
        default=600.0,
        metadata={
            "help": "several processes: seconds without a finished step or a sign of life after which the run ends and "
            "names the process to blame; longer than the longest step",
            "min": 1.0,
        },
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "stop after so many evaluations without improvement (default 0: never)", "min": 0}
    )


@dataclass(frozen=True)
class OptimSettings:
    """Optimizer"""

    optimizer: str = field(
        default="",
        metadata={
            "help": "default: muon for pretrain and sft, adamw else; adamw8bit: moments in 8 bits (the extra quant)",
            "choices": ("", *OPTIMIZERS),
        },
    )
    learning_rate: float = field(default=0.0, metadata={"help": "peak learning rate (default: by stage)", "min": 0.0})
    warmup_steps: int = field(
        default=-1, metadata={"help": "steps of linear warm-up (default -1: 5 % of the run, at most 100)", "min": -1}
    )
    final_lr_ratio: float = field(
        default=0.0, metadata={"help": "the cosine ends at this share of the peak", "min": 0.0, "max": 1.0}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "decoupled, on matrices", "min": 0.0})
    beta1: float = field(default=0.9, metadata={"help": "AdamW's first decay", "min": 0.0, "max": 0.9999})
    beta2: float = field(default=0.95, metadata={"help": "AdamW's second decay", "min": 0.0, "max": 0.99999})
    ema: float = field(
        default=0.0,
        metadata={
            "help": "decay of a running average of the weights, which is evaluated and kept (e.g. 0.999; default off)",
            "min": 0.0,
            "max": 0.999999,
        },
    )
    grad_clip: float = field(default=1.0, metadata={"help": "largest gradient norm (0: no clipping)", "min": 0.0})


@dataclass(frozen=True)
class LoraSettings:
    """LoRA: train a small adapter instead of the weights"""

    lora_rank: int = field(
        default=0, metadata={"help": "rank of the adapter (default 0: no adapter; `minillm lora`: 8)", "min": 0}
    )
    lora_alpha: float = field(
        default=0.0, metadata={"help": "the adapter counts alpha / rank (default 0: alpha is twice the rank)", "min": 0}
    )
    lora_targets: tuple[str, ...] = field(
        default=("all",),
        metadata={"help": f"layers that get one: {' '.join(LINEAR_LAYERS)} (default: all of these, with all experts)"},
    )

    def __post_init__(self) -> None:
        for name in self.lora_targets:
            if name not in ("all", *LINEAR_LAYERS):
                raise UsageError(f"--lora_targets: {name!r} is not one of all, {', '.join(LINEAR_LAYERS)}")


@dataclass(frozen=True)
class TrackSettings:
    """Tracking"""

    no_wandb: bool = field(default=False, metadata={"help": "do not log to Weights & Biases"})
    wandb_project: str = field(default="minillm", metadata={"help": "W&B project"})
    wandb_run_name: str = field(default="", metadata={"help": "default: {architecture}-{dataset}-{size}-v{n}"})
    tensorboard_dir: str = field(default="", metadata={"help": "write TensorBoard files under this folder"})


@dataclass(frozen=True)
class Settings:
    """All flags of a training command, in the groups that the help shows."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    optim: OptimSettings
    track: TrackSettings
    family: FamilySettings = FamilySettings()
    method: tuple[object, ...] = ()  # groups of flags that only some stages have

    def of(self, kind: type[Group]) -> Group:
        """The group of this kind, with its defaults where the command does not have it."""
        found = [group for group in self.method if isinstance(group, kind)]
        return found[0] if found else kind()

    def own_flags(self) -> dict[str, Any]:
        """Flags that only some stages have."""
        return {name: value for group in self.method for name, value in vars(group).items()}


def without_auto(settings: Settings) -> tuple[Settings, bool]:
    """The settings with a number for batch_size, and whether it was `auto`."""
    if settings.run.batch_size:
        return settings, False
    if settings.run.micro_batch_size:
        raise UsageError("--batch_size auto finds the rows at once: leave --micro_batch_size out")
    return replace(settings, run=replace(settings.run, batch_size=RunSettings().batch_size)), True
