"""The flags that all training stages share, and those of one method. No torch here: help must be quick."""

from __future__ import annotations

from dataclasses import dataclass, field

from minillm.families.settings import FamilySettings
from minillm.log import UserError
from minillm.models.config import ModelSettings

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DataSettings:
    """Data"""

    data_path: str = field(
        default="",
        metadata={
            "help": "training data: a file, folder, glob or prepared folder (default: data/processed/<stage>.jsonl)",
            "aliases": ("data_dir",),
        },
    )
    validation_data: str = field(
        default="",
        metadata={
            "help": "held-out data (default: a seeded 2 % of the training rows, at least 32 where there are enough)"
        },
    )
    tokenizer: str = field(
        default="", metadata={"help": "tokenizer.json or its folder (default: the checkpoint's, else the shipped one)"}
    )
    max_seq_len: int = field(default=512, metadata={"help": "tokens a row", "min": 8})
    num_workers: int = field(
        default=0, metadata={"help": "processes that tokenize (default 0: threads of the tokenizer)", "min": 0}
    )


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
    batch_size: int = field(default=8, metadata={"help": "rows (pairs for dpo) a batch", "min": 1})
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
    eval_every: int = field(default=0, metadata={"help": "steps between evaluations (default 0: ten a run)", "min": 0})
    eval_samples: int = field(default=128, metadata={"help": "validation rows an evaluation", "min": 1})
    save_every: int = field(
        default=0,
        metadata={"help": "steps between checkpoints (default 0: five a run)", "aliases": ("save_interval",), "min": 0},
    )
    keep_last: int = field(default=2, metadata={"help": "step_*.pt files that are kept", "min": 0})
    log_every: int = field(default=10, metadata={"help": "steps between logged lines", "min": 1})
    early_stopping_patience: int = field(
        default=0, metadata={"help": "stop after so many evaluations without improvement (default 0: never)", "min": 0}
    )


@dataclass(frozen=True)
class OptimSettings:
    """Optimizer"""

    optimizer: str = field(
        default="", metadata={"help": "default: muon for pretrain, adamw else", "choices": ("", "adamw", "muon")}
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
class TrackSettings:
    """Tracking"""

    no_wandb: bool = field(default=False, metadata={"help": "do not log to Weights & Biases"})
    wandb_project: str = field(default="minillm", metadata={"help": "W&B project"})
    wandb_run_name: str = field(default="", metadata={"help": "default: {architecture}-{dataset}-{size}-v{n}"})
    tensorboard_dir: str = field(default="", metadata={"help": "write TensorBoard files under this folder"})


@dataclass(frozen=True)
class PreferenceSettings:
    """Preference learning"""

    beta: float = field(default=0.1, metadata={"help": "strength of the pull towards the reference", "above": 0.0})


@dataclass(frozen=True)
class Settings:
    """All flags of a training command, in the groups that the help shows."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    optim: OptimSettings
    track: TrackSettings
    family: FamilySettings = FamilySettings()
    preference: PreferenceSettings = PreferenceSettings()


@dataclass(frozen=True)
class StageDefaults:
    """What a stage does when a flag is not given."""

    data_file: str
    optimizer: str
    learning_rate: float
    starts_from: str | None  # the stage whose checkpoint it starts from


STAGES = {
    "pretrain": StageDefaults("pretrain.jsonl", "muon", 2e-3, None),
    "full_sft": StageDefaults("sft.jsonl", "adamw", 3e-4, "pretrain"),
    "rlhf": StageDefaults("dpo.jsonl", "adamw", 2e-5, "full_sft"),
}
ALIASES = {"sft": "full_sft", "dpo": "rlhf"}


def canonical_stage(name: str) -> str:
    """sft -> full_sft, dpo -> rlhf; raises UserError for a name that is no stage."""
    stage = ALIASES.get(name, name)
    if stage not in STAGES:
        raise UserError(f"{name!r} is not a stage; there are {', '.join([*STAGES, *ALIASES])}")
    return stage
