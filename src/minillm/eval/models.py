"""How good a checkpoint is on held-out data: loss, perplexity, accuracy, bits per byte."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from minillm.log import UserError


@dataclass(frozen=True)
class EvaluateSettings:
    """Evaluate a checkpoint on text or conversations"""

    checkpoint: str = field(metadata={"help": "full checkpoint (.pt) or flat weights (.pth)"})
    data_path: str = field(metadata={"help": "held-out data: texts or conversations"})
    stage: str = field(
        default="",
        metadata={
            "help": "how to read the data (default: as the checkpoint's stage)",
            "choices": ("", "pretrain", "sft"),
        },
    )
    eval_samples: int = field(default=128, metadata={"help": "rows that are read", "min": 1})
    max_seq_len: int = field(default=512, metadata={"help": "tokens a row", "min": 8})
    batch_size: int = field(default=4, metadata={"help": "rows at once", "min": 1})
    tokenizer: str = field(default="", metadata={"help": "tokenizer.json or its folder (default: the checkpoint's)"})
    seed: int = field(default=42, metadata={"help": "which rows are taken", "min": 0})
    output: str = field(default="", metadata={"help": "also write the numbers to this JSON file"})


def evaluate_checkpoint(settings: EvaluateSettings) -> dict[str, float | int | str]:
    """Means over the trained tokens of the rows: loss in nats, perplexity, accuracy, bits_per_byte, tokens,
    and what kind of likelihood the loss is."""
    import torch

    from minillm.checkpoint.model import open_checkpoint
    from minillm.data.batches import open_dataset
    from minillm.data.order import sample_indices
    from minillm.families import saved_family
    from minillm.methods.likelihood import Likelihood
    from minillm.train.metrics import Sums, perplexity

    opened = open_checkpoint(settings.checkpoint, tokenizer=settings.tokenizer)
    stage = settings.stage or ("sft" if opened.stage in ("full_sft", "rlhf") else "pretrain")
    family = saved_family(opened.family, opened.tokenizer)
    data = open_dataset(
        stage,
        settings.data_path,
        opened.tokenizer,
        max_seq_len=settings.max_seq_len,
        tail=family.tail,
        hide_padding=not family.causal,
    )
    method = Likelihood(family, settings.seed)
    sums = Sums()
    rows = sample_indices(settings.seed, 0, min(len(data), settings.eval_samples), len(data))
    with torch.no_grad():
        for start in range(0, len(rows), settings.batch_size):
            batch = data.rows(rows[start : start + settings.batch_size])
            part = method.prepare(opened.model, batch, torch.device("cpu"), -1, start)
            sums.add(method.loss(opened.model, part.data).metrics)
    means = sums.means()
    if "loss" not in means:
        raise UserError(f"{settings.data_path} has no trained token in the rows that were read")
    return {
        "checkpoint": settings.checkpoint,
        "stage": opened.stage,
        "likelihood": family.likelihood,
        "loss": means["loss"],
        "perplexity": perplexity(means["loss"]),
        "accuracy": means["accuracy"],
        "bits_per_byte": means["loss"] / math.log(2) / data.bytes_per_token,
        "tokens": int(sums.counts["loss"]),
        "rows": len(rows),
    }


def run(settings: EvaluateSettings) -> None:
    """Print the numbers, and write them as JSON if asked."""
    result = evaluate_checkpoint(settings)
    for name, value in result.items():
        print(f"{name:<14} {value:.4f}" if isinstance(value, float) else f"{name:<14} {value}", file=sys.stdout)
    if settings.output:
        from minillm.checkpoint.files import write_text

        write_text(Path(settings.output), json.dumps(result, indent=2, ensure_ascii=False) + "\n")
