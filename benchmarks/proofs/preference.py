"""Every preference loss learns what is preferred, on prompts it has not seen, and keeps what is preferred likely.

    python benchmarks/proofs/preference.py --families ar diffusion sdd --seeds 3

A prompt is three to six different symbols. A tiny model is fine-tuned, from nothing, to answer with them in order: half
of the answers rise, half fall. Then rising is preferred. Held-out prompts are no training prompts. KTO gets one answer
of each prompt, with its label; the reward model starts from the same fine-tuned model.

Measured on held-out pairs: how often the preferred answer has the higher reward (the loss's own: against the
reference, or a mean token's log-probability), and how much log-probability a token of the preferred answer lost. The
fine-tuned model itself finds either answer more likely about as often. Seconds are those of one core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "src"))

from minillm.methods.settings import PREFERENCE_LOSSES, PreferenceSettings  # noqa: E402

ACCURACY_BAR, LOST_BAR = 0.9, 0.1  # share of held-out pairs; nats a token
PAD, MASK, IGNORE, START, END, ASKED, FIRST = range(7)
SYMBOLS, LENGTH = 16, 16
FAMILIES, METHODS = ("ar", "diffusion", "sdd"), (*PREFERENCE_LOSSES, "reward")
TUNING_STEPS = {"ar": 600, "diffusion": 3000, "sdd": 3000}
ROWS, RATE = 32, 1e-4  # of preference learning
STEPS = {"ar": 80, "diffusion": 80, "sdd": 60}
MORE_STEPS = {"orpo": 160}  # its preference counts a tenth beside the likelihood


@dataclass(frozen=True)
class PreferenceProof:
    """Preference losses and the reward model, from a tiny fine-tuned model"""

    families: tuple[str, ...] = field(default=FAMILIES, metadata={"help": "of the models"})
    methods: tuple[str, ...] = field(default=METHODS, metadata={"help": "losses, and the reward model"})
    seeds: int = field(default=1, metadata={"help": "so many runs of each", "min": 1})


def prompts(seed: int, count: int, *, held_out: bool) -> list[list[int]]:
    """Three to six different symbols each; a prompt is held out or not by its sum of squares."""
    import numpy as np

    random = np.random.default_rng(seed)
    found: list[list[int]] = []
    while len(found) < count:
        symbols = random.choice(SYMBOLS, size=int(random.integers(3, 7)), replace=False).tolist()
        if (sum(symbol * symbol for symbol in sorted(symbols)) % 5 == 0) == held_out:
            found.append([FIRST + symbol for symbol in symbols])
    return found


def batch(asked: list[list[int]], rising: list[bool], first_id: int) -> Any:
    """Prompts with their answers in this order, as the data's own batch."""
    import numpy as np

    from minillm.data.batches import Batch

    tokens, mask = np.full((len(asked), LENGTH), PAD, np.int64), np.zeros((len(asked), LENGTH), bool)
    for row, (symbols, rises) in enumerate(zip(asked, rising, strict=True)):
        text = [START, *symbols, ASKED, *sorted(symbols, reverse=not rises), END]
        tokens[row, : len(text)] = text
        mask[row, len(symbols) + 2 : len(text)] = True
    segments = np.where(tokens != PAD, 0, -1).astype(np.int32)
    return Batch(tokens, mask, None, segments, np.arange(first_id, first_id + len(asked)))


def pairs(asked: list[list[int]], first_id: int) -> Any:
    from minillm.data.batches import PairBatch

    return PairBatch(batch(asked, [True] * len(asked), first_id), batch(asked, [False] * len(asked), first_id))


def labelled(asked: list[list[int]], first_id: int) -> Any:
    """Every other answer rises; mismatched ones answer the next prompt."""
    import numpy as np

    from minillm.data.batches import Batch
    from minillm.data.feedback import LabelBatch

    rising = [(first_id + row) % 2 == 0 for row in range(len(asked))]
    own, tokens, mask = batch(asked, rising, first_id), [], []
    for row in range(len(asked)):
        other = (row + 1) % len(asked)
        prompt = own.tokens[row][: len(asked[row]) + 2]
        answer = own.tokens[other][own.loss_mask[other]]
        text = np.concatenate((prompt, answer))
        tokens.append(np.pad(text, (0, LENGTH - len(text)), constant_values=PAD))
        mask.append((np.arange(LENGTH) >= len(prompt)) & (np.arange(LENGTH) < len(text)))
    stacked = np.stack(tokens)
    segments = np.where(stacked != PAD, 0, -1).astype(np.int32)
    return LabelBatch(own, np.array(rising), Batch(stacked, np.stack(mask), None, segments, own.sample_ids))


def family_of(name: str) -> Any:
    from minillm.families.autoregressive import Autoregressive
    from minillm.families.base import SpecialIds
    from minillm.families.diffusion import Diffusion
    from minillm.families.sdd import SparseDistributionDiffusion
    from minillm.families.settings import FamilyConfig

    kinds = {"ar": Autoregressive, "diffusion": Diffusion, "sdd": SparseDistributionDiffusion}
    ids = SpecialIds(FIRST + SYMBOLS, MASK, IGNORE, (PAD, MASK, START))
    return kinds[name](FamilyConfig(name, k_schedule=(4,)), ids)


def optimise(model: Any, method: Any, batch_at: Callable[[int], Any], *, steps: int, rows: int, peak: float) -> None:
    """`steps` steps of `rows` rows; batch_at(slot) gives the rows from there on."""
    import torch

    from minillm.train.optim import build_optimizers, clip_gradients, learning_rate
    from minillm.train.settings import OptimSettings

    settings = OptimSettings(optimizer="adamw", learning_rate=peak, weight_decay=0.0)
    optimizers = build_optimizers(model.train(), settings)
    for step in range(steps):
        optimizers.set_lr(learning_rate(step, total=steps, warmup=20, peak=peak, final_ratio=0.0))
        prepared = method.prepare(model, batch_at(step * rows), torch.device("cpu"), step, step * rows)
        (method.loss(model, prepared.data).loss / prepared.count).backward()
        clip_gradients(model.parameters(), 1.0)
        for optimizer in optimizers.optimizers:
            optimizer.step()
        optimizers.zero_grad()
    model.eval()


