"""Flags of rollouts. No torch here: help must be quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minillm.log import UserError

if TYPE_CHECKING:
    import torch

    from minillm.families.base import Family
    from minillm.models.transformer import LanguageModel
    from minillm.rollout.base import Engine
    from minillm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class RolloutSettings:
    """Rollouts"""

    rollout_rows: int = field(
        default=64, metadata={"help": "answers written at once; fewer need less memory", "min": 1}
    )
    rollout_url: str = field(
        default="",
        metadata={"help": "ar: write with a server instead, such as vLLM's at http://127.0.0.1:8000/v1"},
    )
    rollout_model: str = field(default="", metadata={"help": "its name of the model (default: the first it serves)"})
    rollout_folder: str = field(default="", metadata={"help": "where new weights are written for the server"})
    rollout_reload: str = field(
        default="",
        metadata={"help": "address that makes it read them, such as http://127.0.0.1:8000/collective_rpc"},
    )
    rollout_timeout: float = field(
        default=600.0, metadata={"help": "seconds that a reply of the server may take", "above": 0.0}
    )


def open_engine(
    settings: RolloutSettings, family: Family, model: LanguageModel, tokenizer: Tokenizer, dtype: torch.dtype | None
) -> Engine:
    """The engine that the flags ask for. `dtype`: number format of the model's arithmetic in this process.

    Raises:
        UserError: the server cannot be used, or the family has no order.
    """
    if not settings.rollout_url:
        if settings.rollout_folder or settings.rollout_reload:
            raise UserError("--rollout_folder and --rollout_reload are for a server: give --rollout_url as well")
        from minillm.rollout.engine import ModelEngine

        return ModelEngine(family, model, rows=settings.rollout_rows, dtype=dtype)
    if not family.ordered:
        raise UserError(
            f"--rollout_url: such servers write token after token, which {family.name} does not: leave it out"
        )
    from minillm.rollout.openai import ServedEngine

    return ServedEngine(settings, tokenizer, positions=model.config.max_position_embeddings)
