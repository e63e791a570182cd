"""The logits of weights in transformers: a second opinion on what was read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.log import UserError

if TYPE_CHECKING:
    from torch import Tensor


def logits_of(config: Mapping[str, Any], weights: Mapping[str, Tensor], tokens: Tensor) -> tuple[Tensor, str]:
    """float32 logits [B, L, V] of `tokens` [B, L], and the name of the model that computed them.

    Args:
        config: as in config.json.
        weights: under Hugging Face's names.

    Raises:
        UserError: transformers cannot load them, or misses some.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    from minillm.convert.transformers_runtime import quiet

    with tempfile.TemporaryDirectory() as folder, quiet():
        (Path(folder) / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
        copies = {key: value.float().contiguous().clone() for key, value in weights.items()}
        save_file(copies, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})
        try:
            loader: Any = transformers.AutoModelForCausalLM
            model, told = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        except Exception as error:  # it has many ways to fail
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"transformers cannot load these weights as a {config['model_type']} model: {reason}"
            ) from error
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if told.get(what):
                keys = ", ".join(map(str, sorted(told[what])[:3]))
                raise UserError(f"transformers reports {what.replace('_', ' ')} in these weights: {keys}")
        with torch.inference_mode():
            logits = model.eval()(input_ids=tokens, use_cache=False).logits.float()
    return logits, f"{type(model).__name__} of transformers {transformers.__version__}"
