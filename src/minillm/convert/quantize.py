"""minillm export --quantize: linear layers in 8 or 4 bits, by torchao, in the form in which transformers reads them.

int8: a row of weights shares a scale. int4: 32 weights do; torchao has no packed form that runs on a CPU, so 4 bits
take a byte in the file, and the file is no smaller than int8's. What stays in float32: embeddings and vocabulary head,
norms, biases, the router of experts, what reads SDD's candidates. Activations stay as they are (weight-only).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.log import UserError, info

if TYPE_CHECKING:
    from minillm.checkpoint.model import OpenedCheckpoint
    from minillm.convert.export import ExportSettings
    from minillm.families.base import Family

GROUP = 32  # weights that share a scale in int4
# Names of what is quantised: the linear layers, and the experts that transformers keeps in one tensor.
LAYERS = r"re:model\.layers\.\d+\.(.*_proj\.weight|mlp\.experts\.(gate_up|down)_proj)"
ROWS, LENGTH, BATCH, DRAWS = 128, 512, 8, 4  # what the loss is measured on, at most


def quantize(opened: OpenedCheckpoint, settings: ExportSettings, folder: Path) -> None:
    """Turn the exported folder into a quantised one, and print sizes and loss. `opened` has the quantised weights
    afterwards.

    Raises:
        UserError: torchao cannot quantise this model so, or the validation data cannot be used.
    """
    from minillm.convert.huggingface import SHARD_BYTES, auto_class, write_json
    from minillm.convert.transformers_runtime import quiet
    from minillm.models.dialects import weights_from

    config = opened.model.config
    _check_shapes(opened, settings.quantize)
    before = _size(folder)
    loss_before = _measure(opened, settings.validation_data) if settings.validation_data else None
    remote = opened.architecture != "ar"
    packed = folder.with_name("quantised")
    extra: dict[str, Any] = {"trust_remote_code": True} if remote else {}
    if config.use_moe and not remote:
        extra["experts_implementation"] = "eager"
    with quiet():
        import transformers

        model = getattr(transformers, auto_class(opened)).from_pretrained(
            str(folder), quantization_config=_torchao_config(settings.quantize), **extra
        )
        model.save_pretrained(str(packed), max_shard_size=SHARD_BYTES)
        weights = {
            name: value.dequantize() if type(value.data).__module__.startswith("torchao") else value.data
            for name, value in model.named_parameters()
        }
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    for new in packed.glob("*.safetensors*"):
        new.rename(folder / new.name)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] = saved["quantization_config"]
    if "experts_implementation" in extra:
        values["experts_implementation"] = extra["experts_implementation"]
    write_json(folder / "config.json", values)
    opened.model.load_state_dict(weights_from(weights, values["model_type"], config))
    _report(opened, settings, before, _size(folder), loss_before)


def _torchao_config(kind: str) -> Any:
    """What transformers is to ask of torchao."""
    import torch
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    how: Any = Int8WeightOnlyConfig()
    if kind == "int4":
        how = IntxWeightOnlyConfig(weight_dtype=getattr(torch, "int4"), granularity=PerGroup(GROUP))  # noqa: B009
    return TorchAoConfig(FqnToConfig({LAYERS: how}))


def _check_shapes(opened: OpenedCheckpoint, kind: str) -> None:
    config = opened.model.config
    if config.learned_positions:
        raise UserError(
            "--quantize: transformers has no linear layers in a GPT-2, so torchao finds nothing to quantise"
        )
    if kind == "int8":
        return
    if config.use_moe and opened.architecture == "ar":
        raise UserError(
            "--quantize int4: transformers keeps experts in one tensor, which torchao has in 8 bits only; give int8"
        )
    for name, value in opened.model.state_dict().items():
        if re.fullmatch(LAYERS[3:], name) and value.shape[1] % GROUP:
            raise UserError(
                f"--quantize int4: {name} has rows of {value.shape[1]} weights, and {GROUP} share a scale; give int8"
            )


def _size(folder: Path) -> int:
    """Bytes of the weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _report(
    opened: OpenedCheckpoint, settings: ExportSettings, before: int, after: int, loss_before: float | None
) -> None:
    info(f"[export] {settings.quantize}: {before:,} -> {after:,} bytes of weights ({after / before:.0%})")
    if settings.quantize == "int4":
        info("[export] int4: torchao keeps 4 bits in a byte on a CPU, so the file is no smaller than int8's")
    if loss_before is None:
        info("[export] what this costs in perplexity was not measured: --validation_data names held-out text for it")
        return
    loss_after = _measure(opened, settings.validation_data)
    from minillm.families import saved_family

    what = {"exact": "perplexity", "upper_bound": "perplexity (upper bound)", "none": "exp(training loss)"}
    name = what[saved_family(opened.family, opened.tokenizer).likelihood]
    info(
        f"[export] {name} {math.exp(loss_before):.4f} -> {math.exp(loss_after):.4f} "
        f"(loss {loss_before:.5f} -> {loss_after:.5f} nats a token, {loss_after - loss_before:+.5f})"
    )


def _measure(opened: OpenedCheckpoint, path: str) -> float:
    """The family's loss in nats a token on the first rows of the data: exact, or the bound of diffusion and SDD with
    the same noise each time."""
    import numpy as np
    import torch

    from minillm.data.batches import PreferencePairs, open_dataset
    from minillm.families import saved_family
    from minillm.families.base import Noise, TokenBatch
    from minillm.models.heads import weighted_cross_entropy

    model = opened.model
    family: Family = saved_family(opened.family, opened.tokenizer)
    data = open_dataset(
        "full_sft" if opened.speaks_in_turns else "pretrain",
        path,
        opened.tokenizer,
        max_seq_len=min(LENGTH, model.config.max_position_embeddings),
        tail=family.tail,
        hide_padding=not family.causal,
    )
    assert not isinstance(data, PreferencePairs)
    draws = 1 if family.likelihood == "exact" else DRAWS
    nats, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, min(len(data), ROWS), BATCH):
            rows = np.arange(start, min(start + BATCH, len(data), ROWS))
            batch = TokenBatch.from_numpy(data.rows(rows), torch.device("cpu"))
            noise = Noise.of(0, batch, -1, start)
            for index in range(draws):
                view = family.view(model, batch, noise.sample(index, draws))
                weights = view.weights if view.extra is None else view.weights.masked_fill(view.extra, 0.0)
                hidden = view.through(model).hidden
                nats += float(weighted_cross_entropy(hidden, model.head_weight, view.targets, weights).loss)
                count += view.count
    if not count:
        raise UserError(f"{path} has no trained token in its first rows: give other --validation_data")
    return nats / count
