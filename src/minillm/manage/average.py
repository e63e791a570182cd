"""minillm checkpoint average: one checkpoint with the mean of several ones' weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.log import UserError, info

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AverageSettings:
    """Average the weights of checkpoints"""

    checkpoints: tuple[str, ...] = field(
        metadata={"help": "files, oldest first, or one run folder (its step_*.pt)", "positional": True}
    )
    output: str = field(metadata={"help": "file to write (.pt)"})
    last: int = field(default=0, metadata={"help": "take the newest so many (default: all)", "min": 0})
    method: str = field(
        default="uniform",
        metadata={"help": "all alike, or the newer the heavier (exponential)", "choices": ("uniform", "ema")},
    )
    decay: float = field(
        default=0.5,
        metadata={"help": "ema: what is older counts so much of what is newer", "above": 0.0, "max": 1.0},
    )


def chosen(settings: AverageSettings) -> list[Path]:
    """The files, oldest first. Raises UserError where there are fewer than two."""
    from minillm.checkpoint.sharded import sharded_checkpoints
    from minillm.manage.catalog import step_number

    paths = [Path(text) for text in settings.checkpoints]
    if len(paths) == 1 and paths[0].is_dir():
        files = [path for path in paths[0].glob("step_*.pt") if step_number(path) >= 0]
        found = [*files, *sharded_checkpoints(paths[0])]
        if len(found) < 2:
            raise UserError(
                f"{paths[0]} has {len(found)} numbered checkpoints, an average needs two: train with --keep_last 5"
            )
        paths = sorted(found, key=step_number)
    paths = paths[-settings.last :] if settings.last else paths
    if len(paths) < 2:
        raise UserError("an average needs at least two checkpoints")
    return paths


def shares(count: int, method: str, decay: float) -> list[float]:
    """How much each of `count` checkpoints counts, oldest first; together 1."""
    raw = [1.0 if method == "uniform" else decay ** (count - 1 - number) for number in range(count)]
    return [share / sum(raw) for share in raw]


def run(settings: AverageSettings) -> None:
    """Write the average. It has sizes, tokenizer and family of the newest, and names all of them.

    Raises:
        UserError: they are not of one model, one cannot be used, or the output is one of them.
    """
    import torch

    from minillm.checkpoint.files import sha256
    from minillm.checkpoint.model import open_checkpoint, save_derived

    paths, output = chosen(settings), Path(settings.output)
    if output.suffix != ".pt":
        raise UserError(f"--output {output}: give the name of a full checkpoint (.pt)")
    if any(output.exists() and output.samefile(path) for path in paths):
        raise UserError(f"--output {output} is one of the checkpoints to average: choose another name")
    weighed = shares(len(paths), settings.method, settings.decay)
    newest = open_checkpoint(str(paths[-1]))
    total: dict[str, Tensor] = {}
    parents = []
    for path, share in zip(paths, weighed):
        opened = newest if path == paths[-1] else open_checkpoint(str(path))
        for what, one, two in (
            ("sizes", opened.model.config, newest.model.config),
            ("family", opened.family, newest.family),
            ("stage", opened.stage, newest.stage),
            ("tokenizer", opened.tokenizer.fingerprint, newest.tokenizer.fingerprint),
        ):
            if one != two:
                raise UserError(f"{path} and {paths[-1]} differ in their {what}: their weights have no meaningful mean")
        for key, value in opened.model.state_dict().items():
            part = value.to(torch.float64) * share
            total[key] = total[key] + part if key in total else part
        parents.append({"path": str(path), "sha256": sha256(path), "stage": opened.stage, "step": opened.step})
    weights = {key: value.to(torch.float32) for key, value in total.items()}
    averaged = {"method": settings.method, "shares": weighed, "of": parents}
    save_derived(output, newest, weights, newest.model.config, newest.family, newest.step, {"averaged": averaged})
    steps = ", ".join(f"{path.name} {share:.3f}" for path, share in zip(paths, weighed))
    info(f"[average] {output}: {steps}. Its losses are unknown until it is evaluated (minillm evaluate)")
