"""A GRPO step of ours against that of TRL's GRPOTrainer, on the same model, in one process.

    python benchmarks/rl.py

Both sides: the same weights (ours exported to transformers), the same prompts, the same number of completions, all of
one length (no end token is written), one update, the same arithmetic, AdamW, no reference model, the same reward. After
each step of theirs comes one of ours, so that what else happens on the machine happens to both. Ours is taken apart:
writing, rewards, forward and backward, optimizer, and what is left for Python.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from common import RESULTS, bar_line, machine, machine_line, main, median, preset_config, spread, table, write_results
from sessions import job_with

from minillm.config import parse
from minillm.log import info

BARS = {"ratio": 2.0, "model": 0.75, "python": 0.05}
RATE = 1e-6
TEXTS = (
    "Tom has seven apples and gives two of them to Anna. How many apples does he have now?",
    "A train leaves at nine and arrives at noon. How many hours does the journey take?",
    "Write the sum of twelve and thirty, then subtract five from the result. What is it?",
    "There are four rows of six chairs in the hall. How many chairs are there in the hall?",
)


@dataclass(frozen=True)
class RewardBenchmark:
    """A GRPO step, ours against TRL"""

    preset: str = field(default="small", metadata={"help": "size of the model"})
    prompts: int = field(default=8, metadata={"help": "prompts a step", "min": 1})
    completions: int = field(default=4, metadata={"help": "answers to a prompt", "min": 2})
    tokens: int = field(default=64, metadata={"help": "tokens of an answer", "min": 1})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "arithmetic of both sides; auto: what training here would take",
            "choices": ("auto", "float32", "bfloat16"),
        },
    )
    steps: int = field(default=5, metadata={"help": "steps of each side that count", "min": 1})
    warmup: int = field(default=1, metadata={"help": "steps of each side before", "min": 0})
    ours_only: bool = field(default=False, metadata={"help": "leave TRL out"})
    check: bool = field(default=False, metadata={"help": "exit with 1 where a bar is missed"})
    results: str = field(default=RESULTS, metadata={"help": "folder for JSON and Markdown"})


class Clock:
    """Adds up the seconds of named parts while it runs; a part within another counts for itself alone."""

    def __init__(self) -> None:
        self.running = False
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    def watch(self, name: str, owner: Any, attribute: str) -> None:
        """Measure this function of `owner` from now on."""
        original: Callable[..., Any] = getattr(owner, attribute)

        def measured(*arguments: Any, **named: Any) -> Any:
            if not self.running:
                return original(*arguments, **named)
            started = time.perf_counter()
            self._inside.append(0.0)
            try:
                return original(*arguments, **named)
            finally:
                spent = time.perf_counter() - started
                self.seconds[name] += spent - self._inside.pop()
                if self._inside:
                    self._inside[-1] += spent

        setattr(owner, attribute, measured)


class Ours:
    """Our model, method and experience, and `minillm.train.loop.take_step` on the parts of a job that it reads."""

    def __init__(self, settings: RewardBenchmark) -> None:
        import numpy as np
        import torch

        from minillm.data.feedback import PromptBatch
        from minillm.data.mixture import Mixture, Part
        from minillm.families.autoregressive import Autoregressive
        from minillm.methods.grpo import GroupRelative
        from minillm.methods.settings import GroupSettings, PolicySettings
        from minillm.models.allocator import keep_freed_memory
        from minillm.models.transformer import LanguageModel
        from minillm.rollout.engine import ModelEngine
        from minillm.rollout.rewards import RewardResult
        from minillm.text.tokenizer import Tokenizer
        from minillm.train.experience import Experience, Judged
        from minillm.train.job import micro_rows
        from minillm.train.optim import build_optimizers
        from minillm.train.settings import OptimSettings, RunSettings
        from minillm.train.state import TrainState

        keep_freed_memory()
        self.tokenizer = tokenizer = Tokenizer.load()
        texts = [TEXTS[row % len(TEXTS)] for row in range(settings.prompts)]
        asked = [tokenizer.encode(text) for text in texts]
        length = max(map(len, asked)) + settings.tokens

        class Prompts:
            bytes_per_token, row_size = 0.0, 1.0

            def __len__(self) -> int:
                return len(asked)

            def describe(self) -> str:
                return "prompts"

            def rows(self, indices: np.ndarray) -> PromptBatch:
                return PromptBatch([asked[row] for row in indices], [""] * len(indices), indices)

        class Rewards:
            def __call__(self, asked: Any, texts: Any, answers: Any, *, tokens: Any = None) -> RewardResult:
                values = np.array(reward(texts), np.float32)
                return RewardResult(values, {"signs": values}, np.zeros(len(values), bool))

            def close(self) -> None: ...

        self.model = LanguageModel(preset_config(settings.preset, seq=length))
        self.model.init_weights(0)
        flags = PolicySettings(max_completion_length=settings.tokens, log_completions=0)
        rows = settings.prompts * settings.completions
        dtype = getattr(torch, settings.dtype)
        family = Autoregressive()
        engine, rewards = ModelEngine(family, self.model, rows=rows, dtype=dtype), Rewards()
        writer = Judged(engine, cast(Any, rewards), tokenizer, flags)
        writer.sampling = writer.sampling.__class__(max_new_tokens=settings.tokens)  # no end token: all are written
        self.method = GroupRelative(family, writer, None, flags, 0, GroupSettings(num_generations=settings.completions))
        mixture = Mixture([Part("prompts", cast(Any, Prompts()))], seed=0, pad_id=0)
        optimizers = build_optimizers(self.model, OptimSettings(optimizer="adamw", learning_rate=RATE))
        device = torch.device("cpu")
        stage: Any = SimpleNamespace(model_rows=1)
        self.job: Any = job_with(
            state=TrainState(), family=family, model=self.model, method=self.method, optimizers=optimizers,
            average=None, scaler=torch.amp.GradScaler("cpu", enabled=False), device=device, dtype=dtype,
            rows_per_step=rows, own_rows=rows, micro_rows=micro_rows(RunSettings(), length, rows, device, stage),
            total_steps=10**6, warmup_steps=0, peak_lr=RATE, final_lr_ratio=1.0, grad_clip=1.0,
            train_data=Experience(mixture, self.method, self.model, rows_per_step=rows, seed=0),
        )  # fmt: skip
        self.clock = Clock()
        self.clock.watch("writing", engine, "generate")
        self.clock.watch("rewards", writer, "rewards")
        self.clock.watch("forward and backward", self.method, "loss")
        self.clock.watch("forward and backward", torch.Tensor, "backward")
        for optimizer in optimizers.optimizers:
            self.clock.watch("optimizer", optimizer, "step")

    def step(self) -> float:
        from minillm.train.loop import take_step

        started, self.clock.running = time.perf_counter(), True
        take_step(self.job)
        self.clock.running = False
        self.job.state.step += 1
        return time.perf_counter() - started


def reward(texts: Sequence[str]) -> list[float]:
    """How many different signs a text has."""
    return [len(set(text)) / 100.0 for text in texts]


def against_trl(ours: Ours, settings: RewardBenchmark, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds of our steps and of theirs, in turns."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from minillm.cli import main as minillm

    torch.save(ours.model.state_dict(), folder / "pretrain.pth")
    code = minillm(["export", "--checkpoint", str(folder / "pretrain.pth"), "--output", str(folder / "exported")])
    assert code == 0
    mine: list[float] = []
    theirs: list[float] = []

    class Turns(TrainerCallback):  # type: ignore[misc]
        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            theirs.append(time.perf_counter() - self.started)
            mine.append(ours.step())
            info(f"[benchmark] step {len(mine)}: ours {mine[-1]:.2f} s, TRL {theirs[-1]:.2f} s")

    rows = settings.prompts * settings.completions
    steps = settings.warmup + settings.steps
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=rows, num_generations=settings.completions,
        max_completion_length=settings.tokens, max_steps=steps, learning_rate=RATE, beta=0.0, temperature=1.0,
        use_cpu=True, bf16=settings.dtype == "bfloat16", gradient_checkpointing=False, report_to=[],
        save_strategy="no", logging_steps=10**6,
        generation_kwargs={"min_new_tokens": settings.tokens}, optim="adamw_torch_fused", disable_tqdm=True, seed=0,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": TEXTS[row % len(TEXTS)]} for row in range(settings.prompts * steps)])
    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32),
        reward_funcs=cast(Any, lambda completions, **_: reward(completions)), args=arguments, train_dataset=data,
        processing_class=tokenizer, callbacks=[Turns()],
    )  # fmt: skip
    trainer.train()
    return mine, theirs


def _resolved(dtype: str) -> str:
    import torch

    from minillm.train.precision import choose_dtype

    return str(choose_dtype(dtype, torch.device("cpu"))).removeprefix("torch.")


def run(argv: Sequence[str]) -> int:
    (settings,) = parse("benchmarks/rl.py", __doc__ or "", [RewardBenchmark], argv)
    settings = replace(settings, dtype=_resolved(settings.dtype))
    where = machine()
    ours = Ours(settings)
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        if settings.ours_only:
            mine = [ours.step() for _ in range(settings.warmup + settings.steps)]
        else:
            mine, theirs = against_trl(ours, settings, Path(folder))
    total = sum(mine)
    shares = {name: seconds / total for name, seconds in ours.clock.seconds.items()}
    shares["Python"] = 1.0 - sum(shares.values())
    mine, theirs = mine[settings.warmup :], theirs[settings.warmup :]
    lines, all_met = [], True
    ratios = [b / a for a, b in zip(mine, theirs)]
    checks = [("TRL's seconds / ours", median(ratios), BARS["ratio"], True)] if ratios else []
    checks.append(
        (
            "share of writing, forward and backward",
            shares["writing"] + shares["forward and backward"],
            BARS["model"],
            True,
        )
    )
    checks.append(("share of Python", shares["Python"], BARS["python"], False))
    for name, value, bar, at_least in checks:
        line, met = bar_line(name, value, bar, at_least=at_least)
        lines.append(line)
        all_met &= met
    rows = [["ours", spread(mine, 2)], *([["TRL", spread(theirs, 2)]] if theirs else [])]
    markdown = "\n\n".join(
        [
            "# A GRPO step, ours against TRL",
            machine_line(where),
            f"Preset {settings.preset}, {settings.prompts} prompts x {settings.completions} answers x "
            f"{settings.tokens} tokens, {settings.dtype}, {settings.steps} steps a side.",
            table(["side", "seconds a step: median (range)"], rows),
            table(["part of our step", "share"], [[name, f"{100 * share:.1f} %"] for name, share in shares.items()]),
            "\n".join(f"- {line}" for line in lines),
        ]
    )
    data = {"machine": where, "ours": mine, "trl": theirs, "shares": shares}
    write_results(settings.results, "rl", data, markdown)
    return 0 if all_met or not settings.check else 1


if __name__ == "__main__":
    main(run)
