"""The model card of a run folder: what it is, what it was trained on, how well, and how to use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minillm.convert.card import table
from minillm.models.lora import adapter_size, summary
from minillm.models.transformer import count_parameters

if TYPE_CHECKING:
    from minillm.train.job import Job


def _learned_from(job: Job) -> str:
    if job.method.better == "reward":
        return "learned from rewards"
    return "learned from a teacher" if job.method.borrowed() else "a preference loss"


def model_card(job: Job) -> str:
    """README.md of a run folder."""
    state, config = job.state, job.model.config
    kind = f"mixture of {config.num_experts} experts" if config.use_moe else "dense"
    if state.best_value is None:
        best = "not evaluated"
    else:
        measured = "validation" if state.best_is_validation else "training (there was no validation data)"
        best = f"{state.best_value:.4f} ({measured} {state.best_metric}, step {state.best_step})"
    data_path = job.config["data_path"]
    if isinstance(data_path, list):
        data_path = " ".join(data_path)
    parameters = count_parameters(job.model) - adapter_size(job.model)
    rows = [
        ("family", job.family.name),
        ("stage", job.stage),
        ("model", f"{kind}, {parameters:,} parameters, width {config.hidden_size}, "
                  f"{config.num_hidden_layers} layers, vocabulary {config.vocab_size}"),
        ("started from", job.parent["path"] if job.parent else "random weights"),
        *([("adapter", summary(job.model, job.adapter))] if job.adapter else []),
        *((name, f"{job.config[name]} (SHA-256 {digest[:12]})") for name, digest in job.method.borrowed().items()),
        ("data", f"{data_path}: {job.train_data.describe()}"),
        ("steps", f"{state.step} of {job.total_steps}, {state.tokens_seen:,} tokens"),
        (f"best {state.best_metric}", best),
        ("likelihood", job.family.likelihood if job.method.counts == "tokens" else f"none: {_learned_from(job)}"),
        ("skipped steps", str(state.skipped_steps)),
    ]  # fmt: skip
    return (
        f"# {job.run_name}\n\n{table(rows)}\n\n"
        f'Trained with MiniLLM. `minillm generate --checkpoint {job.folder / "best_model.pt"} --prompt "..."` writes '
        f"with it, `minillm export --checkpoint {job.folder / 'best_model.pt'} --output DIR` makes a folder for "
        "transformers. `training_config.json` holds every setting.\n"
    )
