"""PPO, GRPO and SPO teach a tiny model two-digit sums, of which it was shown many wrong more often than right.

    python benchmarks/proofs/rewards.py --cells ar:ppo ar:grpo ar:spo diffusion:grpo sdd:grpo --seeds 3

A tiny model is fine-tuned, from nothing, on sums of which six in ten are answered by a careless pupil, who always
carries one to the tens: asked for its most probable answer where there is nothing to carry, it writes the careless one.
Then it learns from rewards alone: 1 for the right number, else 0. Held-out sums are neither among the fine-tuned ones
nor among the prompts. Measured: the share of held-out sums that are right, greedily written, before and after.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "src"))

from minillm.methods.settings import (  # noqa: E402
    CriticSettings,
    GroupSettings,
    PolicySettings,
    TrackerSettings,
)

BARS = {"ar": 0.25, "diffusion": 0.15, "sdd": 0.15}  # how much the share must rise
PAD, MASK, IGNORE, START, END, PLUS, ASKED, ZERO = range(8)
LENGTH, ANSWER = 11, 4  # tokens: START 2 7 + 3 8 = 5 6 0 END
CARELESS, HELD_OUT = 0.6, 5  # share of the answers; one sum of so many
CELLS = ("ar:ppo", "ar:grpo", "ar:spo", "diffusion:grpo", "sdd:grpo")
TUNING_STEPS = {"ar": 500, "diffusion": 600, "sdd": 600}
STEPS = {"ar": 80, "diffusion": 60, "sdd": 120}
PROMPTS, GROUP, RATE = 64, 4, 5e-4


@dataclass(frozen=True)
class RewardProof:
    """Learning from rewards, from a tiny fine-tuned model"""

    cells: tuple[str, ...] = field(default=CELLS, metadata={"help": "family:method"})
    seeds: int = field(default=1, metadata={"help": "so many runs of each", "min": 1})


def held_out(first: int, second: int) -> bool:
    return ((first * 100 + second) * 2654435761 >> 16) % HELD_OUT == 0  # no rule of the digits


@lru_cache
def sums(*, of_held_out: bool) -> list[tuple[int, int]]:
    numbers = range(10, 100)
    return [(a, b) for a in numbers for b in numbers if held_out(a, b) == of_held_out]


def careless(first: int, second: int) -> int:
    """The sum with a carry from the units, whether there is one or not."""
    return first + second + (0 if first % 10 + second % 10 >= 10 else 10)


def digits(number: int) -> list[int]:
    return [ZERO + int(digit) for digit in str(number)]


def answer(number: int) -> list[int]:
    """Three digits, units first, as one adds by hand."""
    return [*reversed(digits(number)), *[ZERO] * (3 - len(str(number))), END]


def prompt(first: int, second: int) -> list[int]:
    return [START, *digits(first), PLUS, *digits(second), ASKED]


class Digits:
    """As much of a tokenizer as completions and rewards ask for."""

    end_of_text_id = end_of_turn_id = END

    def decode(self, tokens: Sequence[int]) -> str:
        """A prompt as it stands; an answer turned round, so that it is a number."""
        signs = {PLUS: "+", ASKED: "=", **{ZERO + digit: str(digit) for digit in range(10)}}
        text = "".join(signs.get(token, "") for token in tokens)
        return text if "=" in text else text[::-1]


class Sums:
    """Prompts with their answers, as the data of a run."""

    bytes_per_token, row_size = 0.0, 1.0

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def describe(self) -> str:
        return f"{len(self):,} sums"

    def rows(self, indices: Any) -> Any:
        from minillm.data.feedback import PromptBatch

        chosen = [self.pairs[index] for index in indices]
        return PromptBatch([prompt(a, b) for a, b in chosen], [str(a + b) for a, b in chosen], indices)


def tuning_batch(seed: int, step: int, rows: int) -> Any:
    """Sums with their answers, six of ten by the careless pupil."""
    import numpy as np

    from minillm.data.batches import Batch

    random = np.random.default_rng([seed, step])
    pairs = sums(of_held_out=False)
    tokens, mask = np.zeros((rows, LENGTH), np.int64), np.zeros((rows, LENGTH), bool)
    for row, index in enumerate(random.integers(0, len(pairs), rows)):
        first, second = pairs[index]
        result = careless(first, second) if random.random() < CARELESS else first + second
        tokens[row], mask[row, -ANSWER:] = [*prompt(first, second), *answer(result)], True
    return Batch(tokens, mask, None, None, np.arange(step * rows, (step + 1) * rows))


def family_of(name: str) -> Any:
    from minillm.families.autoregressive import Autoregressive
    from minillm.families.base import SpecialIds
    from minillm.families.diffusion import Diffusion
    from minillm.families.sdd import SparseDistributionDiffusion
    from minillm.families.settings import FamilyConfig

    kinds = {"ar": Autoregressive, "diffusion": Diffusion, "sdd": SparseDistributionDiffusion}
    return kinds[name](FamilyConfig(name, k_schedule=(4,)), SpecialIds(ZERO + 10, MASK, IGNORE, (PAD, MASK, START)))


def fine_tuned(name: str, seed: int, steps: int) -> Any:
    """A model that adds, and is careless six times of ten."""
    import torch

    from minillm.methods.likelihood import Likelihood
    from minillm.models.config import ModelConfig
    from minillm.models.transformer import LanguageModel
    from minillm.train.optim import build_optimizers, clip_gradients, learning_rate
    from minillm.train.settings import OptimSettings

    family = family_of(name)
    model = LanguageModel(
        ModelConfig(
            ZERO + 10, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            intermediate_size=192, max_position_embeddings=64, causal=family.causal, denoiser=family.denoiser,
        )
    )  # fmt: skip
    model.init_weights(seed)
    settings = OptimSettings(optimizer="muon", learning_rate=4e-3, weight_decay=0.0)
    optimizers, method = build_optimizers(model.train(), settings), Likelihood(family, seed)
    for step in range(steps):
        optimizers.set_lr(learning_rate(step, total=steps, warmup=20, peak=4e-3, final_ratio=0.05))
        prepared = method.prepare(model, tuning_batch(seed, step, 64), torch.device("cpu"), step, step * 64)
        (method.loss(model, prepared.data).loss / prepared.count).backward()
        clip_gradients(model.parameters(), 1.0)
        for optimizer in optimizers.optimizers:
            optimizer.step()
        optimizers.zero_grad()
    return model.eval()


def method_of(kind: str, family: Any, model: Any, seed: int) -> Any:
    """The method with the engine, the rewards and the critic of a run."""
    from minillm.methods.grpo import GroupRelative
    from minillm.methods.ppo import ProximalPolicy
    from minillm.methods.spo import SingleStream
    from minillm.models.transformer import LanguageModel
    from minillm.models.value import add_value_head
    from minillm.rollout.engine import ModelEngine
    from minillm.rollout.rewards import RewardFunctions
    from minillm.train.experience import Judged

    flags = PolicySettings(reward=("number",), max_completion_length=ANSWER, log_completions=0)
    tokenizer: Any = Digits()
    if kind == "ppo":
        flags = replace(flags, num_iterations=2)
    writer = Judged(ModelEngine(family, model, rows=256), RewardFunctions(flags.reward, tokenizer), tokenizer, flags)
    common = {"family": family, "writer": writer, "reference": None, "settings": flags, "seed": seed}
    if kind == "grpo":
        return GroupRelative(**common, group=GroupSettings(num_generations=GROUP))
    if kind == "spo":
        return SingleStream(**common, flags=TrackerSettings())
    critic = LanguageModel(model.config)
    critic.load_state_dict(model.state_dict())
    return ProximalPolicy(**common, critic=add_value_head(critic), flags=CriticSettings())


def right(method: Any, model: Any, pairs: list[tuple[int, int]]) -> float:
    """The share of sums whose greedily written answer is right."""
    import numpy as np

    batch = Sums(pairs).rows(np.arange(len(pairs)))
    return float(method.writer.write(model, batch, count=1, seed=None).rewards.mean())


def learned(method: Any, model: Any, seed: int, steps: int, *, watch: bool = False) -> None:
    """Learn from rewards, in place."""
    import torch

    from minillm.data.mixture import Mixture, Part
    from minillm.train.experience import Experience
    from minillm.train.optim import build_optimizers, clip_gradients, learning_rate
    from minillm.train.settings import OptimSettings

    rows = PROMPTS * GROUP  # completions a step, whatever the method
    prompts = Mixture([Part("sums", Sums(sums(of_held_out=False)))], seed=seed, pad_id=PAD)  # type: ignore[arg-type]
    experience = Experience(prompts, method, model, rows_per_step=rows, seed=seed)
    settings = OptimSettings(optimizer="adamw", learning_rate=RATE, weight_decay=0.0)
    optimizers = build_optimizers(model, settings, method.trained(), method.learning_rates())
    for step in range(steps):
        optimizers.set_lr(learning_rate(step, total=steps, warmup=5, peak=RATE, final_ratio=0.1))
        batch = experience.take(step * rows, rows)
        prepared = method.prepare(model, batch, torch.device("cpu"), step, step * rows)
        loss, metrics = method.loss(model, prepared.data)
        (loss / prepared.count).backward()
        for module in (model, *method.trained().values()):
            clip_gradients(module.parameters(), 1.0)
        for optimizer in optimizers.optimizers:
            optimizer.step()
        optimizers.zero_grad()
        if watch and (step % 10 == 9 or step == 0):
            means = {key: round(float(total) / count, 4) for key, (total, count) in metrics.items() if count}
            print(f"  step {step + 1}: {means}", flush=True)


def prove(cell: str, start: Any, seed: int, *, steps: int = 0, watch: bool = False) -> dict[str, Any]:
    """One method from `start`; the share of held-out sums that are right before and after."""
    from minillm.models.transformer import LanguageModel

    name, kind = cell.split(":")
    started, busy = time.perf_counter(), time.process_time()
    model = LanguageModel(start.config)
    model.load_state_dict(start.state_dict())
    method = method_of(kind, family_of(name), model, seed)
    tested = sums(of_held_out=True)[::4]
    before = right(method, model, tested)
    learned(method, model, seed, steps or STEPS[name], watch=watch)
    after = right(method, model, tested)
    method.writer.close()
    return {
        "cell": cell, "seed": seed, "before": before, "after": after, "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - busy,
    }  # fmt: skip


def passed(result: dict[str, Any]) -> bool:
    return bool(result["after"] - result["before"] >= BARS[result["cell"].split(":")[0]])


def line(result: dict[str, Any]) -> str:
    before, after = 100 * result["before"], 100 * result["after"]
    return (
        f"{result['cell']:<16} seed {result['seed']}: {before:.1f} % right -> {after:.1f} % "
        f"({after - before:+.1f} points), {result['seconds']:.0f} s (processor {result['cpu_seconds']:.0f} s): "
        f"{'passed' if passed(result) else 'FAILED'}"
    )


def run(settings: RewardProof) -> list[dict[str, Any]]:
    """All proofs, one line each. The fine-tuned model of a family and seed is shared."""
    results = []
    for seed in range(settings.seeds):
        starts: dict[str, Any] = {}
        for cell in settings.cells:
            name = cell.split(":")[0]
            if name not in starts:
                started, busy = time.perf_counter(), time.process_time()
                starts[name] = fine_tuned(name, seed, TUNING_STEPS[name])
                took, computed = time.perf_counter() - started, time.process_time() - busy
                print(f"{name:<16} seed {seed}: fine-tuned in {took:.0f} s (processor {computed:.0f} s)", flush=True)
            results.append(prove(cell, starts[name], seed))
            print(line(results[-1]), flush=True)
    return results


if __name__ == "__main__":
    from minillm.config import parse

    (chosen,) = parse("rewards.py", __doc__ or "", [RewardProof], sys.argv[1:])
    sys.exit(0 if all(passed(result) for result in run(chosen)) else 1)
