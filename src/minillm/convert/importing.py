"""minillm import: a model of Hugging Face's, from a folder or the hub, as a full checkpoint of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minillm.log import UserError, info


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """Import a Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE or GPT-2 model"""

    source: str = field(
        metadata={"help": "folder with config.json and weights, or a model's id on the hub", "positional": True}
    )
    output: str = field(metadata={"help": "checkpoint to write (.pt)"})
    tokenizer: str = field(default="", metadata={"help": "folder with the tokenizer, where it is another one"})
    revision: str = field(default="", metadata={"help": "of a model on the hub: branch, tag or commit"})


def run(settings: ImportSettings) -> None:
    """Read the model, write the checkpoint, say what was done. The source is not touched.

    Raises:
        UserError: the source cannot be read, or something of the model is not known here.
    """
    output = Path(settings.output)
    if output.suffix != ".pt":
        raise UserError(f"--output {output}: a checkpoint's name ends in .pt")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name a file")
    folder = _folder(settings)
    from minillm.checkpoint.files import save_tensors
    from minillm.checkpoint.folders import read_model_folder
    from minillm.models.config import ModelConfig

    content = read_model_folder(folder, Path(settings.tokenizer) if settings.tokenizer else None)
    content["parent"]["path"] = content["imported"]["path"] = settings.source
    if not Path(settings.source).is_dir():
        content["imported"]["repo_id"] = settings.source
    save_tensors(output, content)
    config = ModelConfig.from_dict(content["model_config"])
    parameters = sum(value.numel() for value in content["model_state_dict"].values())
    info(
        f"[import] {output}: {content['imported']['model_type']}, {parameters:,} parameters in float32, "
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, vocabulary of {config.vocab_size:,}, "
        f"{config.max_position_embeddings:,} positions. Optimizer state and losses are not known"
    )
    info(f"[import] go on with: minillm sft --pretrained_path {output} --data_path ... (or lora, dpo, generate, chat)")


def _folder(settings: ImportSettings) -> Path:
    """The folder the source means. Raises UserError for a file, and where the hub has no such model."""
    path = Path(settings.source)
    if path.is_dir():
        if settings.revision:
            raise UserError(f"--revision {settings.revision} is for models on the hub; {path} is a folder")
        return path
    if path.is_file():
        raise UserError(f"{path} is a file: `minillm convert` makes a checkpoint of bare weights, import reads folders")
    if settings.source.count("/") != 1 or settings.source.startswith((".", "/", "~")):
        raise UserError(f"there is no folder {settings.source}, and it is no model id of the hub (OWNER/NAME) either")
    from minillm.convert.hub import download

    return download(settings.source, settings.revision)
