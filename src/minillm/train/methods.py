"""From a stage to its method: one builder each. Frozen models are kept in the run's folder, so that resuming finds
exactly those the run began with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.checkpoint.files import extract_weights, read_tensors, save_tensors, sha256
from minillm.checkpoint.loader import load_weights
from minillm.families.base import Family
from minillm.log import UserError
from minillm.methods.base import Method
from minillm.methods.dpo import DirectPreference
from minillm.methods.likelihood import Likelihood
from minillm.methods.settings import PreferenceSettings
from minillm.models.transformer import LanguageModel
from minillm.text.tokenizer import Tokenizer
from minillm.train.settings import Settings


@dataclass(frozen=True)
class Surroundings:
    """What a method may be built from. The model has its starting weights, or those of the checkpoint to resume."""

    stage: str
    settings: Settings
    family: Family
    model: LanguageModel
    tokenizer: Tokenizer
    folder: Path
    resumed: dict[str, Any] | None

    def copy_of_model(self) -> LanguageModel:
        """A second model with the same weights."""
        copy = LanguageModel(self.model.config)
        copy.load_state_dict(self.model.state_dict())
        return copy


def _likelihood(around: Surroundings) -> Method:
    return Likelihood(around.family, around.settings.run.seed)


def _preference(around: Surroundings) -> Method:
    flags = around.settings.of(PreferenceSettings)
    return DirectPreference(around.family, around.copy_of_model(), beta=flags.beta, seed=around.settings.run.seed)


BUILDERS: dict[str, Callable[[Surroundings], Method]] = {
    "pretrain": _likelihood,
    "full_sft": _likelihood,
    "rlhf": _preference,
}


def build_method(around: Surroundings) -> Method:
    """The stage's method."""
    return BUILDERS[around.stage](around)


def keep_frozen(method: Method, folder: Path, resumed: dict[str, Any] | None) -> dict[str, str]:
    """Write the method's frozen models into the folder, or read those back that the resumed run began with; the hash
    of each file.

    Raises:
        UserError: a file is not there or not what the run began with.
    """
    hashes = {}
    for name, model in method.frozen().items():
        path = folder / f"{name}.pth"
        if resumed is None:
            save_tensors(path, model.state_dict())
        elif not path.is_file() or sha256(path) != resumed["method_state"]["frozen_sha256"].get(name):
            raise UserError(f"{path} is missing or not the {name} this run started with: it cannot be resumed")
        else:
            load_weights(model, extract_weights(read_tensors(path), path), str(path), strict=True)
        hashes[name] = sha256(path)
    return hashes
