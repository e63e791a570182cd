"""From settings to everything a run needs: data, model, method, optimizers, and where it goes on."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minillm import processes
from minillm.atomic import clear_leftovers
from minillm.checkpoint.background import BackgroundWriter
from minillm.checkpoint.format import restore_rng_state
from minillm.checkpoint.loader import flat_name
from minillm.checkpoint.sharded import clear_sharded_leftovers, sharded_checkpoints
from minillm.convert.huggingface import generation_config, hf_config
from minillm.data.checks import check_first_rows
from minillm.data.mixture import Mixture
from minillm.data.order import Feed
from minillm.data.stream import TextStream
from minillm.families import get_family
from minillm.families.base import Family
from minillm.families.settings import FamilyConfig
from minillm.lock import FolderLock
from minillm.log import UserError, info, warn
from minillm.methods.base import Method
from minillm.methods.policy import PolicyMethod
from minillm.methods.settings import PolicySettings
from minillm.models.allocator import keep_freed_memory
from minillm.models.config import size_name
from minillm.models.device import choose_device
from minillm.models.lora import LoraConfig, adapter_size, summary
from minillm.models.transformer import LanguageModel, count_parameters, flops_per_token
from minillm.stages import STAGES, Stage, canonical_stage
from minillm.text.tokenizer import Tokenizer
from minillm.train import parallel
from minillm.train.average import WeightAverage
from minillm.train.batch_size import find_micro_rows
from minillm.train.data import SharedStream, open_data
from minillm.train.experience import Experience, completions_of_a_prompt
from minillm.train.memory import rows_at_once
from minillm.train.methods import Surroundings, build_method, keep_frozen
from minillm.train.metrics import Trackers, next_version, start_wandb
from minillm.train.optim import Optimizers, build_optimizers
from minillm.train.precision import (
    choose_compile,
    choose_dtype,
    compile_layers,
    describe_machine,
    gemm_flops,
)
from minillm.train.recompute import checkpoint_layers
from minillm.train.settings import LoraSettings, OptimSettings, RunSettings, Settings, split_weights, without_auto
from minillm.train.start import build_model, find_start, lora_config, open_tokenizer
from minillm.train.state import TrainState

TRAINING = "training in"
LORA_RATE = 10  # an adapter's default learning rate, times that of the stage with AdamW (docs/stages.md)
SAME_RUN = ("rows a step", "learning_rate", "max_seq_len", "seed", "optimizer", "total_steps",
            "warmup_steps", "weight_decay", "final_lr_ratio", "data_path", "streaming", "loss", "beta", "divergence",
            "temperature", "ce_weight", "on_policy_share", "cache_teacher", "tag_weight")  # fmt: skip


@dataclass
class Job:
    """Everything the loop touches."""

    stage: str
    family: Family
    family_config: FamilyConfig
    average: WeightAverage | None
    adapter: LoraConfig | None
    method: Method
    model: LanguageModel
    tokenizer: Tokenizer
    train_data: Feed
    validation_data: Mixture | None
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
    frozen_sha256: dict[str, str]  # of the models that the method reads and never trains
    rows_per_step: int  # of all processes
    own_rows: int  # of this one
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
    peak_flops: float  # of all processes
    locks: list[FolderLock]  # held while it trains
    stall: float = 0.0  # seconds that training stood still for saves since the last logged row

    def micro_batches(self, step: int, rank: int | None = None) -> Iterator[tuple[int, int]]:
        """(first slot, rows) of each micro-batch of a step: of this process, or of another."""
        first = step * self.rows_per_step + (processes.rank() if rank is None else rank) * self.own_rows
        for start in range(0, self.own_rows, self.micro_rows):
            yield first + start, min(self.micro_rows, self.own_rows - start)

    def close(self) -> None:
        self.train_data.close()
        for lock in self.locks:
            lock.close()


def micro_rows(settings: RunSettings, max_seq_len: int, rows_per_step: int, device: torch.device, stage: Stage) -> int:
    """Rows the model sees at once: as given, else as `rows_at_once` says."""
    if settings.micro_batch_size:
        return min(settings.micro_batch_size, rows_per_step)
    return rows_at_once(
        batch_size=settings.batch_size, rows_per_step=rows_per_step, row_tokens=max_seq_len * stage.model_rows,
        on_cpu=device.type == "cpu",
    )  # fmt: skip


def prepare_folder(folder: Path, *, resuming: bool) -> None:
    """A new run moves the previous one in its place aside (one generation is kept); a resumed one tidies up."""
    if resuming or not (any(folder.glob("*.pt")) or sharded_checkpoints(folder)):
        clear_leftovers(folder)
        clear_sharded_leftovers(folder)
        return
    previous = folder.with_name(folder.name + ".previous")
    if previous.exists():
        shutil.rmtree(previous)
    folder.rename(previous)
    info(f"[run] the earlier run in {folder} is now {previous}")


def resolve_optim(stage: str, settings: OptimSettings, *, lora: bool = False) -> OptimSettings:
    """What a stage does where a flag was not given. Adapters learn at ten times the rate of weights, and with AdamW:
    an orthogonalised update would give their few directions equal size."""
    defaults = STAGES[stage]
    optimizer = settings.optimizer or defaults.optimizer
    if lora and optimizer == "muon":
        if settings.optimizer:
            warn("--optimizer muon is for whole weight matrices: the adapter is trained with adamw")
        optimizer = "adamw"
    rate = defaults.rate_with(optimizer)
    if lora:
        rate = float(f"{LORA_RATE * rate:g}")
    return replace(settings, optimizer=optimizer, learning_rate=settings.learning_rate or rate)


def warn_about_changes(old: dict[str, Any], new: dict[str, Any]) -> None:
    """A resumed run repeats the original bit for bit only under the same settings."""
    old, new = ({"streaming": False, "rows a step": _rows_a_step(each), **each} for each in (old, new))
    changed = [f"{name} {old[name]} -> {new[name]}" for name in SAME_RUN if old.get(name) != new.get(name)]
    if changed:
        warn(f"resuming with other settings, so not the same run: {', '.join(changed)}")


def _check_shards(shards: int, settings: Settings) -> None:
    """Raises UserError where processes would wait for each other in vain, as each passes through the model as often as
    its own texts need."""
    flags = settings.own_flags()
    if shards > 1 and flags.get("on_policy_share"):
        raise UserError(
            "--on_policy_share needs whole weights in every process, as each writes answers of its own: give --shards 1"
        )
    if shards > 1 and settings.optim.optimizer == "adamw8bit":
        raise UserError("--optimizer adamw8bit keeps its state whole in every process: give --shards 1, or take adamw")
    if shards > 1 and flags.get("rollout_folder"):
        raise UserError("--rollout_folder needs whole weights in every process: give --shards 1")


def _rows_a_step(config: dict[str, Any]) -> int:
    """However they are divided among processes and batches."""
    return int(config["batch_size"] * config["grad_accum_steps"] * config.get("processes", 1))


def _take_folder(folder: Path, locks: list[FolderLock], *, resuming: bool) -> int:
    """Make the place of a run ready, and lock it; the run's version."""
    lock = FolderLock(folder, TRAINING)
    prepare_folder(folder, resuming=resuming)
    lock.close()  # it may have moved
    locks.append(FolderLock(folder, TRAINING))
    return next_version(folder if resuming else folder.with_name(folder.name + ".previous"))


