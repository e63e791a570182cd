"""Rollouts: the engine's continuous batching beside the family's own `generate`, and what is spent outside the model.

    python benchmarks/rollouts.py

A model with random weights writes completions of random prompts, once all of the same length and once with ends that
come at random. The engine reads a prompt once for its group and fills a row again when its completion has ended;
`generate` is asked for each group, and for as many completions at once as the engine has rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from common import RESULTS, machine, machine_line, main, median, preset_config, spread, table, write_results

from minillm.config import parse


@dataclass(frozen=True)
class RolloutBenchmark:
    """The engine of rollouts"""

    preset: str = field(default="small", metadata={"help": "size of the model"})
    prompts: int = field(default=8, metadata={"help": "prompts of a call", "min": 1})
    completions: int = field(default=4, metadata={"help": "completions of each", "min": 1})
    prompt_tokens: int = field(default=64, metadata={"help": "tokens of a prompt", "min": 1})
    new_tokens: int = field(default=64, metadata={"help": "tokens of a completion, at most", "min": 2})
    rows: int = field(default=16, metadata={"help": "completions written at once", "min": 1})
    rounds: int = field(default=3, metadata={"help": "timed rounds of each, which take turns", "min": 1})
    results: str = field(default=RESULTS, metadata={"help": "folder for JSON and Markdown"})


def measure(flags: RolloutBenchmark) -> dict[str, Any]:
    """Seconds of each way in every round, for even and uneven lengths, and the shares of the engine's time."""
    import torch

    from minillm.families.autoregressive import Autoregressive
    from minillm.families.base import Sampling
    from minillm.models.transformer import LanguageModel
    from minillm.rollout.engine import ModelEngine

    model = LanguageModel(preset_config(flags.preset, seq=flags.prompt_tokens + flags.new_tokens))
    model.init_weights(0)
    model.eval()
    family = Autoregressive()
    engine = ModelEngine(family, model, rows=flags.rows)
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (flags.prompts, flags.prompt_tokens), generator=generator).tolist()
    flat = [prompt for prompt in prompts for _ in range(flags.completions)]

    def by_group(sampling: Sampling) -> None:
        for prompt in prompts:
            family.generate(model, [prompt] * flags.completions, sampling)

    def by_wave(sampling: Sampling) -> None:
        for start in range(0, len(flat), flags.rows):
            family.generate(model, flat[start : start + flags.rows], sampling)

    ways: dict[str, Callable[[Sampling], object]] = {
        "engine": lambda sampling: engine.generate(prompts, count=flags.completions, sampling=sampling),
        "generate, a group at a time": by_group,
        "generate, as many rows": by_wave,
    }
    # random weights choose almost evenly, so a text ends after new_tokens / 3 tokens on average
    stops = tuple(range(3 * vocabulary // flags.new_tokens))
    even = Sampling(max_new_tokens=flags.new_tokens, seed=1)
    for way in ways.values():
        way(replace(even, max_new_tokens=2))
    seconds: dict[str, dict[str, list[float]]] = {}
    for lengths, sampling in (("even", even), ("uneven", replace(even, stop_ids=stops))):
        seconds[lengths] = {name: [] for name in ways}
        for _ in range(flags.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                way(sampling)
                seconds[lengths][name].append(time.perf_counter() - started)
    return {"seconds": seconds, "shares": shares_of_time(engine, prompts, flags.completions, even)}


def shares_of_time(engine: Any, prompts: Sequence[Sequence[int]], count: int, sampling: Any) -> dict[str, float]:
    """Shares of one call of a ModelEngine: in the model, in the head and the choice of tokens, and the rest."""
    from minillm.rollout import engine as module

    spent = {"model": 0.0, "choice": 0.0}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent[name] += time.perf_counter() - started

        return call

    choose, forward = module._Batch._choose, engine.model.forward
    module._Batch._choose = timed("choice", choose)  # type: ignore[method-assign]
    engine.model.forward = timed("model", forward)
    try:
        started = time.perf_counter()
        engine.generate(prompts, count=count, sampling=sampling)
        whole = time.perf_counter() - started
    finally:
        module._Batch._choose = choose  # type: ignore[method-assign]
        engine.model.forward = forward
    shares = {name: part / whole for name, part in spent.items()}
    return {**shares, "rest": 1.0 - sum(shares.values())}


def run(arguments: Sequence[str]) -> int:
    (flags,) = parse("benchmarks/rollouts.py", RolloutBenchmark.__doc__ or "", [RolloutBenchmark], arguments)
    facts = machine()
    found = measure(flags)
    rows = []
    for lengths, ways in found["seconds"].items():
        base = median(ways["engine"])
        for name, seconds in ways.items():
            rows.append((lengths, name, spread(seconds, 2), f"{median(seconds) / base:.2f}"))
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in found["shares"].items())
    page = (
        f"# Rollouts\n\n{machine_line(facts)}\n\nPreset {flags.preset}, {flags.prompts} prompts of "
        f"{flags.prompt_tokens} tokens, {flags.completions} completions of each, at most {flags.new_tokens} tokens; "
        f"{flags.rows} rows. Medians (least-most) of {flags.rounds} rounds.\n\n"
        + table(("lengths", "way", "seconds", "times the engine's"), rows)
        + f"\n\nThe engine's time: {shares}."
    )
    write_results(flags.results, "rollouts", {"machine": facts, "flags": asdict(flags), **found}, page)
    return 0


if __name__ == "__main__":
    main(run)
