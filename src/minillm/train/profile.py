"""`--profile`: a trace of a few training steps, and one page that says which part of the step takes how long.

Ranges are laid around modules and calls from outside, for those steps only. The backward pass is attributed through
autograd's sequence numbers: a node's number is that of the operation which made it. Compiled layers are one range each,
since what is inside them are the compiler's kernels; those are told apart by what they compute.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from minillm.atomic import write_atomic, write_text
from minillm.log import info, warn
from minillm.models import divergence, heads
from minillm.models.layers import RMSNorm
from minillm.processes import is_main
from minillm.train.precision import memory_mb

if TYPE_CHECKING:
    from minillm.train.job import Job

WARM_UP = 3  # steps before: memory is laid out, kernels are chosen and compiled
OPERATORS = 12  # rows of the second table
FOLDER = "profile"  # in the run folder
STEP = "training step"
RANGE = "part: "  # begins the names of our ranges (two stand in optim.py and parallel.py)

ATTENTION, FEED_FORWARD, NORMS, EMBEDDING = "attention", "feed-forward", "norms and rotary", "embedding"
HEAD, MODEL, COMPILED = "head and loss", "rest of the model", "layers, compiled"
OPTIMIZER, ACCUMULATION = "optimizer", "gradient accumulation"
DATA, VIEW, REFERENCE = "data", "noise and view", "reference model"
COMMUNICATION, OTHER = "communication between processes", "other"
WHOLE = {DATA, REFERENCE}  # what runs inside one of these belongs to it, a model's attention, too

_BACKWARD = "autograd::engine::evaluate_function: "
_COMMUNICATION = ("c10d::", "gloo:", "nccl:", "record_param_comms", "FSDP::")
_IN_COMPILED = f"{COMPILED}: attention kernel"
_OWN_FUNCTIONS = {
    "_Rotary": NORMS,
    "minillm::attention": _IN_COMPILED,
    "minillm::attention_backward": _IN_COMPILED,
} | {
    name: HEAD
    for module in (heads, divergence)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, torch.autograd.Function)
}


class Operator(NamedTuple):
    """One operation at one set of shapes, over all profiled steps."""

    name: str
    shapes: str
    calls: int
    seconds: float  # its own, without what it calls


class StepProfile:
    """Profiles some steps of a run, after `WARM_UP` others (fewer in a short run), and writes what it found."""

    def __init__(self, job: Job, steps: int) -> None:
        left = job.total_steps - job.state.step
        self.job, self.steps = job, min(steps, left) if is_main() else 0
        self.first = max(0, min(WARM_UP, left - self.steps))
        self.seen = 0
        self.seconds: list[float] = []  # of every step until the last profiled one
        self.tokens: list[int] = []
        self._running: tuple[Any, ExitStack] | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one training step and what follows it until its tokens are counted."""
        if self.seen >= self.first + self.steps:
            yield
            return
        if self.seen == self.first:
            self._start()
        before, started = self.job.state.tokens_seen, time.perf_counter()
        with torch.profiler.record_function(STEP):
            yield
        self.seconds.append(time.perf_counter() - started)
        self.tokens.append(self.job.state.tokens_seen - before)
        self.seen += 1
        if self.seen == self.first + self.steps:
            self.close()

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.job.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        ranges = ExitStack()
        lay_ranges(self.job, ranges)
        profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        profiler.start()
        self._running = profiler, ranges

    def close(self) -> None:
        """Take the ranges away, and write trace and summary of what was seen. A file that cannot be written is a
        warning: training matters more."""
        if self._running is None:
            return
        profiler, ranges = self._running
        self._running = None
        if self.job.device.type == "cuda":
            torch.cuda.synchronize(self.job.device)
        profiler.stop()
        ranges.close()
        profiled = len(self.seconds) - self.first
        if profiled < 1:
            return
        folder = self.job.folder / FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "trace.json.gz", lambda path: _export(profiler, path))
            text = self.summary(profiler.events(), profiled)
            write_text(folder / "summary.md", text)
        except (OSError, RuntimeError) as error:  # the profiler's own are RuntimeErrors
            warn(f"--profile: {folder} cannot be written ({error}); training goes on")
            return
        info("\n".join(f"[profile] {line}" for line in text.splitlines() if line))
        info(f"[profile] written to {folder}: summary.md and trace.json.gz (open it at ui.perfetto.dev)")

    def summary(self, events: Iterable[Any], steps: int) -> str:
        """The page, in Markdown."""
        job, events = self.job, list(events)
        parts, operators = attribute(events, on_device=job.device.type == "cuda")
        wall = sum(self.seconds[self.first :]) / steps
        rate = sum(self.tokens[self.first :]) / sum(self.seconds[self.first :])
        speed = f"{rate:,.0f} tokens/s with the profiler on"
        if self.first:
            speed += f", {self.tokens[self.first - 1] / self.seconds[self.first - 1]:,.0f} in the step before"
        total = sum(parts.values()) or 1.0  # a driver may refuse to time a GPU's kernels: then there are no parts
        lines = [
            f"# Profile of {steps} steps of {job.run_name}",
            "",
            f"{job.device}, {str(job.dtype).removeprefix('torch.')}, {job.rows_per_step} rows a step, "
            f"{job.micro_rows} at once; {torch.get_num_threads()} threads.",
            f"{1000 * wall:,.1f} ms a step: {speed}; utilisation "
            f"{100 * rate * job.flops_per_token / job.peak_flops:.0f} % of a matrix product's FLOP/s; "
            f"peak memory {memory_mb(job.device):,.0f} MiB.",
        ]
        if job.device.type == "cuda":
            lines.append(f"The GPU was busy {100 * total / steps / wall:.0f} % of the time; shares are of its time.")
        lines += ["", "| part | ms a step | share |", "|---|---|---|"]
        lines += [
            f"| {part} | {1000 * seconds / steps:,.2f} | {100 * seconds / total:.1f} % |"
            for part, seconds in sorted(parts.items(), key=lambda item: -item[1])
        ]
        lines += ["", f"| operator (the {OPERATORS} most expensive) | shapes | calls a step | ms a step | share |",
                  "|---|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {each.name} | {each.shapes} | {each.calls / steps:,.0f} | {1000 * each.seconds / steps:,.2f} "
            f"| {100 * each.seconds / total:.1f} % |"
            for each in operators[:OPERATORS]
        ]
        lines += ["", "Forward and backward pass count together. "
                  f"{DATA.capitalize()}: with rollouts and rewards, where there are some. "
                  f"{MODEL.capitalize()}: sums, masks, tables. "
                  f"{OTHER.capitalize()}: metrics, Python, and the time between operations."]  # fmt: skip
        return "\n".join(lines) + "\n"


