"""Seconds and tokens until a loss that transformers + AdamW needs 600 steps of 4,096 tokens for.

    python benchmarks/time_to_loss.py --data ../shared/data/pretrain_en.jsonl.gz \\
        --validation ../shared/data/pretrain_en_val.jsonl

Both sides train one architecture from scratch on the same rows in the same order, in processes of their own
that take turns. The peer: transformers' Qwen3 with its initialisation, AdamW (betas 0.9 and 0.999, weight
decay 0.01), 5 % warm-up and a cosine to zero, clipping at 1; with several --peer_lrs each is first run to
the end alone and the best one is used. Ours: the training loop's step with its defaults, its own learning
rate, batch and number of steps. A cosine's result depends on its length, so both lengths are stated, and ours
is timed until the first evaluation at or below the peer's last. Evaluations are not timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    ROOT,
    VOCABULARY,
    Worker,
    Workload,
    bar_line,
    machine,
    machine_line,
    main,
    numbers,
    table,
    worker,
    write_results,
)

from minillm.config import parse
from minillm.log import UserError, info
from minillm.models.config import ModelSettings, build_model_config
from minillm.stages import STAGES

BAR = 0.6
DATA = ROOT.parent / "shared" / "data"
PEER_OPTIONS = {"betas": [0.9, 0.999], "weight_decay": 0.01}
PEER_WARMUP = 0.05


@dataclass(frozen=True)
class TimeToLoss:
    """Time to the peer's loss"""

    data: str = field(default="", metadata={"help": "training text (default: shared English text, else demo data)"})
    validation: str = field(default="", metadata={"help": "held-out text (default: as for --data)"})
    hidden_size: int = field(default=192, metadata={"help": "width of both models", "min": 8})
    num_hidden_layers: int = field(default=4, metadata={"help": "layers of both models", "min": 1})
    seq: int = field(default=256, metadata={"help": "tokens a row", "min": 8})
    peer_steps: int = field(default=600, metadata={"help": "steps of the peer's run", "min": 1})
    peer_batch_tokens: int = field(default=4096, metadata={"help": "tokens a step of the peer", "min": 1})
    peer_lrs: str = field(  # the default was the best of 1e-3, 2e-3 and 4e-3 at the default size
        default="1e-3", metadata={"help": "the peer's peak learning rate; of several (commas) the best is found first"}
    )
    our_steps: int = field(default=400, metadata={"help": "steps of our run: the length of its cosine", "min": 1})
    our_batch_tokens: int = field(default=4096, metadata={"help": "tokens a step of ours", "min": 1})
    our_lr: float = field(default=0.0, metadata={"help": "our peak learning rate (default: pretrain's)", "min": 0.0})
    sweep: str = field(
        default="", metadata={"help": "only try these learning rates (commas) on our side and compare their ends"}
    )
    target: float = field(
        default=0.0, metadata={"help": "with --sweep: bits per byte whose time is reported too", "min": 0.0}
    )
    eval_every: int = field(default=20, metadata={"help": "peer steps a turn; an evaluation ends it", "min": 1})
    eval_rows: int = field(default=128, metadata={"help": "validation rows at most", "min": 1})
    compiled: bool = field(default=False, metadata={"help": "compile both; compiling counts as training time"})
    seed: int = field(default=0, metadata={"help": "initialisation and order of the rows", "min": 0})
    check: bool = field(default=False, metadata={"help": "exit with 1 where the bar is missed"})
    results: str = field(default=RESULTS, metadata={"help": "folder for JSON, Markdown and PNG"})


class Curve:
    """A side's run: after each turn, (steps, seconds trained, bits per byte)."""

    def __init__(self, process: Worker, workload: Workload) -> None:
        self.process, self.workload = process, workload
        self.done, self.seconds = 0, 0.0
        self.points: list[tuple[int, float, float]] = [(0, 0.0, process.ask("evaluate")["bits_per_byte"])]

    @property
    def finished(self) -> bool:
        return self.done >= self.workload.total_steps

    def turn(self, steps: int) -> None:
        """Train so many steps, or what is left, and evaluate."""
        steps = min(steps, self.workload.total_steps - self.done)
        self.seconds += sum(self.process.steps(steps)["seconds"])
        self.done += steps
        value = self.process.ask("evaluate")["bits_per_byte"]
        self.points.append((self.done, self.seconds, value))
        info(
            f"[benchmark] {self.process.name} lr {self.workload.lr:g}: step {self.done}/{self.workload.total_steps}, "
            f"{self.seconds:.1f} s, {value:.4f} bits per byte"
        )

    def reached(self, target: float) -> tuple[int, float] | None:
        """Tokens and seconds at the first evaluation that is at or below `target`; None if there is none."""
        for steps, seconds, value in self.points:
            if value <= target:
                return steps * self.workload.tokens_per_step, seconds
        return None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.workload), "points": [list(point) for point in self.points]}


