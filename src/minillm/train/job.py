"""From settings to everything a run needs: data, model, method, optimizers, and where it goes on."""

from __future__ import annotations

import math
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minillm.checkpoint.files import (
    BackgroundWriter,
    check_finite,
    clear_leftovers,
    extract_weights,
    read_tensors,
    save_tensors,
    sha256,
)
from minillm.checkpoint.format import restore_rng_state
from minillm.checkpoint.loader import CheckpointLoader, config_of, flat_name, load_weights
from minillm.checkpoint.model import tokenizer_of
from minillm.convert.huggingface import generation_config, hf_config
from minillm.data.batches import open_dataset, train_validation_split
from minillm.data.order import Dataset
from minillm.families import get_family
from minillm.families.base import Family
from minillm.log import UserError, info, warn
from minillm.methods.base import Method
from minillm.methods.dpo import DirectPreference
from minillm.methods.likelihood import Likelihood
from minillm.models.config import ModelConfig, ModelSettings, build_model_config, size_name
from minillm.models.transformer import LanguageModel, count_parameters
from minillm.text.tokenizer import Tokenizer
from minillm.train.metrics import Trackers, next_version, start_wandb
from minillm.train.optim import Optimizers, build_optimizers
from minillm.train.precision import (
    choose_compile,
    choose_device,
    choose_dtype,
    describe_machine,
    gemm_flops,
    keep_freed_memory,
)
from minillm.train.settings import (
    STAGES,
    DataSettings,
    OptimSettings,
    PreferenceSettings,
    RunSettings,
    TrackSettings,
    canonical_stage,
)
from minillm.train.state import TrainState

