"""Our model as a Hugging Face folder. Parameter names are the same, so exporting is saving."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.log import UserError, info
from minillm.models.config import ModelConfig

if TYPE_CHECKING:
    from minillm.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Export a checkpoint as a folder that transformers loads"""

    checkpoint: str = field(metadata={"help": "full checkpoint (.pt) or flat weights (.pth)"})
    adapter: tuple[str, ...] = field(
        default=(), metadata={"help": "LoRA adapters to merge into it: folders, with a weight as in a:0.7 b:0.3"}
    )
    output: str = field(metadata={"help": "folder to write; it must not exist or be an earlier export"})
    tokenizer: str = field(default="", metadata={"help": "tokenizer.json or its folder (default: the checkpoint's)"})


def hf_config(config: ModelConfig, tokenizer: Tokenizer, family: dict[str, Any]) -> dict[str, Any]:
    """config.json for transformers' Qwen3 / Qwen3-MoE classes; our own fields stand under "minillm"."""
    kind = "ForSequenceClassification" if config.value_head else "ForCausalLM"
    values: dict[str, Any] = {
        "architectures": [("Qwen3Moe" if config.use_moe else "Qwen3") + kind],
        "model_type": "qwen3_moe" if config.use_moe else "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": tokenizer.end_of_turn_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": "float32",
        "torch_dtype": "float32",
        "minillm": config.to_dict(),
        "minillm_family": family,
    }
    if config.use_moe:
        values |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": config.router_aux_loss_coef,
        }
    if config.value_head:
        values |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return values


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: where a text and a turn end, and how to sample by default."""
    return {
        "eos_token_id": [tokenizer.end_of_turn_id, tokenizer.end_of_text_id],
        "pad_token_id": tokenizer.pad_id,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
    }


def run(settings: ExportSettings) -> None:
    """Write the folder beside and rename it.

    Raises:
        UserError: the output exists and is not an earlier export, or the checkpoint is not autoregressive.
    """
    from safetensors.torch import save_file

    from minillm.checkpoint.model import open_checkpoint

    output = Path(settings.output)
    if output.exists() and not _may_replace(output):
        raise UserError(f"{output} exists and is not an earlier export: choose another --output")
    opened = open_checkpoint(settings.checkpoint, tokenizer=settings.tokenizer, adapters=settings.adapter)
    if opened.architecture != "ar":
        raise UserError(f"a model of family {opened.architecture!r} cannot be exported as Qwen3, only 'ar' can")
    beside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    beside.mkdir(parents=True)
    try:
        weights = {key: value.contiguous().clone() for key, value in opened.model.state_dict().items()}
        save_file(weights, str(beside / "model.safetensors"), metadata={"format": "pt"})
        for name, content in (
            ("config.json", hf_config(opened.model.config, opened.tokenizer, opened.family)),
            ("generation_config.json", generation_config(opened.tokenizer)),
        ):
            (beside / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        opened.tokenizer.save(beside)
        (beside / "README.md").write_text(_card(opened, settings.checkpoint), encoding="utf-8")
        if output.exists():
            shutil.rmtree(output)
        os.replace(beside, output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    kind = "AutoModelForSequenceClassification" if opened.model.config.value_head else "AutoModelForCausalLM"
    info(f"[export] {settings.checkpoint} -> {output}: {kind}.from_pretrained({str(output)!r})")


def _may_replace(folder: Path) -> bool:
    """Only an empty folder, or one whose config.json says that we wrote it."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (folder / "model.safetensors").is_file() and isinstance(config, dict) and "minillm" in config


def _card(opened: Any, source: str) -> str:
    kind = "Qwen3-MoE" if opened.model.config.use_moe else "Qwen3"
    judges = opened.model.config.value_head
    task, auto = ("text-classification", "SequenceClassification") if judges else ("text-generation", "CausalLM")
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags: [minillm]\n---\n\n"
        f"# {Path(source).stem}\n\nTrained with MiniLLM (stage: {opened.stage or 'unknown'}), "
        f"exported in the form of {kind}. Load it with `AutoModelFor{auto}.from_pretrained`.\n"
    )
