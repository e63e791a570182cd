"""From a stage to its method: one builder each. Frozen models are kept in the run's folder, so that resuming finds
exactly those the run began with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minillm.checkpoint.files import extract_weights, read_tensors, save_tensors, sha256
from minillm.checkpoint.loader import load_weights
from minillm.families.base import Family
from minillm.log import UserError
from minillm.methods.base import Method
from minillm.methods.distill import Distillation
from minillm.methods.dpo import DirectPreference
from minillm.methods.kto import KahnemanTversky
from minillm.methods.likelihood import Likelihood
from minillm.methods.own_answers import OwnAnswers
from minillm.methods.reason import ReasoningTraces
from minillm.methods.reward import RewardModelling
from minillm.methods.settings import DistillationSettings, PreferenceSettings, ReasoningSettings, RewardModelSettings
from minillm.models.device import choose_device
from minillm.models.divergence import Objective
from minillm.models.lora import adapted_layers, base_of, without_adapters
from minillm.models.transformer import LanguageModel
from minillm.models.value import add_value_head
from minillm.text.tokenizer import TAG_TOKENS, Tokenizer
from minillm.train.policies import build_grpo, build_ppo, build_spo
from minillm.train.settings import Settings
from minillm.train.teacher import check_unchanged, open_teacher


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
    dtype: torch.dtype | None = None  # of the arithmetic

    def copy_of_model(self) -> LanguageModel:
        """A second model with the same weights (under LoRA without the adapter, which says nothing yet)."""
        copy = LanguageModel(self.model.config)
        copy.load_state_dict(without_adapters(self.model.state_dict()))
        return copy

    def reference(self) -> LanguageModel:
        """The model as the run begins, to be frozen: a copy, or under LoRA the model without its adapter, around the
        same tensors."""
        return base_of(self.model) if any(adapted_layers(self.model)) else self.copy_of_model()


def _likelihood(around: Surroundings) -> Method:
    return Likelihood(around.family, around.settings.run.seed)


def _preference(around: Surroundings) -> Method:
    flags = around.settings.of(PreferenceSettings)
    if flags.precompute_reference == "on" and not around.family.ordered:
        raise UserError(
            f"--precompute_reference on: what {around.family.name} says of an answer is a bound with new noise at "
            "every step, which cannot be asked for before training. Leave the flag out"
        )
    kind = KahnemanTversky if flags.loss == "kto" else DirectPreference
    reference = around.reference() if flags.needs_reference else None
    return kind(around.family, reference, flags, seed=around.settings.run.seed)


def _reward(around: Surroundings) -> Method:
    add_value_head(around.model)
    return RewardModelling(center=around.settings.of(RewardModelSettings).center_rewards_coefficient)


def _distillation(around: Surroundings) -> Method:
    flags, run, tokenizer = around.settings.of(DistillationSettings), around.settings.run, around.tokenizer
    if flags.cache_teacher and not around.family.ordered:
        raise UserError(
            f"--cache_teacher: what {around.family.name} shows the teacher has new noise at every step, which cannot "
            "be asked for before training. Leave the flag out"
        )
    if flags.cache_teacher and flags.on_policy_share:
        raise UserError("--cache_teacher knows nothing of the answers of --on_policy_share: give one of the two")
    teacher = open_teacher(
        flags.teacher, family=around.family, tokenizer=tokenizer, max_seq_len=around.settings.data.max_seq_len,
        device=choose_device(run.device),
    )  # fmt: skip
    check_unchanged(teacher, flags.teacher, around.resumed)
    write = OwnAnswers(
        around.family, end_of_turn=tokenizer.end_of_turn_id, end_of_text=tokenizer.end_of_text_id, pad=tokenizer.pad_id
    )
    return Distillation(
        around.family, teacher, objective=Objective(flags.divergence, flags.beta, flags.temperature),
        ce_weight=flags.ce_weight, seed=run.seed, own_share=flags.on_policy_share,
        write=write if flags.on_policy_share else None,
    )  # fmt: skip


def _reasoning(around: Surroundings) -> Method:
    tags = [around.tokenizer.token_to_id(tag) for tag in TAG_TOKENS]
    missing = [tag for tag, token in zip(TAG_TOKENS, tags) if token is None]
    if missing:
        raise UserError(
            f"the tokenizer has no token {missing[0]}, so its weight cannot be set. Train one with `minillm data "
            "train-tokenizer`, or fine-tune on the traces with `minillm sft`"
        )
    weight = around.settings.of(ReasoningSettings).tag_weight
    known = [tag for tag in tags if tag is not None]
    return ReasoningTraces(around.family, around.settings.run.seed, tags=known, weight=weight)


BUILDERS: dict[str, Callable[[Surroundings], Method]] = {
    "pretrain": _likelihood,
    "full_sft": _likelihood,
    "lora": _likelihood,
    "rlhf": _preference,
    "full_dist": _distillation,
    "reason": _reasoning,
    "reward": _reward,
    "ppo_actor": build_ppo,
    "grpo": build_grpo,
    "spo": build_spo,
}


def build_method(around: Surroundings) -> Method:
    """The stage's method."""
    return BUILDERS[around.stage](around)


def keep_frozen(method: Method, trained: LanguageModel, folder: Path, resumed: dict[str, Any] | None) -> dict[str, str]:
    """Write the method's frozen models into the folder, or read those back that the resumed run began with; the hash
    of each file. Tensors of the trained model itself (LoRA's base) are in every checkpoint already.

    Raises:
        UserError: a file is not there or not what the run began with.
    """
    hashes = {}
    own = {id(parameter) for parameter in trained.parameters()}
    for name, model in method.frozen().items():
        if all(id(parameter) in own for parameter in model.parameters()):
            continue
        path = folder / f"{name}.pth"
        if resumed is None:
            save_tensors(path, model.state_dict())
        elif not path.is_file() or sha256(path) != resumed["method_state"]["frozen_sha256"].get(name):
            raise UserError(f"{path} is missing or not the {name} this run started with: it cannot be resumed")
        else:
            load_weights(model, extract_weights(read_tensors(path), path), str(path), strict=True)
        hashes[name] = sha256(path)
    return hashes | method.borrowed()
