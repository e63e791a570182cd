"""The whole truth about how far a run has come. Saving and restoring it is all there is to resuming."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainState:
    step: int = 0
    epoch: float = 0.0
    tokens_seen: int = 0
    best_value: float | None = None  # so far: of the validation, or of training where there is no validation data
    best_metric: str = "loss"  # what is compared: the lowest loss is best, of anything else the highest
    best_step: int = 0
    best_is_validation: bool = True
    no_improvement_count: int = 0
    skipped_steps: int = 0
    bad_steps_in_a_row: int = 0
    elapsed: float = 0.0  # seconds of training, over all sessions
    training_log: list[dict[str, Any]] = field(default_factory=list)
    validation_log: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any]) -> TrainState:
        names = {f.name for f in fields(cls)}
        values = {key: value for key, value in checkpoint["progress"].items() if key in names}
        return cls(
            **values,
            training_log=list(checkpoint["training_log"]),
            validation_log=list(checkpoint["validation_log"]),
        )

    def improved(self, value: float, *, is_validation: bool) -> bool:
        """Take note of an evaluation; True if it is the best so far."""
        before = self.best_value
        better = before is None or (value < before if self.best_metric == "loss" else value > before)
        if better or (is_validation and not self.best_is_validation):
            self.best_value, self.best_step, self.best_is_validation = value, self.step, is_validation
            self.no_improvement_count = 0
            return True
        self.no_improvement_count += 1
        return False
