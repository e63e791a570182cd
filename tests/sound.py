"""A full checkpoint that nothing is wrong with, small enough for a test, and what it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import random_model, tiny_config

from minillm.checkpoint.format import build_checkpoint
from minillm.text.train import train_tokenizer
from minillm.train.state import TrainState


class SoundCheckpoint:
    """Its parts; `content` puts them together."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = train_tokenizer(["some words to learn"] * 20, 300, folder / "tokenizer")
        self.config = tiny_config(vocab_size=self.tokenizer.vocab_size)
        self.weights = random_model(self.config).state_dict()

    def content(self, **changes: Any) -> dict[str, Any]:
        """A full checkpoint of today, a new one at each call, with these keys changed."""
        whole = build_checkpoint(
            architecture="ar", stage="pretrain", model_state=dict(self.weights), model_config=self.config,
            optimizer_state={}, scheduler_state={}, scaler_state={}, train_config={}, model_name="ar-words-16-v1",
            progress=TrainState(step=3, best_value=2.5).to_dict(), parameters=1, parent=None,
            tokenizer=self.tokenizer.to_dict(), data_state={}, method_state={"name": "likelihood", "metrics": []},
            family={"architecture": "ar"}, ema_state=None, adapter=None,
        )  # fmt: skip
        return {**whole, **changes}

    def with_config(self, **changes: Any) -> dict[str, Any]:
        return self.content(model_config={**self.config.to_dict(), **changes})

    def with_weights(self, **changes: Any) -> dict[str, Any]:
        """Dots in the keys are written as two underscores; None leaves a key out."""
        named = {key.replace("__", "."): value for key, value in changes.items()}
        weights = {**self.weights, **named}
        return self.content(model_state_dict={key: value for key, value in weights.items() if value is not None})