def tuned(name: str, seed: int) -> Any:
    """A model that answers in rising or falling order, either as often."""
    from minillm.methods.likelihood import Likelihood
    from minillm.models.config import ModelConfig
    from minillm.models.transformer import LanguageModel

    family = family_of(name)
    model = LanguageModel(
        ModelConfig(
            FIRST + SYMBOLS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, intermediate_size=128, max_position_embeddings=64, causal=family.causal,
            denoiser=family.denoiser,
        )
    )  # fmt: skip
    model.init_weights(seed)

    asked = prompts(1000 + seed, 4096, held_out=False)

    def rows(slot: int) -> Any:
        # Over and over the same prompts, with rising and falling answers in turn.
        first = slot % len(asked)
        rising = [(row + slot // len(asked)) % 2 == 0 for row in range(64)]
        return batch(asked[first : first + 64], rising, slot)

    optimise(model, Likelihood(family, seed), rows, steps=TUNING_STEPS[name], rows=64, peak=4e-3)
    return model


def copied(model: Any) -> Any:
    from minillm.models.transformer import LanguageModel

    copy = LanguageModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def measured(method: Any, model: Any, asked: list[list[int]]) -> dict[str, float]:
    """Means of the method's metrics over held-out pairs."""
    import torch

    with torch.no_grad():
        prepared = method.prepare(model, pairs(asked, 10**6), torch.device("cpu"), -1, 0)
        metrics = method.loss(model, prepared.data).metrics
    return {name: float(total) / count for name, (total, count) in metrics.items()}


def indifferent(name: str, start: Any) -> float:
    """The share of held-out pairs in which the fine-tuned model finds the answer more likely that will be preferred."""
    from minillm.methods.dpo import DirectPreference

    judge = DirectPreference(family_of(name), None, PreferenceSettings(loss="simpo"), seed=0)
    return measured(judge, start, prompts(7, 256, held_out=True))["rewards/accuracies"]


def prove(name: str, kind: str, start: Any, seed: int) -> dict[str, Any]:
    """Train one method from `start`; what was measured before and after."""
    from minillm.methods.dpo import DirectPreference
    from minillm.methods.kto import KahnemanTversky
    from minillm.methods.reward import RewardModelling
    from minillm.models.value import add_value_head

    family, model, held_out = family_of(name), copied(start), prompts(7, 256, held_out=True)
    judge: Any
    if kind == "reward":
        method: Any = RewardModelling(center=0.01)
        judge = method
        add_value_head(model)
    else:
        flags = PreferenceSettings(loss=kind)
        method_of = KahnemanTversky if kind == "kto" else DirectPreference
        method = method_of(family, start if flags.needs_reference else None, flags, seed=seed)
        # KTO's reward is DPO's: both are measured on pairs.
        judge = DirectPreference(family, start, PreferenceSettings(), seed=seed) if kind == "kto" else method
    before = measured(judge, model, held_out)
    make = labelled if kind == "kto" else pairs
    train = prompts(500 + seed, 1024, held_out=False)

    def rows(slot: int) -> Any:
        first = slot % len(train)
        return make(train[first : first + ROWS], first)

    started = time.process_time()
    optimise(model, method, rows, steps=MORE_STEPS.get(kind, STEPS[name]), rows=ROWS, peak=RATE)
    after = measured(judge, model, held_out)
    return {
        "family": name, "method": kind, "seed": seed, "seconds": time.process_time() - started,
        "accuracy": after["rewards/accuracies"],
        "chosen_before": before.get("logps/chosen_per_token"), "chosen_after": after.get("logps/chosen_per_token"),
    }  # fmt: skip


def passed(result: dict[str, Any]) -> bool:
    """More than nine pairs of ten the right way round, and a token of the preferred answer no more than 0.1 nats less
    likely."""
    kept = result["chosen_before"] is None or result["chosen_after"] >= result["chosen_before"] - LOST_BAR
    return bool(result["accuracy"] > ACCURACY_BAR and kept)


def line(result: dict[str, Any]) -> str:
    before, after = result["chosen_before"], result["chosen_after"]
    likely = "" if before is None else f", chosen {before:+.3f} -> {after:+.3f} nats a token"
    return (
        f"{result['family']:<10}{result['method']:<8} seed {result['seed']}: accuracy {100 * result['accuracy']:.1f} %"
        f"{likely}, {result['seconds']:.0f} s: {'passed' if passed(result) else 'FAILED'}"
    )


def run(settings: PreferenceProof) -> list[dict[str, Any]]:
    """All proofs, one line each. The fine-tuned model of a family and seed is shared."""
    results = []
    for name in settings.families:
        for seed in range(settings.seeds):
            started = time.process_time()
            start = tuned(name, seed)
            seconds, before = time.process_time() - started, indifferent(name, start)
            print(f"{name:<10}fine-tuned in {seconds:.0f} s: accuracy {100 * before:.1f} %", flush=True)
            for kind in settings.methods:
                results.append(prove(name, kind, start, seed))
                print(line(results[-1]), flush=True)
    return results


if __name__ == "__main__":
    from minillm.config import parse

    (chosen,) = parse("preference.py", __doc__ or "", [PreferenceProof], sys.argv[1:])
    sys.exit(0 if all(passed(result) for result in run(chosen)) else 1)