def rows_of(tokens: int, seq: int, flag: str) -> int:
    """Rows a step. Raises UserError where the tokens are no whole number of rows."""
    if tokens % seq:
        raise UserError(f"--{flag} is {tokens}: give a multiple of --seq ({seq})")
    return tokens // seq


def find_data(settings: TimeToLoss) -> tuple[str, str]:
    """Training and validation text: as given, else the shared English text, else generated demo data."""
    if bool(settings.data) != bool(settings.validation):
        raise UserError("give --data and --validation together: validation rows must not be trained on")
    if settings.data:
        return settings.data, settings.validation
    train, validation = DATA / "pretrain_en.jsonl.gz", DATA / "pretrain_en_val.jsonl"
    if train.is_file() and validation.is_file():
        return str(train), str(validation)
    from minillm.data.demo import generate_demo

    folder = Path(settings.results) / "demo"
    info(f"[benchmark] {train} is not here: generated demo data in {folder} take its place")
    generate_demo(folder)
    return str(folder / "pretrain.jsonl"), str(folder / "pretrain_val.jsonl")


def workloads(settings: TimeToLoss) -> tuple[Workload, Workload]:
    """Ours and the peer's (with the first of its learning rates)."""
    model = ModelSettings(hidden_size=settings.hidden_size, num_hidden_layers=settings.num_hidden_layers)
    config = build_model_config(model, vocab_size=VOCABULARY, max_seq_len=settings.seq, causal=True)
    data, validation = find_data(settings)
    defaults = STAGES["pretrain"]
    ours = Workload(
        side="ours",
        config=config.to_dict(),
        seq=settings.seq,
        rows=rows_of(settings.our_batch_tokens, settings.seq, "our_batch_tokens"),
        compiled=settings.compiled,
        optimizer=defaults.optimizer,
        lr=settings.our_lr or defaults.learning_rate,
        total_steps=settings.our_steps,
        warmup_steps=min(100, max(1, settings.our_steps // 20)),  # the loop's default
        data=data,
        validation=validation,
        cache_dir=str(Path(settings.results) / "tokens"),
        eval_rows=settings.eval_rows,
        seed=settings.seed,
        peer_options=PEER_OPTIONS,
    )
    peer = replace(
        ours,
        side="transformers",
        rows=rows_of(settings.peer_batch_tokens, settings.seq, "peer_batch_tokens"),
        optimizer="adamw",
        total_steps=settings.peer_steps,
        warmup_steps=max(1, round(PEER_WARMUP * settings.peer_steps)),
    )
    return ours, peer


def turn_steps(settings: TimeToLoss, workload: Workload) -> int:
    """Steps of a turn: about as many tokens on both sides."""
    return max(1, round(settings.eval_every * settings.peer_batch_tokens / workload.tokens_per_step))


def alone(settings: TimeToLoss, workload: Workload) -> Curve:
    """One side from start to end."""
    with worker(workload) as process:
        curve = Curve(process, workload)
        while not curve.finished:
            curve.turn(turn_steps(settings, workload))
    return curve


def best_peer(settings: TimeToLoss, peer: Workload) -> tuple[Workload, dict[str, float]]:
    """The peer with the best of the given learning rates, and the last bits per byte of each that was tried."""
    lrs = numbers(settings.peer_lrs, "peer_lrs")
    if not lrs:
        raise UserError("--peer_lrs: give at least one learning rate")
    if len(lrs) == 1:
        return replace(peer, lr=lrs[0]), {}
    ends = {f"{lr:g}": alone(settings, replace(peer, lr=lr)).points[-1][2] for lr in lrs}
    best = min(ends, key=ends.__getitem__)
    if best in (f"{min(lrs):g}", f"{max(lrs):g}"):
        info(f"[benchmark] the peer's best learning rate {best} is at the edge of --peer_lrs: widen them")
    return replace(peer, lr=float(best)), ends


def compare(settings: TimeToLoss, ours: Workload, peer: Workload) -> tuple[Curve, Curve]:
    """Both sides from start to end, taking turns; each is first in every other round."""
    with worker(ours) as first, worker(peer) as second:
        curves = [Curve(first, ours), Curve(second, peer)]
        order = curves
        while not all(curve.finished for curve in curves):
            for curve in order:
                if not curve.finished:
                    curve.turn(turn_steps(settings, curve.workload))
            order = order[::-1]
    return curves[0], curves[1]


def sweep(settings: TimeToLoss, ours: Workload) -> int:
    """Our side alone with each learning rate."""
    rows, curves = [], []
    where = machine()
    for lr in numbers(settings.sweep, "sweep"):
        curve = alone(settings, replace(ours, lr=lr))
        curves.append(curve.to_dict())
        reached = curve.reached(settings.target) if settings.target else None
        at = f"{reached[0]:,} tokens, {reached[1]:.0f} s" if reached else "-"
        rows.append([f"{lr:g}", f"{curve.points[-1][2]:.4f}", f"{curve.seconds:.0f}", at])
    header = ["our peak lr", "bits per byte at the end", "seconds", f"{settings.target:g} reached at"]
    text = f"{ours.total_steps} steps of {ours.tokens_per_step:,} tokens, {ours.optimizer}, {Path(ours.data).name}"
    markdown = "\n\n".join(["# Our learning rates", machine_line(where), text, table(header, rows)])
    write_results(settings.results, "sweep", {"machine": where, "curves": curves}, markdown)
    return 0


def plot(path: Path, ours: Curve, peer: Curve) -> None:
    """Bits per byte against seconds of training, as PNG; left out where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        info("[benchmark] matplotlib is not installed: no PNG")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    for curve, name in ((ours, "MiniLLM"), (peer, "transformers + AdamW")):
        axes.plot([point[1] for point in curve.points], [point[2] for point in curve.points], label=name)
    axes.axhline(peer.points[-1][2], color="grey", linewidth=0.8, linestyle="--")
    lowest = min(point[2] for curve in (ours, peer) for point in curve.points)
    axes.set(xlabel="seconds of training", ylabel="validation bits per byte", ylim=(lowest - 0.1, lowest + 1.6))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def run(argv: Sequence[str]) -> int:
    (settings,) = parse("benchmarks/time_to_loss.py", __doc__ or "", [TimeToLoss], argv)
    ours, peer = workloads(settings)
    if settings.sweep:
        return sweep(settings, ours)
    where = machine()
    peer, tried = best_peer(settings, peer)
    our_curve, peer_curve = compare(settings, ours, peer)
    target = peer_curve.points[-1][2]
    reached = our_curve.reached(target)
    ratio = reached[1] / peer_curve.seconds if reached else None
    line, met = bar_line("seconds to the peer's last loss, ours / transformers", ratio, BAR, at_least=False)
    rows = []
    for name, curve, point in (
        ("ours", our_curve, reached),
        ("transformers + AdamW", peer_curve, (peer.total_steps * peer.tokens_per_step, peer_curve.seconds)),
    ):
        work = curve.workload
        rows.append(
            [
                name,
                f"{work.optimizer}, peak lr {work.lr:g}, warm-up {work.warmup_steps}",
                f"{work.total_steps} x {work.tokens_per_step:,}",
                f"{curve.points[-1][2]:.4f}",
                f"{curve.seconds:.0f}",
                f"{point[0]:,} tokens" if point else "not reached",
                f"{point[1]:.0f}" if point else "not reached",
            ]
        )
    header = ["side", "optimizer", "steps x tokens", "bits per byte at the end", "seconds of the whole run",
              f"{target:.4f} after", "seconds"]  # fmt: skip
    tuned = ", ".join(f"{lr}: {value:.4f}" for lr, value in tried.items())
    parts = [
        "# Time to the loss of transformers + AdamW",
        machine_line(where),
        f"Width {settings.hidden_size}, {settings.num_hidden_layers} layers, sequence {settings.seq}, fp32, "
        f"{'compiled' if settings.compiled else 'eager'}, seed {settings.seed}; trained on {Path(ours.data).name}, "
        f"evaluated on at most {settings.eval_rows} rows of {Path(ours.validation).name} "
        f"every {settings.eval_every} peer steps.",
        f"The peer's learning rates tried (bits per byte at the end): {tuned}." if tuned else "",
        table(header, rows),
        f"- {line}",
        "![bits per byte against seconds](time_to_loss.png)",
    ]
    data = {"machine": where, "settings": asdict(settings), "target_bits_per_byte": target, "ratio": ratio,
            "peer_lrs_tried": tried, "ours": our_curve.to_dict(), "peer": peer_curve.to_dict()}  # fmt: skip
    write_results(settings.results, "time_to_loss", data, "\n\n".join(part for part in parts if part))
    plot(Path(settings.results) / "time_to_loss.png", our_curve, peer_curve)
    return 1 if settings.check and not met else 0


if __name__ == "__main__":
    main(run)