CPU_MICRO_TOKENS = 2048  # what keeps one layer's activations in a CPU's cache
SAME_RUN = ("batch_size", "grad_accum_steps", "learning_rate", "max_seq_len", "seed", "optimizer", "total_steps",
            "warmup_steps", "weight_decay", "final_lr_ratio", "data_path")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """All flags of a training command, in the groups that the help shows."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    optim: OptimSettings
    track: TrackSettings
    preference: PreferenceSettings = PreferenceSettings()


@dataclass
class Job:
    """Everything the loop touches."""

    stage: str
    family: Family
    method: Method
    model: LanguageModel
    tokenizer: Tokenizer
    train_data: Dataset
    validation_data: Dataset | None
    optimizers: Optimizers
    scaler: torch.amp.GradScaler
    state: TrainState
    trackers: Trackers
    writer: BackgroundWriter
    device: torch.device
    dtype: torch.dtype
    folder: Path
    flat_path: Path
    run_name: str
    config: dict[str, Any]  # the resolved settings, themselves a recipe
    parent: dict[str, Any] | None
    reference_sha256: str
    train_rows: int
    rows_per_step: int
    micro_rows: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    final_lr_ratio: float
    grad_clip: float
    eval_every: int
    eval_samples: int
    save_every: int
    log_every: int
    keep_last: int
    patience: int
    seed: int
    flops_per_token: float
    peak_flops: float


def find_resume(folder: Path, resume_from: str) -> tuple[dict[str, Any], Path] | None:
    """The checkpoint to go on from: the one named, or with "auto" the newest good one of the run folder.

    Raises:
        UserError: a named checkpoint cannot be used, or every file of the folder is damaged.
    """
    if not resume_from:
        return None
    if resume_from != "auto":
        path = Path(resume_from)
        return _full_checkpoint(path), path
    numbered = sorted(folder.glob("step_*.pt"), key=lambda path: int(path.stem.split("_")[1]), reverse=True)
    candidates = [folder / "last.pt", *numbered, folder / "best_model.pt"]
    existing = [path for path in candidates if path.exists()]
    for path in existing:
        try:
            return _full_checkpoint(path), path
        except UserError as error:
            warn(f"{error}; trying an older checkpoint")
    if existing:
        raise UserError(f"no checkpoint in {folder} can be read; start anew without --resume_from")
    info(f"[run] --resume_from auto: no checkpoint in {folder} yet, starting from the beginning")
    return None


def _full_checkpoint(path: Path) -> dict[str, Any]:
    content = read_tensors(path)
    if not isinstance(content, dict) or "progress" not in content:
        raise UserError(f"{path} is not a full checkpoint: it has weights only. Start from it with --pretrained_path")
    return content


def find_pretrained(stage: str, settings: Settings, hidden_size: int) -> Path | None:
    """The weights a stage starts from. Pretraining starts from a checkpoint only if one is named."""
    start = STAGES[stage].starts_from
    if start is None:
        if settings.run.pretrained_path:
            CheckpointLoader.resolve_checkpoint_path(settings.run.pretrained_path)
            return Path(settings.run.pretrained_path)
        return None
    found = CheckpointLoader.resolve_checkpoint_path(
        settings.run.pretrained_path or None,
        start,
        hidden_size,
        settings.model.use_moe,
        local_dir=None if settings.run.load_from_remote else settings.run.out_dir,
    )
    if found is None:
        warn("No pretrained checkpoint found: starting from random weights")
    return Path(found) if found else None


def check_sizes(settings: ModelSettings, config: ModelConfig, source: Path) -> None:
    """The sizes given as flags must be those of the checkpoint. Raises UserError naming the first that is not."""
    wanted = asdict(settings)
    preset = wanted.pop("model_config")
    if preset:
        built = build_model_config(settings, vocab_size=config.vocab_size, max_seq_len=0, causal=config.causal)
        wanted |= {"hidden_size": built.hidden_size, "num_hidden_layers": built.num_hidden_layers}
    for name, value in wanted.items():
        if name in ("num_experts", "num_experts_per_tok") or not value:
            continue
        if getattr(config, name) != value:
            raise UserError(f"{source} has {name} {getattr(config, name)}, --{name} says {value}: leave the flag out")


def build_model(
    settings: Settings, stage: str, family: Family, resumed: dict[str, Any] | None
) -> tuple[LanguageModel, Tokenizer, dict[str, Any] | None]:
    """The model with its starting weights, its tokenizer, and what it started from (path, stage, step)."""
    seed, max_seq_len = settings.run.seed, settings.data.max_seq_len
    if resumed is not None:
        config = ModelConfig.from_dict(resumed["model_config"])
        check_sizes(settings.model, config, Path("the checkpoint to resume"))
        tokenizer = tokenizer_of(resumed, Path("."), "")
        model = LanguageModel(config)
        load_weights(model, resumed["model_state_dict"], "the checkpoint to resume", strict=True)
        return model, tokenizer, resumed["parent"]
    hidden = build_model_config(settings.model, vocab_size=1, max_seq_len=0, causal=True).hidden_size
    source = find_pretrained(stage, settings, hidden)
    if source is None:
        tokenizer = Tokenizer.load(settings.data.tokenizer or None)
        config = build_model_config(
            settings.model, vocab_size=tokenizer.vocab_size, max_seq_len=max_seq_len, causal=family.causal
        )
        model = LanguageModel(config)
        model.init_weights(seed)
        return model, tokenizer, None
    content = read_tensors(source)
    weights = extract_weights(content, source)
    check_finite(weights, source)
    config = config_of(content, source)
    check_sizes(settings.model, config, source)
    if max_seq_len > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_len {max_seq_len} is more than the {config.max_position_embeddings} positions of {source}"
        )
    tokenizer = tokenizer_of(content, source, settings.data.tokenizer)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{source} has a vocabulary of {config.vocab_size}, the tokenizer {tokenizer.vocab_size}")
    model = LanguageModel(config)
    load_weights(model, weights, str(source), strict=True)
    full = isinstance(content, dict) and "model_state_dict" in content
    parent = {
        "path": str(source), "sha256": sha256(source), "stage": content.get("stage") if full else None,
        "step": content.get("global_step") if full else None,
    }  # fmt: skip
    return model, tokenizer, parent


def open_data(settings: Settings, stage: str, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None, str]:
    """Training rows, validation rows and the path of the training data."""
    path = settings.data.data_path or f"data/processed/{STAGES[stage].data_file}"
    if not settings.data.data_path and not Path(path).exists():
        raise UserError(
            f"no --data_path given and {path} does not exist: minillm data demo --output_dir data/processed"
        )

    def opened(source: str) -> Dataset:
        return open_dataset(
            stage, source, tokenizer, max_seq_len=settings.data.max_seq_len, num_workers=settings.data.num_workers
        )

    train = opened(path)
    if settings.data.validation_data:
        return train, opened(settings.data.validation_data), path
    train, validation = train_validation_split(train, seed=settings.run.seed)
    if validation is None:
        warn("one row of data cannot be split: no validation, the training loss decides which checkpoint is best")
    return train, validation, path


def micro_rows(settings: RunSettings, max_seq_len: int, rows_per_step: int, device: torch.device, pairs: bool) -> int:
    """Rows the model sees at once: as given, else on a GPU a batch, on a CPU what its cache holds; always a
    divisor of the step where that keeps shapes equal."""
    if settings.micro_batch_size:
        return min(settings.micro_batch_size, rows_per_step)
    if device.type != "cpu":
        return settings.batch_size
    wanted = max(1, min(rows_per_step, CPU_MICRO_TOKENS // (max_seq_len * (2 if pairs else 1))))
    return next(rows for rows in range(wanted, 0, -1) if rows_per_step % rows == 0)


def build_method(
    stage: str, settings: Settings, family: Family, model: LanguageModel, folder: Path, resumed: dict[str, Any] | None
) -> tuple[Method, str]:
    """The stage's method, and the hash of its frozen reference if it has one."""
    seed = settings.run.seed
    if stage != "rlhf":
        return Likelihood(family, seed), ""
    reference = LanguageModel(model.config)
    path = folder / "reference.pth"
    if resumed is None:
        reference.load_state_dict(model.state_dict())
        save_tensors(path, reference.state_dict())
    else:
        if not path.is_file() or sha256(path) != resumed["method_state"]["reference_sha256"]:
            raise UserError(f"{path} is missing or not the reference this run started with: it cannot be resumed")
        load_weights(reference, extract_weights(read_tensors(path), path), str(path), strict=True)
    reference.requires_grad_(False).eval()
    return DirectPreference(family, reference, beta=settings.preference.beta, seed=seed), sha256(path)


