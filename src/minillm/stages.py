"""The stages of a model's life: one line each, read by the commands, the loader, the data and the evaluation."""

from __future__ import annotations

import re
from typing import NamedTuple

from minillm.log import UserError


class Stage(NamedTuple):
    """What a stage is, and what it does where a flag is not given."""

    name: str  # in files: {name}_{hidden_size}.pth
    alias: str  # what people also call it
    title: str
    starts_from: str | None  # the stage whose checkpoint it starts from
    data: str  # the form of its rows: texts, conversations, pairs
    data_file: str
    optimizer: str
    learning_rate: float
    chats: bool  # its models speak in turns
    model_rows: int = 1  # rows of the model for one row of the data
    even: bool = True  # all rows of the model are equally long
    adamw_rate: float = 0.0  # AdamW's learning rate, where the optimizer is another one and wants another rate

    def rate_with(self, optimizer: str) -> float:
        """The peak learning rate where none is given."""
        return self.learning_rate if optimizer == self.optimizer else self.adamw_rate or self.learning_rate


_ALL = (
    Stage("pretrain", "", "Pretraining", None, "texts", "pretrain.jsonl", "muon", 2e-3, False),
    Stage(
        "full_sft", "sft", "Supervised fine-tuning", "pretrain", "conversations", "sft.jsonl", "muon", 1e-3, True,
        adamw_rate=3e-4,
    ),
    Stage("lora", "", "LoRA fine-tuning", "full_sft", "conversations", "sft.jsonl", "adamw", 3e-4, True),
    Stage(
        "rlhf", "dpo", "Preference tuning (DPO)", "full_sft", "pairs", "dpo.jsonl", "adamw", 5e-6, True,
        model_rows=2, even=False,
    ),
    Stage(
        "reward", "", "Reward model", "full_sft", "pairs", "dpo.jsonl", "adamw", 1e-5, False, model_rows=2, even=False
    ),
    Stage("ppo_actor", "ppo", "PPO", "full_sft", "prompts", "prompts.jsonl", "adamw", 1e-5, True, even=False),
    Stage("grpo", "", "GRPO", "full_sft", "prompts", "prompts.jsonl", "adamw", 1e-5, True, even=False),
    Stage(
        "spo", "", "Single-stream policy optimization", "full_sft", "prompts", "prompts.jsonl", "adamw", 1e-5, True,
        even=False,
    ),
    Stage("full_dist", "distill", "Distillation", "full_sft", "conversations", "sft.jsonl", "adamw", 3e-4, True),
    Stage("reason", "", "Reasoning distillation", "full_sft", "conversations", "reason.jsonl", "adamw", 3e-4, True),
)  # fmt: skip
STAGES = {stage.name: stage for stage in _ALL}
ALIASES = {stage.alias: stage.name for stage in _ALL if stage.alias}


def canonical_stage(name: str) -> str:
    """sft -> full_sft, dpo -> rlhf; raises UserError for a name that is no stage."""
    stage = ALIASES.get(name, name)
    if stage not in STAGES:
        raise UserError(f"{name!r} is not a stage; there are {', '.join([*STAGES, *ALIASES])}")
    return stage


def stage_in_name(name: str) -> str:
    """The stage that a file's name has in it (full_sft_512), "" if none."""
    return next((stage for stage in STAGES if re.search(rf"(^|_){stage}(_|$)", name)), "")