@contextmanager
def profiling(job: Job) -> Iterator[StepProfile]:
    """The profile that --profile asks for (without it, one of no step), closed at the end of training."""
    profile = StepProfile(job, job.config.get("profile", 0))
    try:
        yield profile
    finally:
        profile.close()


def _export(profiler: Any, path: Path) -> None:
    """The trace, compressed: torch does so for names that end in .gz."""
    zipped = path.with_name(path.name + ".gz")
    try:
        profiler.export_chrome_trace(str(zipped))
        zipped.replace(path)
    finally:
        zipped.unlink(missing_ok=True)


def _ranged(call: Callable[..., Any], part: str) -> Callable[..., Any]:
    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(RANGE + part):
            return call(*args, **kwargs)

    return run


def _replace(ranges: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an object until `ranges` is closed."""
    own = vars(owner)
    if name in own:
        ranges.callback(setattr, owner, name, own[name])
    else:
        ranges.callback(delattr, owner, name)
    setattr(owner, name, value)


def _lay_range(ranges: ExitStack, module: nn.Module, part: str) -> None:
    # What a module's call goes through where it is compiled: here a range may stand without being compiled itself.
    call = module._compiled_call_impl or module._call_impl
    _replace(ranges, module, "_compiled_call_impl", _ranged(call, part))


def part_of_module(name: str, module: nn.Module) -> str | None:
    """What a module inside a model counts as, by its name in the model; None: what it stands in."""
    last = name.rpartition(".")[2]
    if last == "self_attn":
        return ATTENTION
    if last == "mlp":
        return FEED_FORWARD
    if isinstance(module, RMSNorm | nn.LayerNorm):
        return NORMS
    return EMBEDDING if isinstance(module, nn.Embedding) or last == "candidates" else None


def lay_ranges(job: Job, ranges: ExitStack) -> None:
    """Lay ranges around the modules and calls of a job, until `ranges` is closed."""
    method = job.method
    _replace(ranges, job.train_data, "take", _ranged(job.train_data.take, DATA))
    _replace(ranges, method, "prepare", _ranged(method.prepare, VIEW))
    _replace(ranges, method, "loss", _ranged(method.loss, HEAD))
    for model in method.frozen().values():
        _lay_range(ranges, model, REFERENCE)
    for model in (job.model, *method.trained().values()):
        _lay_range(ranges, model, MODEL)
        compiled: set[str] = set()
        for name, module in model.named_modules():
            if any(name.startswith(outer) for outer in compiled):
                continue
            if module._compiled_call_impl is not None and module is not model:
                compiled.add(name + ".")
                _lay_range(ranges, module, COMPILED)
            elif part := part_of_module(name, module):
                _lay_range(ranges, module, part)


def _kind(part: str, name: str) -> str:
    """Inside compiled layers operations are told apart by what they compute."""
    if part != COMPILED:
        return part
    if "attention" in name or "flex" in name:
        return _IN_COMPILED
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", "mkldnn::", "minillm::multiply")
    return f"{COMPILED}: {'products' if name.startswith(products) else 'the rest, fused'}"


def attribute(events: Iterable[Any], *, on_device: bool) -> tuple[dict[str, float], list[Operator]]:
    """Seconds of each part, and the operators by seconds, most expensive first.

    Args:
        events: torch.profiler's FunctionEvents. on_device: count the GPU's time, which kernels have that an operation
            started; else the processor's.
    """
    ours = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU and not event.is_async]
    ours.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    steps = [event.time_range for event in ours if event.name == STEP]
    part_of: dict[int, str] = {}
    forward: dict[tuple[int, int], str] = {}  # (thread, sequence number) -> the part that made the node
    parts: dict[str, float] = defaultdict(float)
    operators: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for event in ours:
        start = event.time_range.start
        if not any(step.start <= start <= step.end for step in steps):
            continue
        parent = event.cpu_parent
        above = part_of.get(parent.id, OTHER) if parent is not None else OTHER
        part = part_of[event.id] = _part(event, above, forward)
        backward = event.name.startswith(_BACKWARD) or parent is not None and parent.name.startswith(_BACKWARD)
        if event.sequence_nr >= 0 and not backward:
            forward[event.thread, event.sequence_nr] = part  # the last one before the next number made the node
        seconds = (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
        parts[_kind(part, event.name)] += seconds
        if event.name != STEP and not event.name.startswith(RANGE):
            count = operators[event.name.removeprefix(_BACKWARD), _shapes(event)]
            count[0] += 1
            count[1] += seconds
    listed = [Operator(name, shapes, int(calls), seconds) for (name, shapes), (calls, seconds) in operators.items()]
    listed.sort(key=lambda operator: -operator.seconds)
    return {part: seconds for part, seconds in parts.items() if seconds > 0}, listed


def _part(event: Any, above: str, forward: dict[tuple[int, int], str]) -> str:
    """The part of an event that stands in one of part `above`."""
    name: str = event.name
    if above in WHOLE:
        return above
    if name.startswith(RANGE):
        return name.removeprefix(RANGE)
    if name.startswith(_BACKWARD):
        if name.endswith("AccumulateGrad"):
            return ACCUMULATION
        return forward.get((event.fwd_thread, event.sequence_nr), OTHER)
    if name.startswith(_COMMUNICATION):
        return COMMUNICATION
    if name.startswith("Optimizer."):
        return OPTIMIZER
    return _OWN_FUNCTIONS.get(name, above)


def _shapes(event: Any) -> str:
    """The shapes of an operation's tensors, as 8x256x512."""
    return " ".join("x".join(map(str, shape)) for shape in event.input_shapes or () if shape)[:60]