def prepare_folder(folder: Path, *, resuming: bool) -> None:
    """A new run moves the previous one in its place aside (one generation is kept); a resumed one tidies up."""
    if resuming or not any(folder.glob("*.pt")):
        clear_leftovers(folder)
        return
    previous = folder.with_name(folder.name + ".previous")
    if previous.exists():
        shutil.rmtree(previous)
    folder.rename(previous)
    info(f"[run] the earlier run in {folder} is now {previous}")


def flops_per_token(model: LanguageModel) -> float:
    """6 FLOPs a token for each parameter that a token passes through (forward 2, backward 4)."""
    config = model.config
    total = count_parameters(model)
    if not config.tie_word_embeddings:
        total -= config.vocab_size * config.hidden_size  # looking a row up is no arithmetic
    if config.use_moe:
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        total -= config.num_hidden_layers * expert * (config.num_experts - config.num_experts_per_tok)
    return 6.0 * total


def resolve_optim(stage: str, settings: OptimSettings) -> OptimSettings:
    """What a stage does where a flag was not given."""
    defaults = STAGES[stage]
    chosen = {
        "optimizer": settings.optimizer or defaults.optimizer,
        "learning_rate": settings.learning_rate or defaults.learning_rate,
    }
    return OptimSettings(**{**asdict(settings), **chosen})


def warn_about_changes(old: dict[str, Any], new: dict[str, Any]) -> None:
    """A resumed run repeats the original bit for bit only under the same settings."""
    changed = [f"{name} {old[name]} -> {new[name]}" for name in SAME_RUN if old.get(name) != new.get(name)]
    if changed:
        warn(f"resuming with other settings, so not the same run: {', '.join(changed)}")


