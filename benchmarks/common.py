"""What the benchmarks share: workloads, worker processes, the machine's description, medians, result files.

No torch here: the program that conducts a benchmark stays small, everything measured runs in a worker
(worker.py), so that peak memory is that of one configuration alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from minillm.log import UserError, info
from minillm.models.config import ModelConfig, ModelSettings, build_model_config

ROOT = Path(__file__).resolve().parent.parent
RESULTS = str(ROOT / "benchmarks" / "results")
VOCABULARY = 6400
RANDOM_TOKENS = "random"
# Peers that are used from a checkout: the variable that names it, and what must be in it.
CHECKOUTS = {
    "nanogpt": ("NANOGPT_DIR", "model.py"),
    "litgpt": ("LITGPT_DIR", "litgpt/model.py"),
    "minimind": ("MINIMIND_DIR", "model/model_minimind.py"),
}
STEADY_STEPS = 1_000_000  # a schedule so long that the rate stays where it is while a few steps are timed


@dataclass(frozen=True)
class Workload:
    """What one worker trains. Steps are counted in optimizer steps, rows in sequences of `seq` tokens."""

    side: str  # "ours", or one of the peers: "transformers" and trainers.PEERS' others
    config: dict[str, Any]  # ModelConfig.to_dict()
    seq: int
    rows: int  # a step
    family: str = "ar"  # of our side
    compiled: bool = False
    dtype: str = "float32"  # of our side; the peer has float32
    optimizer: str = "adamw"  # of our side; the peer always has torch's AdamW
    lr: float = 3e-4
    total_steps: int = STEADY_STEPS
    warmup_steps: int = 0
    data: str = RANDOM_TOKENS
    validation: str = ""
    cache_dir: str = ""
    eval_rows: int = 128
    seed: int = 0
    lora_rank: int = 0  # of our side: the rank of the adapter that is trained instead of the weights
    peer_options: dict[str, Any] = field(default_factory=lambda: {"betas": [0.9, 0.95], "weight_decay": 0.1})

    @property
    def name(self) -> str:
        parts = [self.side, "compiled" if self.compiled else "eager"]
        return " ".join(parts + [self.dtype] * (self.dtype != "float32") + ["lora"] * bool(self.lora_rank))

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.seq


def preset_config(
    preset: str, *, seq: int, use_moe: bool = False, causal: bool = True, denoiser: str = ""
) -> ModelConfig:
    """The model of a preset's name with the vocabulary of 6,400. Raises UserError for a name that is none."""
    from minillm.models.config import PRESETS

    if preset not in PRESETS:
        raise UserError(f"--presets: {preset!r} is not one of {', '.join(PRESETS)}")
    settings = ModelSettings(model_config=preset, use_moe=use_moe)
    return build_model_config(settings, vocab_size=VOCABULARY, max_seq_len=seq, causal=causal, denoiser=denoiser)


def checkout(side: str) -> Path | None:
    """Where the code of a peer lies, None where its variable is not set. Raises UserError where it is not there."""
    variable, needed = CHECKOUTS[side]
    folder = Path(os.environ.get(variable, ""))
    if not os.environ.get(variable):
        return None
    if not (folder / needed).exists():
        raise UserError(f"{variable} is {str(folder)!r}: there is no {needed} in it; give a checkout of {side}")
    return folder


def numbers(text: str, flag: str) -> list[float]:
    """`1e-3,2e-3` as numbers. Raises UserError naming the flag."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--{flag}: {text!r} is not a list of numbers such as 1e-3,2e-3") from None


class Worker:
    """A process that measures one side and does nothing until it is asked."""

    def __init__(self, session: str, name: str, **start: Any) -> None:
        """`session` is MODULE:CLASS of what runs there (worker.py); `start` is what its start is given."""
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), session],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.facts = self.ask("start", **start)
        except UserError:
            self.close()
            raise

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises UserError when the worker failed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the worker {self.name!r} ended ({self.process.wait()}); its messages are above")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"the worker {self.name!r} failed: {answer['error']}")
        return answer

    def steps(self, count: int) -> dict[str, Any]:
        """Train `count` steps: {"seconds": [each], "loss": the last step's, in nats a token}."""
        return self.ask("steps", count=count)

    def close(self) -> None:
        """Let it end; it leaves when its input ends."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def worker(workload: Workload) -> Iterator[Worker]:
    """A worker that trains a workload, closed at the end, whatever happens."""
    with contextlib.closing(Worker("sessions:Training", workload.name, workload=asdict(workload))) as process:
        yield process


def peak_memory_mb() -> float:
    """Highest resident memory of this process so far, in MiB. From the kernel's own mark where there is one:
    getrusage also counts what the parent held when it forked."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def machine() -> dict[str, Any]:
    """What the numbers were measured on: processor, cores, versions, and how busy it was before."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {}
    for package in ("torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "processor": _processor(),
        "cores": cores,
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine_line(facts: dict[str, Any]) -> str:
    load = facts["load_before"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "transformers") if name in facts)
    return f"{facts['processor']}, {facts['cores']} cores, {facts['system']}; {versions}; load {load} before the run"


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """`median (least-most)`."""
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, columns aligned for people who read it as text."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def bar_line(name: str, value: float | None, bar: float, *, at_least: bool) -> tuple[str, bool]:
    """A line such as `met: eager ratio 1.41 (bar: at least 1.30)`, and whether the bar is met."""
    met = value is not None and (value >= bar if at_least else value <= bar)
    shown = "not reached" if value is None else f"{value:.2f}"
    limit = f"{'at least' if at_least else 'at most'} {bar:.2f}"
    return f"{'met' if met else 'MISSED'}: {name} {shown} (bar: {limit})", met


def write_results(folder: str, name: str, data: dict[str, Any], markdown: str) -> None:
    """FOLDER/NAME.json and FOLDER/NAME.md, replacing what was there, and the Markdown on stdout."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(data, indent=1) + "\n"), (".md", markdown + "\n")):
        beside = target / f".{name}{suffix}.{os.getpid()}"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target / f"{name}{suffix}")
    print(markdown)
    info(f"[benchmark] written to {target / name}.json and .md")


def main(run: Callable[[Sequence[str]], int]) -> None:
    """Run a benchmark as a program: errors without a traceback, exit status 2 for a wrong flag."""
    from minillm.config import UsageError

    try:
        raise SystemExit(run(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
