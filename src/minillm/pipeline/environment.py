"""What the environment variables of scripts/run.sh say, checked before anything is done."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minillm.families.settings import ARCHITECTURES
from minillm.log import UserError

STAGES = ("pretrain", "full_sft", "rlhf")
COMMANDS = {"pretrain": "pretrain", "full_sft": "sft", "rlhf": "dpo"}
DATA_VARIABLES = {"pretrain": "PRETRAIN_JSON", "full_sft": "SFT_JSON", "rlhf": "DPO_JSON"}
ARGUMENT_VARIABLES = {"pretrain": "PRETRAIN_ARGS", "full_sft": "SFT_ARGS", "rlhf": "DPO_ARGS"}
# The smoke test's model, unless the user chose one.
SMOKE_HIDDEN_SIZE, SMOKE_NUM_LAYERS = 64, 2

# Flags that decide where a stage writes and what its successor loads: they have variables, so that every
# stage agrees on them.
OWNED_FLAGS = {
    "hidden_size": "MODEL_HIDDEN_SIZE",
    "num_hidden_layers": "MODEL_NUM_LAYERS",
    "use_moe": "USE_MOE",
    "model_config": "MODEL_HIDDEN_SIZE and MODEL_NUM_LAYERS",
    "out_dir": "OUT_DIR",
}
FLAG_ALIASES = {
    "model_size": "model_config",
    "output_dir": "out_dir",
    "accumulation_steps": "grad_accum_steps",
    "save_interval": "save_every",
}


@dataclass(frozen=True)
class Environment:
    """The settings of one run of the pipeline; every path is absolute."""

    root: Path  # the repository, or the working directory where minillm is installed without one
    out_dir: Path
    data_dir: Path
    tensorboard_dir: Path
    hidden_size: int
    num_layers: int
    use_moe: bool
    architecture: str
    datasets: dict[str, Path | None]  # stage -> what the user named
    arguments: dict[str, tuple[str, ...]]  # stage -> further flags
    pretrained_path: Path | None
    cloud_home: Path
    cloud_input: Path

    @property
    def on_cloud(self) -> bool:
        return self.cloud_home.is_dir() or self.cloud_input.is_dir()

    def run_name(self, stage: str) -> str:
        """Name of the stage's run folder and, with .pth, of its flat weights, as full_sft_512_moe."""
        family = "" if self.architecture == "ar" else f"{self.architecture}_"
        return f"{family}{stage}_{self.hidden_size}" + ("_moe" if self.use_moe else "")

    def checkpoint(self, stage: str) -> Path:
        return self.out_dir / f"{self.run_name(stage)}.pth"

    def run_folder(self, stage: str) -> Path:
        return self.out_dir / self.run_name(stage)


def repository_root() -> Path:
    """The checkout this package runs from, or the working directory when it was installed without one."""
    checkout = Path(__file__).resolve().parents[3]
    return checkout if (checkout / "scripts" / "run.sh").is_file() else Path.cwd()


def read_environment(variables: Mapping[str, str], *, smoke_test: bool, root: Path | None = None) -> Environment:
    """Read and check the variables. Paths the user gives are relative to the working directory, as
    everywhere in a shell; the defaults lie in the repository. Raises UserError for an impossible value."""
    root = root or repository_root()
    cloud_home = _path(variables, "OPENBAYES_HOME", Path("/openbayes/home"))
    architecture = variables.get("ARCHITECTURE") or "ar"
    if architecture not in ARCHITECTURES:
        raise UserError(f"ARCHITECTURE is '{architecture}': this version knows {', '.join(ARCHITECTURES)}.")
    return Environment(
        root=root,
        out_dir=_path(variables, "OUT_DIR", root / "out"),
        data_dir=_path(variables, "DATA_DIR", root / "data" / "processed"),
        tensorboard_dir=_path(variables, "TF_DIR", cloud_home / "tf_dir" if cloud_home.is_dir() else root / "tf_dir"),
        hidden_size=_count(variables, "MODEL_HIDDEN_SIZE", SMOKE_HIDDEN_SIZE if smoke_test else 512),
        num_layers=_count(variables, "MODEL_NUM_LAYERS", SMOKE_NUM_LAYERS if smoke_test else 8),
        use_moe=_switch(variables, "USE_MOE"),
        architecture=architecture,
        datasets={stage: _optional_path(variables, name) for stage, name in DATA_VARIABLES.items()},
        arguments={stage: _arguments(variables, name) for stage, name in ARGUMENT_VARIABLES.items()},
        pretrained_path=_optional_path(variables, "MINILLM_PRETRAINED_PATH"),
        cloud_home=cloud_home,
        cloud_input=_path(variables, "OPENBAYES_INPUT", Path("/openbayes/input/input0")),
    )


def flag_values(arguments: tuple[str, ...] | list[str]) -> dict[str, str]:
    """{"max_steps": "20"} for ("--max-steps", "20"): one spelling, whatever the hyphens, `=` and aliases."""
    values: dict[str, str] = {}
    for position, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        name, _, value = argument[2:].partition("=")
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        if not value and not following.startswith("--"):
            value = following
        name = name.replace("-", "_")
        values[FLAG_ALIASES.get(name, name)] = value
    return values


def _optional_path(variables: Mapping[str, str], name: str) -> Path | None:
    value = variables.get(name)
    return Path.cwd() / Path(value).expanduser() if value else None


def _path(variables: Mapping[str, str], name: str, default: Path) -> Path:
    return _optional_path(variables, name) or default


def _count(variables: Mapping[str, str], name: str, default: int) -> int:
    value = variables.get(name) or str(default)
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise UserError(f"{name} is '{value}': give a whole number of at least 1.")
    return int(value)


def _switch(variables: Mapping[str, str], name: str) -> bool:
    value = (variables.get(name) or "0").lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off"):
        return False
    raise UserError(f"{name} is '{value}': give 1 or 0.")


def _arguments(variables: Mapping[str, str], name: str) -> tuple[str, ...]:
    try:
        arguments = tuple(shlex.split(variables.get(name, "")))
    except ValueError as error:
        raise UserError(f"{name} cannot be split into arguments ({error}): {variables[name]}") from error
    for flag in flag_values(arguments):
        if flag in OWNED_FLAGS:
            raise UserError(f"{name} holds --{flag}: set {OWNED_FLAGS[flag]} instead, so that all stages agree.")
    return arguments
