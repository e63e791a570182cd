"""minillm generate: a prompt in, a completion out. What it shares with other commands that write comes first."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minillm.log import UserError

if TYPE_CHECKING:
    from minillm.checkpoint.model import OpenedCheckpoint
    from minillm.families.base import Family, Sampling


@dataclass(frozen=True, kw_only=True)
class WriteSettings:
    """The checkpoint that writes, and how"""

    checkpoint: str = field(metadata={"help": "full checkpoint (.pt) or flat weights (.pth)"})
    adapter: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "LoRA adapters to merge into it: folders of ours or of peft, mixed by weight as in a:0.7 b:0.3 "
            "(default weight 1)"
        },
    )
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
    system: str = field(default="", metadata={"help": "system message of the chat"})
    seed: int = field(default=0, metadata={"help": "the same seed writes the same text", "min": 0})
    tokenizer: str = field(default="", metadata={"help": "tokenizer.json or its folder (default: the checkpoint's)"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, mps"})


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(WriteSettings):
    """Write with a checkpoint"""

    prompt: tuple[str, ...] = field(metadata={"help": "one prompt or several, written together in one batch"})
    raw: bool = field(default=False, metadata={"help": "no chat template, also for fine-tuned checkpoints"})


@dataclass(frozen=True)
class Engine:
    """A checkpoint that is ready to write."""

    opened: OpenedCheckpoint
    family: Family
    sampling: Sampling
    system: str

    @classmethod
    def open(cls, settings: WriteSettings) -> Engine:
        """Raises UserError where open_checkpoint does, and for flags that contradict each other."""
        if settings.threshold and settings.remask:
            raise UserError("--threshold reveals what is sure and --remask thinks it over again: give one of them")
        from minillm.checkpoint.model import open_checkpoint
        from minillm.families import saved_family
        from minillm.families.base import Sampling
        from minillm.models.allocator import keep_freed_memory

        keep_freed_memory()
        opened = open_checkpoint(
            settings.checkpoint, tokenizer=settings.tokenizer, adapters=settings.adapter, device=settings.device
        )
        tokenizer = opened.tokenizer
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
        return cls(opened, saved_family(opened.family, tokenizer), sampling, settings.system)

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation as token ids, with the system message before it and the header of an answer after it."""
        from minillm.text.chat import encode_chat

        system = [{"role": "system", "content": self.system}] if self.system else []
        return encode_chat(self.opened.tokenizer, [*system, *messages], add_generation_prompt=True)[0]

    @property
    def room(self) -> int:
        """The longest prompt in tokens: what the new tokens leave of the model's positions. It may be negative."""
        return self.opened.model.config.max_position_embeddings - self.sampling.max_new_tokens

    def check_length(self, tokens: int) -> None:
        """UserError for a prompt that does not fit the model's positions."""
        if tokens > self.room:
            raise UserError(
                f"the prompt has {tokens} tokens and {self.sampling.max_new_tokens} new ones are asked for; "
                f"the model has {self.opened.model.config.max_position_embeddings} positions: "
                "shorten the prompt or lower --max_new_tokens"
            )


def complete(settings: GenerateSettings) -> list[str]:
    """The completions of all prompts. Fine-tuned checkpoints get the prompt as a user's turn.

    Raises:
        UserError: a prompt does not fit the model's positions.
    """
    engine = Engine.open(settings)
    opened, tokenizer = engine.opened, engine.opened.tokenizer
    if opened.speaks_in_turns and not settings.raw:
        prompts = [engine.chat_prompt([{"role": "user", "content": text}]) for text in settings.prompt]
    else:
        texts = ([*tokenizer.begin_ids, *tokenizer.encode(text)] for text in settings.prompt)
        prompts = [tokens or [tokenizer.end_of_text_id] for tokens in texts]
    engine.check_length(max(map(len, prompts)))
    written = engine.family.generate(opened.model, prompts, engine.sampling)
    return [tokenizer.decode(tokens) for tokens in written]


def run(settings: GenerateSettings) -> None:
    """Print the completions, nothing else, to standard output."""
    for text in complete(settings):
        sys.stdout.write(text + "\n")