def build_job(stage_name: str, settings: Settings) -> Job:
    """Put a run together. Data and the method's own models are opened before anything is written, so that bad input
    destroys nothing.

    Raises:
        UserError: a setting, the data or a checkpoint cannot be used.
    """
    stage = canonical_stage(stage_name)
    traits = STAGES[stage]
    settings, auto = without_auto(settings)
    run = settings.run
    if settings.data.streaming and traits.data != "texts":
        raise UserError(
            "--streaming is for the texts of `minillm pretrain`: conversations are packed over all of the data. Leave "
            "the flag out"
        )
    keep_freed_memory()
    torch.manual_seed(run.seed)
    random.seed(run.seed)
    device = choose_device(run.device)
    lora = lora_config(stage, settings.of(LoraSettings))
    start = find_start(stage, settings)
    resumed = start.resumed
    tokenizer = open_tokenizer(settings, start)
    family = get_family(start.family, tokenizer)
    model, parent = build_model(settings, start, family, tokenizer, lora)
    shards = parallel.choose_shards(run.shards, model, device)
    _check_shards(shards, settings)
    name = flat_name(stage, model.config.hidden_size, model.config.use_moe, family.name)
    folder = Path(run.out_dir) / name
    train_data, validation_data, paths = processes.main_first(
        lambda: open_data(settings, stage, tokenizer, family, resumed)
    )
    prompts_per_step = run.batch_size * run.grad_accum_steps * processes.size()
    if isinstance(train_data, TextStream) and processes.size() > 1:
        train_data = SharedStream(train_data, prompts_per_step)
    info(f"[data] {' '.join(paths)}: {train_data.describe()}")
    if resumed is None and isinstance(train_data, Mixture):
        for number, part in enumerate(train_data.parts):
            check_first_rows(part.dataset, tokenizer, seed=run.seed + number)

    optim = resolve_optim(stage, settings.optim, lora=lora is not None)
    rows_per_step = prompts_per_step * completions_of_a_prompt(stage, settings)
    passes = settings.of(PolicySettings).num_iterations if traits.data == "prompts" else 1
    total_steps = run.max_steps or max(1, math.ceil(run.epochs * train_data.epoch_rows * passes / prompts_per_step))
    warmup = optim.warmup_steps if optim.warmup_steps >= 0 else min(100, max(1, total_steps // 20))
    warmup = min(warmup, total_steps)
    saved_config = resumed["train_config"] if resumed else {}
    wanted_dtype = saved_config.get("dtype", run.dtype) if run.dtype == "auto" else run.dtype
    dtype = choose_dtype(wanted_dtype, device)
    flops = flops_per_token(model)
    run_flops = flops * total_steps * rows_per_step * settings.data.max_seq_len
    wanted_compile = saved_config.get("compile", run.compile) if run.compile == "auto" else run.compile
    compiled = choose_compile(wanted_compile, device=device, dtype=dtype, flops=run_flops if traits.even else 0.0)
    describe_machine(device, dtype, compiled)

    method = build_method(Surroundings(stage, settings, family, model, tokenizer, folder, resumed, dtype))
    locks: list[FolderLock] = []  # of the main process
    version = processes.main_only(lambda: _take_folder(folder, locks, resuming=resumed is not None))
    named = split_weights(paths, names_with_colons=settings.data.streaming)
    data_name = "+".join(Path(path).name.split(".")[0] for path, _ in named)
    run_name = settings.track.wandb_run_name or f"{family.name}-{data_name}-{size_name(model.config)}-v{version}"
    if resumed:
        run_name, version = resumed["model_info"]["model_name"], saved_config.get("version", version)
    own_rows = rows_per_step // processes.size()
    micro = micro_rows(run, settings.data.max_seq_len, own_rows, device, traits)
    config = {
        **asdict(settings.model), **asdict(settings.data), **asdict(run), **asdict(optim), **asdict(settings.track),
        **asdict(settings.family), **settings.own_flags(), "architecture": family.name, "version": version,
        "warmup_steps": warmup, "data_path": paths[0] if len(paths) == 1 else paths,
        "total_steps": total_steps, "dtype": str(dtype).removeprefix("torch."), "compile": "on" if compiled else "off",
        "micro_batch_size": micro, "processes": processes.size(),
        **({"lora_rank": lora.rank, "lora_alpha": lora.alpha} if lora else {}),
    }  # fmt: skip
    once = processes.main_only if resumed is None else processes.main_first  # written, or read by everyone
    frozen_sha256 = once(lambda: keep_frozen(method, model, folder, resumed))
    model.to(device)
    for frozen in method.frozen().values():
        frozen.requires_grad_(False).eval().to(device)
    for module in (model, *method.trained().values()):
        checkpoint_layers(module, run.gradient_checkpointing)
    if compiled:
        compile_layers(model, dynamic=None if traits.even else True)
    beside = method.trained()
    for key, module in beside.items():
        if resumed:
            module.load_state_dict(resumed["method_state"]["trained"][key])
        module.to(device).train()
    parallel.distribute([model, *beside.values()], shards, device)
    optimizers = build_optimizers(model, optim, beside, method.learning_rates(), dtype)
    if isinstance(method, PolicyMethod):
        assert isinstance(train_data, Mixture)
        train_data = Experience(train_data, method, model, rows_per_step=rows_per_step, seed=run.seed)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = TrainState(best_metric=method.better)
    if resumed:
        state = TrainState.from_checkpoint(resumed)
        if resumed["method_state"].get("state"):
            method.restore(resumed["method_state"]["state"])
        if isinstance(train_data, Experience):
            train_data.restore(resumed["data_state"]["stream"])
        optimizers.load_state_dict(resumed["optimizer_state_dict"])
        if scaler.is_enabled() and resumed["scaler_state_dict"]:
            scaler.load_state_dict(resumed["scaler_state_dict"])
        warn_about_changes(saved_config, config)
        info(f"[run] resuming {start.resumed_path} at step {state.step} of {total_steps}")
    average = WeightAverage(model, optim.ema) if optim.ema else None
    if average is not None and resumed:
        if "ema_state_dict" not in resumed:
            raise UserError("--ema: the checkpoint to resume has no averaged weights; leave the flag out")
        average.load_state_dict(resumed["ema_state_dict"])
    if auto:
        micro = saved_config.get("micro_batch_size") or find_micro_rows(
            stage, settings, optim, method, model, family, shards=shards, own_rows=own_rows, dtype=dtype
        )
        config["micro_batch_size"] = micro
    wandb_run = None
    folder.mkdir(parents=True, exist_ok=True)
    if not settings.track.no_wandb and processes.is_main():
        wandb_run = start_wandb(
            project=settings.track.wandb_project, name=run_name, folder=Path(run.out_dir), config=config
        )
    trackers = Trackers(folder, tensorboard_dir=settings.track.tensorboard_dir, wandb=wandb_run)
    if resumed:
        trackers.restore(resumed["method_state"]["metrics"], state.step)
    writer = BackgroundWriter(processes.another_group() if shards > 1 else None, tells=processes.is_main())

    job = Job(
        stage=stage, family=family, family_config=start.family, average=average,
        adapter=lora, method=method, model=model, tokenizer=tokenizer, train_data=train_data,
        validation_data=validation_data, optimizers=optimizers, scaler=scaler, state=state, trackers=trackers,
        writer=writer, device=device, dtype=dtype, folder=folder,
        flat_path=folder.with_name(name + ".pth"), run_name=run_name, config=config, parent=parent,
        frozen_sha256=frozen_sha256, rows_per_step=rows_per_step, own_rows=own_rows, micro_rows=micro,
        total_steps=total_steps, warmup_steps=warmup, peak_lr=optim.learning_rate,
        final_lr_ratio=optim.final_lr_ratio, grad_clip=optim.grad_clip,
        eval_every=run.eval_every or max(1, total_steps // 10), eval_samples=run.eval_samples,
        save_every=run.save_every or max(1, total_steps // 5), log_every=run.log_every, keep_last=run.keep_last,
        patience=run.early_stopping_patience, seed=run.seed, flops_per_token=flops,
        peak_flops=gemm_flops(device, dtype) * processes.size(), locks=locks,
    )  # fmt: skip
    from minillm.train.saving import write_run_files

    if processes.is_main():
        write_run_files(job, hf_config(model.config, tokenizer, start.family.to_dict()), generation_config(tokenizer))
    size = count_parameters(model) - adapter_size(model)
    sizes_text = f"{size:,} parameters, {size_name(model.config)}: width {model.config.hidden_size}"
    info(
        f"[run] {run_name}: {sizes_text}, {model.config.num_hidden_layers} layers; {total_steps} steps of "
        f"{rows_per_step} rows ({micro} at once), {optim.optimizer}, peak lr {optim.learning_rate:g}, warm-up {warmup}"
    )
    if processes.size() > 1:
        info(f"[run] {parallel.described(shards)}")
    if lora is not None:
        info(f"[run] {summary(model, lora)}")
    if resumed:
        restore_rng_state(resumed["rng_state"])  # last: building the model has drawn from the generators
    return job
