"""A checkpoint as a Hugging Face folder: what transformers loads, with tokenizer, chat template and model card.

Autoregressive models have a class in transformers (`models/dialects.py` knows which). Diffusion and SDD have none, so
their folders hold one of our own, `remote_code/modeling_minillm.py`. An adapter alone goes into peft's form.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.log import UserError
from minillm.models.config import ModelConfig
from minillm.models.dialects import CLASSES, config_to, dialect_of, weights_to
from minillm.stages import STAGES

if TYPE_CHECKING:
    from torch import Tensor

    from minillm.checkpoint.model import OpenedCheckpoint
    from minillm.convert.export import ExportSettings
    from minillm.text.tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # the hub's limit for a file that is easy to fetch
REMOTE_CODE = Path(__file__).parent / "remote_code" / "modeling_minillm.py"
INSTALL = "pip install 'minillm-trainer[export]'"


def hf_config(config: ModelConfig, tokenizer: Tokenizer, family: dict[str, Any]) -> dict[str, Any]:
    """config.json for transformers' own class of the architecture; our own fields stand under "minillm"."""
    return {
        **config_to(config),
        "bos_token_id": next(iter(tokenizer.begin_ids), None),
        "eos_token_id": tokenizer.end_of_turn_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": "float32",
        "torch_dtype": "float32",
        "minillm": config.to_dict(),
        "minillm_family": family,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: where a text and a turn end, and how to sample by default."""
    return {
        "eos_token_id": [tokenizer.end_of_turn_id, tokenizer.end_of_text_id],
        "pad_token_id": tokenizer.pad_id,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
    }


def remote_config(config: ModelConfig, tokenizer: Tokenizer, family: dict[str, Any]) -> dict[str, Any]:
    """config.json for the class in modeling_minillm.py.

    Raises:
        UserError: the model has a part that this class does not have.
    """
    from minillm.families.base import SpecialIds
    from minillm.families.settings import FamilyConfig

    plain = {field.name: field.default for field in fields(ModelConfig)}
    for name in ("value_head", "rope_scaling", "norm_topk_prob", "dense_layers"):
        if getattr(config, name) != plain[name]:
            raise UserError(
                f"a {family['architecture']} model with {name} {getattr(config, name)!r} cannot be exported"
            )
    if config.learned_positions:
        raise UserError(f"a {family['architecture']} model made of a GPT-2 cannot be exported")
    known, ids = FamilyConfig.from_dict(family), SpecialIds.of(tokenizer)
    sizes = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps",
        "tie_word_embeddings", "qk_norm", "qkv_bias", "denoiser", "num_experts_per_tok", "moe_intermediate_size",
    )  # fmt: skip
    module = REMOTE_CODE.stem
    return {
        "architectures": ["MiniLLMForMaskedLM"],
        "auto_map": {
            "AutoConfig": f"{module}.MiniLLMConfig",
            "AutoModel": f"{module}.MiniLLMForMaskedLM",
            "AutoModelForMaskedLM": f"{module}.MiniLLMForMaskedLM",
        },
        "model_type": "minillm",
        **{name: getattr(config, name) for name in sizes},
        "num_experts": config.num_experts if config.use_moe else 0,
        "num_candidates": known.k_schedule[-1] if config.denoiser else 1,
        "diffusion_block": 0 if config.denoiser else known.diffusion_block,
        "mask_token_id": ids.mask,
        "ignore_token_id": ids.ignore,
        "control_token_ids": list(ids.control),
        "stop_token_ids": [tokenizer.end_of_turn_id, tokenizer.end_of_text_id],
        "eos_token_id": tokenizer.end_of_turn_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": "float32",
        "minillm": config.to_dict(),
        "minillm_family": family,
    }


def require(settings: ExportSettings) -> None:
    """UserError where flags contradict each other, or a library is missing that writes or checks the artefact."""
    if settings.adapter_only and (len(settings.adapter) != 1 or settings.quantize):
        raise UserError("--adapter_only takes one --adapter, the folder of a LoRA run, and no --quantize")
    if settings.base and not settings.adapter_only:
        raise UserError("--base goes with --adapter_only: it names the weights that the adapter lies on")
    if settings.gguf_type:
        raise UserError(f"--gguf_type {settings.gguf_type} goes with --format gguf: give both, or neither")
    if settings.validation_data and not settings.quantize:
        raise UserError("--validation_data is what --quantize measures its loss on: give both, or neither")
    if settings.quantize:
        for name in ("torchao", "transformers"):
            if not _installed(name):
                raise UserError(f"--quantize needs {name}: pip install 'minillm-trainer[quant]'")
    for name in ("transformers", *(["peft"] if settings.adapter_only else [])):
        if not settings.no_check and not _installed(name):
            raise UserError(
                f"an export is checked by loading it, and {name} is not installed: {INSTALL}, or give --no_check "
                "for an export that nobody has checked"
            )


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def may_replace(path: Path) -> bool:
    """Only an empty folder, or one that says that we wrote it."""
    from minillm.convert.separate import is_ours

    if not path.is_dir():
        return False
    if not any(path.iterdir()) or is_ours(path):
        return True
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    weights = (path / WEIGHTS).is_file() or (path / INDEX).is_file()
    return weights and isinstance(config, dict) and "minillm" in config


def write(opened: OpenedCheckpoint, settings: ExportSettings, beside: Path) -> None:
    """The folder. With --quantize `opened` has the quantised weights afterwards: those are what the artefact holds.

    Raises:
        UserError: the model cannot be expressed in this form.
    """
    from minillm.convert.card import write_card

    if settings.adapter_only:
        from minillm.convert.separate import write_adapter

        write_adapter(opened, settings, beside)
        return
    write_model(opened, beside)
    if settings.quantize:
        from minillm.convert.quantize import quantize

        quantize(opened, settings, beside)
    for file in beside.glob("*.safetensors"):  # safetensors lets nobody else read what it writes
        shutil.copymode(beside / "config.json", file)
    write_card(opened, settings, beside, checked="")


def write_model(opened: OpenedCheckpoint, folder: Path) -> None:
    """Everything but the card."""
    config, tokenizer = opened.model.config, opened.tokenizer
    folder.mkdir()
    weights: Mapping[str, Tensor] = opened.model.state_dict()
    if opened.architecture == "ar":
        values = hf_config(config, tokenizer, opened.family)
        if opened.stage in STAGES:  # so that it is known again where the folder is imported
            values["minillm_stage"] = opened.stage
        weights = weights_to(weights, config)
        write_json(folder / "generation_config.json", generation_config(tokenizer))
    else:
        values = remote_config(config, tokenizer, opened.family)
        shutil.copyfile(REMOTE_CODE, folder / REMOTE_CODE.name)
    save_weights(folder, weights)
    write_json(folder / "config.json", values)
    tokenizer.save(folder)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """One file, or several of at most SHARD_BYTES with an index, as transformers names them. A tensor that is larger
    has a file of its own."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for key, value in weights.items():
        size = value.numel() * value.element_size()
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][key] = value.detach().contiguous()
        held += size
    if len(shards) == 1:
        save_file(shards[0], str(folder / WEIGHTS), metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, str(folder / name), metadata={"format": "pt"})
        places |= dict.fromkeys(shard, name)
    metadata = {
        "total_parameters": sum(value.numel() for value in weights.values()),
        "total_size": sum(value.numel() * value.element_size() for value in weights.values()),
    }
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": places})


