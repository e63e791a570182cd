"""Models small enough for a test, dense and with experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.models.config import ModelConfig
from minillm.models.transformer import LanguageModel


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers of width 16 over 50 tokens, with these changes."""
    sizes: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "max_position_embeddings": 64,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changes})


DENSE = tiny_config()
MOE = tiny_config(use_moe=True)
BOTH = pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])


def random_model(config: ModelConfig, seed: int = 0, scale: float = 0.3) -> LanguageModel:
    """Weights of order one, so that attention and routing matter; norms away from one."""
    model = LanguageModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if parameter.ndim == 1:
                parameter.add_(1.0)
    return model.eval()


def saved(path: Path, model: LanguageModel, **content: Any) -> Path:
    """A checkpoint file of this model, with what else it should say of itself (stage, architecture, family)."""
    torch.save({"model_state_dict": model.state_dict(), "model_config": model.config.to_dict(), **content}, path)
    return path
