"""A student learns more from a teacher than from the data alone: same student, same rows, same steps.

    python benchmarks/proofs/distill.py --families ar diffusion sdd --seeds 3

The world is a Markov chain over 64 symbols whose truth is known, so a model's distance from the truth can be told: the
loss on held-out walks minus the chain's entropy, in nats a symbol. The teacher has seen fresh walks at every step. The
student has 96 rows and goes over them again and again: from the data alone it learns these rows by heart, while the
teacher's distributions say of every symbol what else could have followed. So that this is no matter of stopping in
time, the student without a teacher counts as it was at its best of eight looks. Passed: with the teacher, at the end,
at least MARGIN of that distance is gone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "src"))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from minillm.data.batches import Batch  # noqa: E402
from minillm.families.autoregressive import Autoregressive  # noqa: E402
from minillm.families.base import Family, SpecialIds  # noqa: E402
from minillm.families.diffusion import Diffusion  # noqa: E402
from minillm.families.sdd import SparseDistributionDiffusion  # noqa: E402
from minillm.families.settings import FamilyConfig  # noqa: E402
from minillm.methods.base import Method  # noqa: E402
from minillm.methods.distill import Distillation, ModelTeacher  # noqa: E402
from minillm.methods.likelihood import Likelihood  # noqa: E402
from minillm.models.config import ModelConfig  # noqa: E402
from minillm.models.divergence import Objective  # noqa: E402
from minillm.models.transformer import LanguageModel  # noqa: E402
from minillm.train.optim import clip_gradients, learning_rate  # noqa: E402

MARGIN = {"ar": 0.8, "diffusion": 0.4, "sdd": 0.4}  # of the distance that the student has without a teacher
SYMBOLS, LENGTH, FIRST = 64, 32, 3  # ids: padding, mask, start, then the symbols
IDS = SpecialIds(FIRST + SYMBOLS, 1, 0, (0, 1, 2))
CPU = torch.device("cpu")
ROWS = 32  # a step
STUDENT_ROWS = 96
STUDENT_STEPS = {"ar": 240, "diffusion": 1200, "sdd": 800}
FAMILIES = ("ar", "diffusion", "sdd")
TEACHER_STEPS = {"ar": 800, "diffusion": 1200, "sdd": 1200}


@dataclass(frozen=True)
class DistillationProof:
    """Learning from a teacher"""

    families: tuple[str, ...] = field(default=FAMILIES, metadata={"help": "which"})
    seeds: int = field(default=1, metadata={"help": "so many runs of each", "min": 1})


@lru_cache
def transitions() -> np.ndarray:
    """Probabilities [from, to] of the next symbol."""
    values = np.exp(2.2 * np.random.default_rng(5).standard_normal((SYMBOLS, SYMBOLS)))
    return values / values.sum(1, keepdims=True)


def walks(seed: int, rows: int) -> tuple[Batch, float]:
    """Rows of LENGTH symbols behind a first token, and the true -log p of a symbol, in nats."""
    rng, chain = np.random.default_rng(seed), transitions()
    symbols = np.empty((rows, LENGTH), dtype=np.int64)
    symbols[:, 0] = rng.integers(SYMBOLS, size=rows)
    for place in range(1, LENGTH):
        drawn = rng.random((rows, 1))
        symbols[:, place] = (chain[symbols[:, place - 1]].cumsum(1) < drawn).sum(1).clip(max=SYMBOLS - 1)
    cost = rows * np.log(SYMBOLS) - np.log(chain[symbols[:, :-1], symbols[:, 1:]]).sum()
    tokens = np.concatenate((np.full((rows, 1), FIRST - 1), symbols + FIRST), axis=1)
    mask = np.ones_like(tokens, dtype=bool)
    mask[:, 0] = False
    return Batch(tokens, mask, None, None, seed * 10_000 + np.arange(rows)), float(cost / symbols.size)


def family_of(architecture: str) -> Family:
    if architecture == "ar":
        return Autoregressive()
    config = FamilyConfig(architecture, k_schedule=(4,))
    return Diffusion(config, IDS) if architecture == "diffusion" else SparseDistributionDiffusion(config, IDS)


def model_of(family: Family, width: int, layers: int, seed: int) -> LanguageModel:
    model = LanguageModel(
        ModelConfig(
            IDS.vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            head_dim=width // 4, intermediate_size=2 * width, max_position_embeddings=64, causal=family.causal,
            denoiser=family.denoiser,
        )
    )  # fmt: skip
    model.init_weights(seed)
    return model


def train(
    method: Method, model: LanguageModel, steps: int, data: Batch | None, look: Callable[[], float] | None = None
) -> list[float]:
    """`steps` steps of ROWS rows: of `data` in turn, or fresh ones. What `look` sees, eight times on the way."""
    seen = []
    optimizer = torch.optim.AdamW(model.train().parameters(), weight_decay=0.0, betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total=steps, warmup=20, peak=4e-3, final_ratio=0.02)
        if data is None:
            batch = walks(step, ROWS)[0]
        else:
            chosen = (step * ROWS + np.arange(ROWS)) % len(data.tokens)
            batch = Batch(data.tokens[chosen], data.loss_mask[chosen], None, None, data.sample_ids[chosen])
        prepared = method.prepare(model, batch, CPU, step, step * ROWS)
        (method.loss(model, prepared.data).loss / prepared.count).backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if look is not None and (step + 1) % (steps // 8) == 0:
            model.eval()
            seen.append(look())
            model.train()
    model.eval()
    return seen


@torch.no_grad()
def excess(family: Family, model: LanguageModel) -> float:
    """Held-out loss above the truth, in nats a symbol (of a bound, where the family has one)."""
    gaps = []
    for index in range(8):
        batch, truth = walks(10**6 + index, 64)
        method = Likelihood(family, seed=0)
        prepared = method.prepare(model, batch, CPU, -1, 64 * index)
        value, count = method.loss(model, prepared.data).metrics["loss"]
        gaps.append(float(value) / count - truth)
    return float(np.mean(gaps))


@lru_cache(maxsize=1)
def teacher_of(architecture: str) -> tuple[Family, LanguageModel, float]:
    """A teacher that has seen fresh walks at every step, and its excess."""
    family = family_of(architecture)
    model = model_of(family, 64, 2, seed=1)
    train(Likelihood(family, seed=0), model, TEACHER_STEPS[architecture], None)
    return family, model, excess(family, model)


def prove(architecture: str, seed: int) -> dict[str, Any]:
    """Distances from the truth: of the teacher, and of the student without and with it."""
    family, teacher, distance = teacher_of(architecture)
    started = time.process_time()
    data, _ = walks(2 * 10**6 + seed, STUDENT_ROWS)
    arms: dict[str, Method] = {
        "alone": Likelihood(family, seed=seed),
        "distilled": Distillation(
            family, ModelTeacher(teacher, ""), objective=Objective("forward_kl"), ce_weight=0.0, seed=seed
        ),
    }
    found: dict[str, Any] = {"family": architecture, "seed": seed, "teacher": distance}
    for name, method in arms.items():
        student = model_of(family, 32, 2, seed=100 + seed)
        seen = train(method, student, STUDENT_STEPS[architecture], data, partial(excess, family, student))
        found[name], found[f"{name}_best"] = seen[-1], min(seen)
    return {**found, "seconds": time.process_time() - started}


def passed(result: dict[str, Any]) -> bool:
    return bool(result["distilled"] <= (1 - MARGIN[result["family"]]) * result["alone_best"])


def line(result: dict[str, Any]) -> str:
    gone = 100 * (1 - result["distilled"] / result["alone_best"])
    alone = f"alone {result['alone_best']:.3f} at its best, {result['alone']:.3f} at the end"
    taught = f"with a teacher {result['distilled']:.3f} ({gone:.0f} % less; the teacher {result['teacher']:.3f})"
    return (
        f"{result['family']:<10}seed {result['seed']}: nats from the truth: {alone}, {taught}, "
        f"{result['seconds']:.0f} s: {'passed' if passed(result) else 'FAILED'}"
    )


def run(settings: DistillationProof) -> list[dict[str, Any]]:
    """All proofs, one line each. The teacher of a family is shared."""
    results = []
    for architecture in settings.families:
        started = time.process_time()
        teacher_of(architecture)
        print(f"{architecture:<10}a teacher in {time.process_time() - started:.0f} s", flush=True)
        for seed in range(settings.seeds):
            results.append(prove(architecture, seed))
            print(line(results[-1]), flush=True)
    return results


if __name__ == "__main__":
    from minillm.config import parse

    (chosen,) = parse("distill.py", __doc__ or "", [DistillationProof], sys.argv[1:])
    sys.exit(0 if all(passed(result) for result in run(chosen)) else 1)
