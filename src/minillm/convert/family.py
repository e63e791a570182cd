"""An autoregressive checkpoint as the beginning of a diffusion or SDD model: the same weights, looking both ways."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from minillm.log import UserError, info


@dataclass(frozen=True)
class ConvertSettings:
    """A checkpoint as the beginning of another family"""

    checkpoint: str = field(default="", metadata={"help": "autoregressive checkpoint (.pt) or flat weights (.pth)"})
    to: str = field(default="", metadata={"help": "what it becomes", "choices": ("", "diffusion", "sdd")})
    output: str = field(default="", metadata={"help": "file to write (.pt)"})
    denoiser: str = field(
        default="aggregate", metadata={"help": "sdd: how candidates are read", "choices": ("aggregate", "bilateral")}
    )
    anneal_steps: int = field(
        default=200,
        metadata={"help": "steps of the next training over which attention opens to what follows", "min": 0},
    )
    seed: int = field(default=0, metadata={"help": "of the parameters that are new", "min": 0})


def convert_family(settings: ConvertSettings, tokenizer: str) -> None:
    """Write the converted checkpoint; pretraining goes on from it with --pretrained_path.

    What is new: REST begins as the mean embedding (a belief that knows nothing points nowhere else), the bilateral
    denoiser's attention among candidates begins at zero output. The mask token already has its row.

    Args:
        tokenizer: what --tokenizer says, or "".

    Raises:
        UserError: the checkpoint is not autoregressive.
    """
    import torch

    from minillm.checkpoint.model import open_checkpoint, save_derived
    from minillm.models.transformer import LanguageModel

    opened = open_checkpoint(settings.checkpoint, tokenizer=tokenizer)
    if opened.architecture != "ar":
        raise UserError(f"{settings.checkpoint} is a {opened.architecture} model: only an ar model can be converted")
    denoiser = settings.denoiser if settings.to == "sdd" else ""
    config = replace(opened.model.config, causal=False, denoiser=denoiser)
    model = LanguageModel(config)
    model.init_weights(settings.seed)
    weights = {**model.state_dict(), **opened.model.state_dict()}
    if denoiser:
        weights["model.candidates.rest"] = opened.model.head_weight.mean(0, keepdim=True)
        for key, value in weights.items():
            if key.startswith("model.candidates.layers.") and key.endswith("o_proj.weight"):
                weights[key] = torch.zeros_like(value)
    family = {"architecture": settings.to, "anneal_steps": settings.anneal_steps}
    if denoiser:
        family["denoiser"] = denoiser
    save_derived(Path(settings.output), opened, weights, config, family, 0)
    info(
        f"[convert] {settings.output}: a {settings.to} model with the weights of {settings.checkpoint}. It must be "
        f"trained on before it is any good: minillm pretrain --pretrained_path {settings.output} --data_path ..."
    )
