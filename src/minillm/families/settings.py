"""The flags of the families, and what they come to. No torch here: help must be quick."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from minillm.log import UserError

ARCHITECTURES = ("ar", "diffusion", "sdd")


@dataclass(frozen=True)
class FamilyConfig:
    """What a family needs to know besides the model: saved with it, and the same for training and use."""

    architecture: str = "ar"
    noise_schedule: str = "linear"
    diffusion_block: int = 0
    score_samples: int = 4
    noise: str = "belief"
    denoiser: str = "aggregate"
    k_schedule: tuple[int, ...] = (1, 2, 4, 8)
    k_warmup_steps: int = 0
    belief_share: float = 1.0
    tail: int = 32
    anneal_steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "k_schedule": list(self.k_schedule)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FamilyConfig:
        """From a checkpoint; what it does not tell takes the default."""
        names = {f.name for f in fields(cls)}
        known = {name: value for name, value in values.items() if name in names}
        if isinstance(known.get("k_schedule"), list):
            known["k_schedule"] = tuple(known["k_schedule"])
        for each in fields(cls):
            value, default = known.get(each.name, each.default), each.default
            right = isinstance(value, int | float) if isinstance(default, float) else isinstance(value, type(default))
            if not right or isinstance(value, bool) or (isinstance(value, int | float) and value < 0):
                raise UserError(f"the checkpoint's family has {each.name} {value!r}, which cannot be")
        return cls(**known)


@dataclass(frozen=True)
class FamilySettings:
    """Family (what is not given is as in the checkpoint the run starts from)"""

    architecture: str = field(
        default="",
        metadata={
            "help": "autoregressive (default), masked diffusion, or sparse-distribution diffusion",
            "choices": ("", *ARCHITECTURES),
        },
    )
    noise_schedule: str = field(
        default="",
        metadata={
            "help": "how the hidden share grows with the noise level (default linear)",
            "choices": ("", "linear", "cosine"),
        },
    )
    diffusion_block: int = field(
        default=-1,
        metadata={
            "help": "diffusion: blocks of so many tokens, autoregressive among each other (default 0: one block)",
            "min": -1,
        },
    )
    score_samples: int = field(
        default=0, metadata={"help": "noise samples of a sequence's likelihood bound (default 4)", "min": 0}
    )
    noise: str = field(
        default="",
        metadata={
            "help": "sdd: belief (default; a bound on the likelihood) or swap (the published recipe)",
            "choices": ("", "belief", "swap"),
        },
    )
    denoiser: str = field(
        default="",
        metadata={
            "help": "sdd: sum candidates before the first layer (default), or keep them apart through all",
            "choices": ("", "aggregate", "bilateral"),
        },
    )
    fixed_k: int = field(default=0, metadata={"help": "sdd: candidates a position, instead of a schedule", "min": 0})
    k_schedule: str = field(default="", metadata={"help": "sdd: candidates a position, growing (default 1,2,4,8)"})
    k_warmup_steps: int = field(
        default=-1,
        metadata={"help": "sdd: steps until the schedule's last entry (default 0: it holds from the start)", "min": -1},
    )
    belief_share: float = field(
        default=-1.0,
        metadata={
            "help": "sdd: share of rows whose beliefs are the model's own first prediction (rho; default 1)",
            "max": 1.0,
        },
    )
    tail: int = field(
        default=-1,
        metadata={"help": "diffusion, sdd: ignore tokens after a conversation's end, at most (default 32)", "min": -1},
    )
    anneal_steps: int = field(
        default=-1,
        metadata={"help": "steps over which a converted model's attention opens to what follows", "min": -1},
    )

    def __post_init__(self) -> None:
        self._schedule()

    def _schedule(self) -> tuple[int, ...] | None:
        if self.fixed_k:
            return (self.fixed_k,)
        if not self.k_schedule:
            return None
        try:
            schedule = tuple(int(part) for part in self.k_schedule.split(","))
        except ValueError:
            schedule = ()
        if not schedule or min(schedule) < 1:
            raise UserError(f"--k_schedule {self.k_schedule!r}: give numbers of candidates such as 1,2,4,8")
        return schedule

    def resolve(self, saved: FamilyConfig) -> FamilyConfig:
        """The flags that were given over what is saved."""
        values = asdict(self)
        values.pop("fixed_k")
        values["k_schedule"] = self._schedule()
        given = {name: value for name, value in values.items() if value not in ("", None, -1, -1.0)}
        if not self.score_samples:
            given.pop("score_samples", None)
        return FamilyConfig(**{**asdict(saved), **given})
