"""Every method learns what it is meant to: all proofs of benchmarks/proofs, one table.

    python benchmarks/learning.py --seeds 3

Preference losses and the reward model, PPO, GRPO and SPO from rewards, distillation, and LoRA beside full fine-tuning,
for the families that have a cell in the proof. What each proof does is said at the beginning of its file.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slower on several cores
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from common import RESULTS, machine, machine_line, main, table, write_results  # noqa: E402
from proofs import distill, lora, preference, rewards  # noqa: E402

from minillm.config import UsageError, parse  # noqa: E402


@dataclass(frozen=True)
class LearningBenchmark:
    """All proofs that methods learn"""

    proofs: tuple[str, ...] = field(
        default=("lora", "preference", "rewards", "distill"),
        metadata={"help": "which of them"},
    )
    seeds: int = field(default=1, metadata={"help": "so many runs of each cell", "min": 1})
    results: str = field(default=RESULTS, metadata={"help": "folder for JSON and Markdown"})


def between(results: Sequence[dict[str, Any]], key: str, form: str = "{:.3f}", factor: float = 1.0) -> str:
    """`least to most` over the seeds."""
    shown = [form.format(factor * result[key]) for result in sorted(results, key=lambda result: result[key])]
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def _lora(results: Sequence[dict[str, Any]]) -> str:
    more = [{"more": 100 * (result["lora"] / result["full"] - 1)} for result in results]
    share = 100 * results[0]["share"]
    return f"loss {between(more, 'more', '{:+.1f} %')} of full fine-tuning's, {share:.1f} % of the parameters"


def _preference(results: Sequence[dict[str, Any]]) -> str:
    right = f"{between(results, 'accuracy', '{:.1f} %', 100)} of held-out pairs"
    if results[0]["chosen_before"] is None:
        return right
    gained = [{"gained": result["chosen_after"] - result["chosen_before"]} for result in results]
    return f"{right}; preferred answers {between(gained, 'gained', '{:+.2f}')} nats a token"


def _rewards(results: Sequence[dict[str, Any]]) -> str:
    before, after = (between(results, key, "{:.1f} %", 100) for key in ("before", "after"))
    return f"right answers {before} before, {after} after"


def _distill(results: Sequence[dict[str, Any]]) -> str:
    alone, taught = between(results, "alone_best"), between(results, "distilled")
    return f"{taught} nats from the truth, {alone} without a teacher (which is at {results[0]['teacher']:.3f})"


class Proof(NamedTuple):
    module: Any
    settings: Callable[..., Any]
    cell: Callable[[dict[str, Any]], str]
    told: Callable[[Sequence[dict[str, Any]]], str]


PROOFS = {
    "lora": Proof(lora, lora.LoraProof, lambda _: "ar", _lora),
    "preference": Proof(
        preference, preference.PreferenceProof, lambda found: f"{found['family']}:{found['method']}", _preference
    ),
    "rewards": Proof(rewards, rewards.RewardProof, lambda found: found["cell"], _rewards),
    "distill": Proof(distill, distill.DistillationProof, lambda found: found["family"], _distill),
}


def run(argv: Sequence[str]) -> int:
    (settings,) = parse("benchmarks/learning.py", __doc__ or "", [LearningBenchmark], argv)
    unknown = [name for name in settings.proofs if name not in PROOFS]
    if unknown:
        raise UsageError(f"--proofs: {unknown[0]!r} is not one of {', '.join(PROOFS)}")
    where, rows, everything, failed = machine(), [], {}, 0
    for name in settings.proofs:
        proof = PROOFS[name]
        started = time.perf_counter()
        print(f"== {name}", flush=True)
        results = proof.module.run(proof.settings(seeds=settings.seeds))
        everything[name] = {"results": results, "seconds": time.perf_counter() - started}
        for cell in dict.fromkeys(map(proof.cell, results)):
            own = [result for result in results if proof.cell(result) == cell]
            passed = sum(map(proof.module.passed, own))
            failed += len(own) - passed
            rows.append((name, cell, f"{passed} of {len(own)}", proof.told(own), between(own, "seconds", "{:.0f}")))
    shown = table(("proof", "cell", "passed", "measured, over the seeds", "seconds"), rows)
    write_results(
        settings.results, "learning", {"machine": where, "proofs": everything}, f"{machine_line(where)}\n\n{shown}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    main(run)