def build_job(stage_name: str, architecture: str, settings: Settings) -> Job:
    """Put a run together. Data are opened before anything is written, so that bad input destroys nothing.

    Raises:
        UserError: a setting, the data or a checkpoint cannot be used.
    """
    stage = canonical_stage(stage_name)
    run = settings.run
    family = get_family(architecture)
    keep_freed_memory()
    torch.manual_seed(run.seed)
    random.seed(run.seed)
    device = choose_device(run.device)
    sizes = build_model_config(settings.model, vocab_size=1, max_seq_len=0, causal=True)
    prefix = "" if family.name == "ar" else f"{family.name}_"
    found = None
    if run.resume_from:
        found = find_resume(
            Path(run.out_dir) / (prefix + flat_name(stage, sizes.hidden_size, sizes.use_moe)), run.resume_from
        )
    resumed = found[0] if found else None
    if resumed and (resumed["stage"], resumed["architecture"]) != (stage, family.name):
        raise UserError(
            f"the checkpoint to resume is of stage {resumed['stage']} ({resumed['architecture']}), not {stage}"
        )
    model, tokenizer, parent = build_model(settings, stage, family, resumed)
    name = prefix + flat_name(stage, model.config.hidden_size, model.config.use_moe)
    folder = Path(run.out_dir) / name
    train_data, validation_data, data_path = open_data(settings, stage, tokenizer)
    info(f"[data] {data_path}: {train_data.describe()}")

    optim = resolve_optim(stage, settings.optim)
    rows_per_step = run.batch_size * run.grad_accum_steps
    total_steps = run.max_steps or max(1, math.ceil(run.epochs * len(train_data) / rows_per_step))
    warmup = optim.warmup_steps if optim.warmup_steps >= 0 else min(100, max(1, total_steps // 20))
    warmup = min(warmup, total_steps)
    saved_config = resumed["train_config"] if resumed else {}
    dtype = choose_dtype(saved_config.get("dtype", run.dtype) if run.dtype == "auto" else run.dtype, device)
    flops = flops_per_token(model)
    run_flops = flops * total_steps * rows_per_step * settings.data.max_seq_len
    wanted_compile = saved_config.get("compile", run.compile) if run.compile == "auto" else run.compile
    compiled = choose_compile(wanted_compile, device=device, flops=run_flops if stage != "rlhf" else 0.0)
    describe_machine(device, dtype, compiled)

    prepare_folder(folder, resuming=resumed is not None)
    version = next_version(folder.with_name(folder.name + ".previous") if resumed is None else folder)
    run_name = settings.track.wandb_run_name or (
        f"{family.name}-{Path(data_path).name.split('.')[0]}-{size_name(model.config)}-v{version}"
    )
    if resumed:
        run_name = resumed["model_info"]["model_name"]
    micro = micro_rows(run, settings.data.max_seq_len, rows_per_step, device, stage == "rlhf")
    config = {
        "architecture": family.name, **asdict(settings.model), **asdict(settings.data), **asdict(run),
        **asdict(optim), **asdict(settings.track), "data_path": data_path, "warmup_steps": warmup,
        "total_steps": total_steps, "dtype": str(dtype).removeprefix("torch."), "compile": "on" if compiled else "off",
        "micro_batch_size": micro,
    }  # fmt: skip
    if stage == "rlhf":
        config |= asdict(settings.preference)
    method, reference_hash = build_method(stage, settings, family, model, folder, resumed)
    model.to(device)
    if isinstance(method, DirectPreference):
        method.reference.to(device)
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=True if stage == "rlhf" else None)
    optimizers = build_optimizers(model, optim)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = TrainState()
    if resumed:
        state = TrainState.from_checkpoint(resumed)
        optimizers.load_state_dict(resumed["optimizer_state_dict"])
        if scaler.is_enabled() and resumed["scaler_state_dict"]:
            scaler.load_state_dict(resumed["scaler_state_dict"])
        warn_about_changes(saved_config, config)
        info(f"[run] resuming {found[1] if found else ''} at step {state.step} of {total_steps}")
    wandb_run = None
    folder.mkdir(parents=True, exist_ok=True)
    if not settings.track.no_wandb:
        wandb_run = start_wandb(
            project=settings.track.wandb_project, name=run_name, folder=Path(run.out_dir), config=config
        )
    trackers = Trackers(folder, tensorboard_dir=settings.track.tensorboard_dir, wandb=wandb_run)
    if resumed:
        trackers.restore(resumed["method_state"]["metrics"])

    job = Job(
        stage=stage, family=family, method=method, model=model, tokenizer=tokenizer, train_data=train_data,
        validation_data=validation_data, optimizers=optimizers, scaler=scaler, state=state, trackers=trackers,
        writer=BackgroundWriter(), device=device, dtype=dtype, folder=folder,
        flat_path=folder.with_name(name + ".pth"), run_name=run_name, config=config, parent=parent,
        reference_sha256=reference_hash, train_rows=len(train_data), rows_per_step=rows_per_step, micro_rows=micro,
        total_steps=total_steps, warmup_steps=warmup, peak_lr=optim.learning_rate,
        final_lr_ratio=optim.final_lr_ratio, grad_clip=optim.grad_clip,
        eval_every=run.eval_every or max(1, total_steps // 10), eval_samples=run.eval_samples,
        save_every=run.save_every or max(1, total_steps // 5), log_every=run.log_every, keep_last=run.keep_last,
        patience=run.early_stopping_patience, seed=run.seed, flops_per_token=flops,
        peak_flops=gemm_flops(device, dtype),
    )  # fmt: skip
    from minillm.train.saving import write_run_files

    write_run_files(job, hf_config(model.config, tokenizer), generation_config(tokenizer))
    sizes_text = f"{count_parameters(model):,} parameters, {size_name(model.config)}: width {model.config.hidden_size}"
    info(
        f"[run] {run_name}: {sizes_text}, {model.config.num_hidden_layers} layers; {total_steps} steps of "
        f"{rows_per_step} rows ({micro} at once), {optim.optimizer}, peak lr {optim.learning_rate:g}, warm-up {warmup}"
    )
    if resumed:
        restore_rng_state(resumed["rng_state"])  # last: building the model has drawn from the generators
    return job
