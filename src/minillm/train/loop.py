"""The training loop, for every stage and family: take a batch, add up loss and count over the micro-batches,
divide, clip, step, log, evaluate, save, stop early."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from types import FrameType
from typing import Any

import torch

from minillm import processes
from minillm.log import UserError, alike, format_duration, info, warn
from minillm.train import health, parallel, saving
from minillm.train.job import Job
from minillm.train.metrics import Sums, named, perplexity
from minillm.train.optim import clip_gradients, learning_rate
from minillm.train.precision import autocast, memory_mb
from minillm.train.profile import profiling

MAX_BAD_STEPS = 5
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ONE_SIGNAL = 5.0  # seconds: Ctrl-C and job systems reach a process directly and through torchrun
SHOWN = {"train/accuracy": "accuracy", "rewards/accuracies": "reward accuracy", "rewards/margins": "margin",
         "train/reward": "reward", "train/entropy": "entropy", "train/kl": "kl",
         "train/divergence": "divergence"}  # fmt: skip


class Interrupt:
    """Remembers Ctrl-C, SIGTERM and SIGUSR1 until the step under way is done. A second one ends the program at once,
    except for SIGUSR1: that is how a job system asks for a checkpoint in time (scripts/slurm)."""

    def __init__(self) -> None:
        self.signal: int | None = None  # what the run ends for; the same in all processes
        self._heard: int | None = None  # by this process
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._heard is not None:
            same = processes.size() > 1 and time.monotonic() - self._at < ONE_SIGNAL
            if number != signal.SIGUSR1 and not same:
                raise SystemExit(128 + number)
            return
        self._heard, self._at = number, time.monotonic()
        health.told_to_end()
        once_more = "" if number == signal.SIGUSR1 else "; once more ends it at once"
        info(f"[run] {signal.Signals(number).name}: saving after this step{once_more}")
        if processes.size() == 1:
            self.signal = number
            if number != signal.SIGUSR1:
                signal.signal(number, self._before[number] or signal.SIG_DFL)

    def tell_all(self) -> None:
        """A signal to one process is one to all of them, at the same step."""
        if processes.size() == 1:
            return
        told = processes.summed(torch.tensor([self._heard == number for number in SIGNALS], dtype=torch.int32))
        for number, count in zip(SIGNALS, told.tolist()):
            if count and self.signal is None:
                self.signal = number
                self._remember(number, None)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None and issubclass(kind, Exception) and processes.size() > 1
        for number, handler in self._before.items():  # torchrun's signal must not cut off the words about what failed
            signal.signal(number, signal.SIG_IGN if failed else handler)


def train(job: Job) -> None:
    """Run the job to its end, to an early stop, or to a signal (then SystemExit with 130 or 143; not for SIGUSR1).

    Raises:
        UserError: the loss was not finite five steps running, or the method says that training has gone astray; the
            message names the last good checkpoint.
    """
    state, begun = job.state, job.state.step
    window, window_time, window_tokens = Sums(), 0.0, 0
    with Interrupt() as interrupt, contextlib.closing(job), profiling(job) as profile:
        health.begin(state.step)
        if state.step == 0:
            saving.record_validation(job, evaluate(job), first=True)
        while state.step < job.total_steps:
            with profile.step():
                started = time.perf_counter()
                sums, tokens, extra = take_step(job)
                state.step += 1
                state.epoch = job.train_data.epoch(state.step * job.rows_per_step)
                state.tokens_seen += tokens
                step_time = time.perf_counter() - started
            health.finished(state.step)
            interrupt.tell_all()
            state.elapsed += step_time
            window.merge(sums)
            window_time, window_tokens = window_time + step_time, window_tokens + tokens

            last = state.step == job.total_steps
            if state.step % job.log_every == 0 or last:
                log_step(job, window, window_time, window_tokens, extra)
                window, window_time, window_tokens = Sums(), 0.0, 0
            improved = False
            if state.step % job.eval_every == 0 or last:
                improved = saving.record_validation(job, evaluate(job))
            stop = 0 < job.patience <= state.no_improvement_count
            ending = last or stop or interrupt.signal is not None
            if state.step == begun + 1:
                saving.make_room(job)
            if state.step % job.save_every == 0 or improved or ending:
                with health.unlimited("saving"):
                    saving.save(job, numbered=state.step % job.save_every == 0, best=improved)
            if stop:
                info(f"[run] no improvement in {state.no_improvement_count} evaluations: stopping early")
            if ending:
                break
        with health.unlimited("writing the last checkpoint"):
            saving.finish(job)
    if interrupt.signal is not None:
        info(f"[run] stopped at step {state.step}; go on with --resume_from auto")
        if interrupt.signal != signal.SIGUSR1:  # torchrun would start a process that fails once more
            raise SystemExit(128 + interrupt.signal)


def take_step(job: Job) -> tuple[Sums, int, dict[str, float]]:
    """One optimizer step: this process's summed metrics, tokens read by all, and this step's gradient norm and learning
    rate.

    The loss is divided by the count of the whole step, so the result does not depend on how it is cut into
    micro-batches and among processes. A loss or gradient that is not finite leaves the weights alone and is counted.
    """
    state, model = job.state, job.model
    model.train()
    lr = learning_rate(
        state.step, total=job.total_steps, warmup=job.warmup_steps, peak=job.peak_lr, final_ratio=job.final_lr_ratio
    )
    job.optimizers.set_lr(lr)
    modules = [model, *job.method.trained().values()]
    with autocast(job.device, job.dtype), parallel.whole(model) if job.family.denoiser else contextlib.nullcontext():
        parts = []
        for slot, rows in job.micro_batches(state.step):
            parts.append(job.method.prepare(model, job.train_data.take(slot, rows), job.device, state.step, slot))
    count, tokens = processes.summed_numbers(sum(part.count for part in parts), sum(part.tokens for part in parts))
    sums = Sums()
    if count == 0:
        with alike():
            warn(f"step {state.step + 1}: no trained token in the batch, nothing to learn from it")
        return sums, int(tokens), {"lr": lr}
    total = torch.zeros((), device=job.device)
    for number, part in enumerate(parts):
        parallel.before_backward(modules, last=number == len(parts) - 1)
        with autocast(job.device, job.dtype):
            loss, metrics = job.method.loss(model, part.data)
        job.scaler.scale(loss / count).backward()
        total += loss.detach()
        sums.add(metrics)
    total = parallel.sum_gradients(modules, total[None])[0]
    for optimizer in job.optimizers.optimizers:
        job.scaler.unscale_(optimizer)
    norms = [clip_gradients(module.parameters(), job.grad_clip) for module in modules]
    total_value, norm_value, *more = torch.stack((total, *(norm.to(total.dtype) for norm in norms))).tolist()
    finite = all(map(math.isfinite, (norm_value, *more)))
    overflow = job.scaler.is_enabled() and not finite
    if math.isfinite(total_value) and (finite or overflow):
        for optimizer in job.optimizers.optimizers:
            job.scaler.step(optimizer)
        if job.average is not None:
            job.average.update(model, state.step + 1)
        state.bad_steps_in_a_row = 0
    else:
        sums = Sums()
        _count_bad_step(job, "loss" if not math.isfinite(total_value) else "gradient")
    job.scaler.update()
    job.optimizers.zero_grad()
    return sums, int(tokens), {"lr": lr, "grad_norm": norm_value}


def _count_bad_step(job: Job, what: str) -> None:
    state = job.state
    state.skipped_steps += 1
    state.bad_steps_in_a_row += 1
    with alike():
        warn(f"step {state.step + 1}: the {what} is not finite, the step is skipped ({state.skipped_steps} so far)")
    if state.bad_steps_in_a_row >= MAX_BAD_STEPS:
        raise UserError(
            f"{MAX_BAD_STEPS} steps in a row had no finite loss or gradient (step {state.step + 1}); "
            f"{_last_good_checkpoint(job)}. "
            "Try a lower --learning_rate or more --warmup_steps, and look at the data of these steps"
        )


def _last_good_checkpoint(job: Job) -> str:
    """For people. What was saved is good: a step that is not finite changes nothing."""
    last = saving.last_saved(job)
    return f"the last good checkpoint is {last}" if last is not None else "no checkpoint was saved yet"


def _look_out(job: Job, means: dict[str, float]) -> None:
    """Stop where the method says that going on only makes it worse."""
    problem = job.method.alarm(means)
    if problem:
        best = job.folder / "best_model.pt"
        named_checkpoint = _last_good_checkpoint(job)
        if best.exists():
            named_checkpoint = f"the best checkpoint is {best} (step {job.state.best_step})"
        saving.write_logs(job)
        raise UserError(f"stopped at step {job.state.step}: {problem}; {named_checkpoint}")


@torch.no_grad()
def evaluate(job: Job) -> dict[str, float]:
    """Means over the validation rows, under the full metric names; {} where there is no validation data."""
    if job.validation_data is None:
        return {}
    job.model.eval()
    averaged = job.average.applied(job.model) if job.average is not None else contextlib.nullcontext()
    with averaged, parallel.whole(job.model):
        return _evaluated(job)


def _evaluated(job: Job) -> dict[str, float]:
    assert job.validation_data is not None
    size = min(job.validation_data.epoch_rows, job.eval_samples)
    sums = Sums()
    job.method.before_measuring(job.model)
    at_once = min(job.method.measured_at_once or job.micro_rows, math.ceil(size / processes.size()))
    for start in range(processes.rank() * at_once, size, processes.size() * at_once):
        batch = job.validation_data.take(start, min(at_once, size - start))
        with autocast(job.device, job.dtype):
            sums.add(job.method.measure(job.model, batch, job.device, start))
            health.moved()
    result = named("val", sums.means())
    if job.method.counts == "tokens" and "val/loss" in result:
        result["val/perplexity"] = perplexity(result["val/loss"])
        result["val/bits_per_byte"] = result["val/loss"] / math.log(2) / job.validation_data.bytes_per_token
    return result


def log_step(job: Job, window: Sums, seconds: float, tokens: int, extra: dict[str, float]) -> None:
    """One row for the trackers and one line for people, over the steps since the last."""
    state = job.state
    means = window.means()
    row: dict[str, Any] = {"step": state.step, **named("train", {**means, **extra})}
    rate = tokens / max(seconds, 1e-9)
    row["train/tokens_per_sec"] = rate
    row["train/memory_mb"] = memory_mb(job.device)
    row["train/mfu"] = rate * job.flops_per_token / job.peak_flops
    if job.stall:
        row["train/checkpoint_stall"], job.stall = job.stall, 0.0
    if job.method.counts == "tokens" and "train/loss" in row:
        row["train/perplexity"] = perplexity(row["train/loss"])
    steps = max(1, state.step - (state.training_log[-1]["step"] if state.training_log else 0))
    job.trackers.log(row)
    state.training_log.append(
        {
            "step": state.step,
            "loss": row.get("train/loss"),
            "perplexity": row.get("train/perplexity"),
            "learning_rate": row["train/lr"],
            "step_time": seconds / steps,
            "tokens_per_second": rate,
            "memory_mb": row["train/memory_mb"],
            **row,
        }
    )
    left = (job.total_steps - state.step) * seconds / steps  # of late: the first step may have compiled
    parts = [f"step {state.step}/{job.total_steps}"]
    if "train/loss" in row:
        parts.append(f"loss {row['train/loss']:.4f}")
    for name, label in SHOWN.items():
        if name in row:
            parts.append(f"{label} {row[name]:.3f}")
    parts += [f"lr {row['train/lr']:.1e}", f"{rate:,.0f} tokens/s", f"{format_duration(left)} left"]
    info("[train] " + " | ".join(parts))
    samples = job.method.samples()
    if samples:
        job.trackers.log_samples(state.step, samples)
    _look_out(job, means)
