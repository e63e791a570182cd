"""minillm generate: a prompt in, a completion out."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from minillm.log import UserError


@dataclass(frozen=True)
class GenerateSettings:
    """Write with a checkpoint"""

    checkpoint: str = field(metadata={"help": "full checkpoint (.pt) or flat weights (.pth)"})
    prompt: tuple[str, ...] = field(metadata={"help": "one prompt or several, written together in one batch"})  # type: ignore[misc]
    max_new_tokens: int = field(default=128, metadata={"help": "longest completion in tokens", "min": 1})
    temperature: float = field(default=0.7, metadata={"help": "0: always the most probable token", "min": 0.0})
    top_k: int = field(default=0, metadata={"help": "sample among the k most probable (0: all)", "min": 0})
    top_p: float = field(
        default=0.9, metadata={"help": "sample within this probability mass", "above": 0.0, "max": 1.0}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "above 1: tokens already there become less probable", "above": 0.0}
    )
    steps: int = field(
        default=0,
        metadata={"help": "diffusion, sdd: steps over the whole text (default 0: one token a step)", "min": 0},
    )
    block_length: int = field(
        default=32,
        metadata={
            "help": "diffusion, sdd: write blocks of so many tokens one after another (0: all at once)",
            "min": 0,
        },
    )
    order: str = field(
        default="confidence",
        metadata={"help": "diffusion, sdd: which positions come first", "choices": ("confidence", "random")},
    )
    threshold: float = field(
        default=0.0,
        metadata={
            "help": "diffusion, sdd: reveal every position at least so probable at once (default 0: by steps)",
            "min": 0.0,
            "max": 1.0,
        },
    )
    remask: float = field(
        default=0.0,
        metadata={
            "help": "diffusion, sdd: share of the revealed tokens that each step thinks over",
            "min": 0.0,
            "max": 0.9,
        },
    )
    raw: bool = field(default=False, metadata={"help": "no chat template, also for fine-tuned checkpoints"})
    system: str = field(default="", metadata={"help": "system message of the chat"})
    seed: int = field(default=0, metadata={"help": "the same seed writes the same text", "min": 0})
    tokenizer: str = field(default="", metadata={"help": "tokenizer.json or its folder (default: the checkpoint's)"})


def complete(settings: GenerateSettings) -> list[str]:
    """The completions of all prompts. Fine-tuned checkpoints get the prompt as a user's turn.

    Raises:
        UserError: a prompt does not fit the model's positions.
    """
    from minillm.checkpoint.model import open_checkpoint
    from minillm.families import saved_family
    from minillm.families.base import Sampling
    from minillm.text.chat import encode_chat

    opened = open_checkpoint(settings.checkpoint, tokenizer=settings.tokenizer)
    tokenizer = opened.tokenizer
    chat = opened.stage in ("full_sft", "rlhf") and not settings.raw
    prompts = []
    for text in settings.prompt:
        if chat:
            messages = [{"role": "system", "content": settings.system}] if settings.system else []
            messages.append({"role": "user", "content": text})
            prompts.append(encode_chat(tokenizer, messages, add_generation_prompt=True)[0])
        else:
            prompts.append(tokenizer.encode(text) or [tokenizer.end_of_text_id])
    limit = opened.model.config.max_position_embeddings
    longest = max(map(len, prompts))
    if longest + settings.max_new_tokens > limit:
        raise UserError(
            f"the prompt has {longest} tokens and {settings.max_new_tokens} new ones are asked for; "
            f"the model has {limit} positions: shorten the prompt or lower --max_new_tokens"
        )
    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        stop_ids=(tokenizer.end_of_text_id, tokenizer.end_of_turn_id),
        seed=settings.seed,
        steps=settings.steps,
        block_length=settings.block_length,
        order=settings.order,
        threshold=settings.threshold,
        remask=settings.remask,
    )
    written = saved_family(opened.family, tokenizer).generate(opened.model, prompts, sampling)
    return [tokenizer.decode(tokens) for tokens in written]


def run(settings: GenerateSettings) -> None:
    """Print the completions, nothing else, to standard output."""
    for text in complete(settings):
        sys.stdout.write(text + "\n")