def auto_class(opened: OpenedCheckpoint) -> str:
    """The class of transformers that loads the model."""
    if opened.architecture != "ar":
        return "AutoModelForMaskedLM"
    return "AutoModelForSequenceClassification" if opened.model.config.value_head else "AutoModelForCausalLM"


def kind_of(opened: OpenedCheckpoint) -> str:
    """What the exported model is, for people."""
    if opened.architecture != "ar":
        return "MiniLLMForMaskedLM (modeling_minillm.py)"
    return CLASSES[dialect_of(opened.model.config)]


def usage(opened: OpenedCheckpoint, settings: ExportSettings) -> str:
    """How the export is loaded, as a person would type it."""
    if settings.adapter_only:
        return f"PeftModel.from_pretrained(base, {settings.output!r})"
    trust = "" if opened.architecture == "ar" else ", trust_remote_code=True"
    return f"{auto_class(opened)}.from_pretrained({settings.output!r}{trust})"


def check(opened: OpenedCheckpoint, settings: ExportSettings, beside: Path) -> str:
    """Load the artefact with transformers (and torchao) and compare it with the checkpoint; the card says so then.

    Raises:
        UserError: they differ, or transformers cannot load it.
    """
    from minillm.convert.card import write_card
    from minillm.convert.parity import compare, expectations
    from minillm.convert.transformers_runtime import TransformersRuntime

    if settings.adapter_only:
        from minillm.convert.separate import check_adapter

        return check_adapter(opened, settings, beside)
    said = compare(expectations(opened), TransformersRuntime(beside, auto_class(opened)))
    write_card(opened, settings, beside, checked=said)
    return said
