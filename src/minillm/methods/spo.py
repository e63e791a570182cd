"""Single-stream policy optimization (arXiv 2509.13232): one completion a prompt, against what is remembered of it.

Other papers share the acronym (segment and simple policy optimization); this is neither. N completions, P prompts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from minillm.families.base import Family
from minillm.methods.policy import Credit, PolicyMethod, Writer, Written, spread_over_units, unit_log_probs
from minillm.methods.settings import PolicySettings, TrackerSettings
from minillm.models.transformer import LanguageModel

FLOOR = 0.05  # epsilon of the paper: even a prompt that always succeeds comes again


class Kept(NamedTuple):
    """The last completion of a prompt: from it follows how far the policy has moved since."""

    prompt: list[int]
    completion: list[int]
    log_probs: np.ndarray  # float32 [U] when it was written
    id: int  # in the run, for the noise


class Tracker:
    """What each of P prompts is expected to yield: the mean of a Beta(a, b) for rewards from 0 to 1.

    A new reward r makes it a' = rho a + r, b' = rho b + (1 - r) (section 3.1). Kept are the mean v = a / (a + b) and
    the count n = a + b, for which that is n' = rho n + 1, v' = v + (r - v) / n': the same, and right for any rewards.
    A prompt never seen begins, with the weight of one observation, at the mean of those that were.
    """

    def __init__(self, prompts: int) -> None:
        self.mean = np.zeros(prompts)
        self.count = np.zeros(prompts)  # 0: never seen

    def expected(self, places: np.ndarray, unseen: float = 0.0) -> np.ndarray:
        """v of these prompts, float64 [N]; `unseen`: where no prompt was seen yet."""
        seen = self.count > 0
        prior = float(self.mean[seen].mean()) if seen.any() else unseen
        return np.where(seen[places], self.mean[places], prior)

    def update(self, places: np.ndarray, rewards: np.ndarray, rho: np.ndarray, before: np.ndarray) -> None:
        """Take in rewards [N], with the old evidence weighed by rho [N]; before [N]: `expected` of these."""
        for place, reward, share, start in zip(places.tolist(), rewards, rho, before):
            if not self.count[place]:
                self.mean[place], self.count[place] = start, 1.0
            self.count[place] = share * self.count[place] + 1.0
            self.mean[place] += (reward - self.mean[place]) / self.count[place]

    def priorities(self) -> np.ndarray:
        """How much is to be learned from each prompt: sqrt(v (1 - v)) + 0.05 (section 3.3), float64 [P]."""
        v = self.expected(np.arange(len(self.mean)), unseen=0.5).clip(0.0, 1.0)
        return np.sqrt(v * (1.0 - v)) + FLOOR


def draw_without_replacement(weights: np.ndarray, count: int, *, seed: int, rollout: int) -> np.ndarray:
    """`count` places of [P], more probable by weight, none twice before all came once; a function of its arguments.
    The largest of log weight + Gumbel noise are such a draw (arXiv 1903.06059)."""
    drawn: list[np.ndarray] = []
    while count > 0:
        bits = np.random.PCG64(np.random.SeedSequence([seed % 2**64, rollout, len(drawn), 509])).random_raw(
            len(weights)
        )
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
        keys = np.log(weights) - np.log(-np.log(uniform))
        drawn.append(np.argsort(-keys, kind="stable")[:count])
        count -= len(drawn[-1])
    return np.concatenate(drawn)


class SingleStream(PolicyMethod):
    name = "spo"

    def __init__(
        self, family: Family, writer: Writer, reference: LanguageModel | None, settings: PolicySettings, seed: int,
        flags: TrackerSettings,
    ) -> None:  # fmt: skip
        super().__init__(family, writer, reference, settings, seed)
        self.flags = flags
        self.tracker = Tracker(0)
        self.kept: dict[int, Kept] = {}

    @property
    def needs_old(self) -> bool:
        return True  # how far the policy moves is measured from them

    def choose(self, rollout: int, count: int, pool: int) -> np.ndarray:
        if len(self.tracker.mean) != pool:
            self.tracker = Tracker(pool)
        if self.flags.uniform_prompts:
            return super().choose(rollout, count, pool) % pool
        return draw_without_replacement(self.tracker.priorities(), count, seed=self.seed, rollout=rollout)

    def credit(self, model: LanguageModel, written: Written, places: np.ndarray) -> Credit:
        judged = ~written.failed
        rewards = written.rewards.astype(np.float64)
        average = float(rewards[judged].mean()) if judged.any() else 0.0
        baseline = self.tracker.expected(places, unseen=average)
        above = np.where(judged, rewards - baseline, 0.0)
        spread = float(above[judged].std()) if judged.any() else 0.0
        middle = float(above[judged].mean()) if judged.any() else 0.0
        advantages = np.where(judged, (above - middle) / (spread + 1e-8), 0.0)
        rho = self._forgetting(model, places)
        self.tracker.update(places[judged], rewards[judged], rho[judged], baseline[judged])
        old = self.old_log_probs(model, written)
        for row, place in enumerate(places.tolist()):
            own = old[row, : len(written.completions[row]) if self.family.ordered else 1]
            self.kept[place] = Kept(written.prompts[row], written.completions[row], own, int(written.ids[row]))
        values = {"advantages": spread_over_units(advantages, self.units(written)), "old": old}
        return Credit(values, {"rho": rho, "baseline": baseline})

    def _forgetting(self, model: LanguageModel, places: np.ndarray) -> np.ndarray:
        """rho = 2^(-D / D_half), within its limits (section 3.1), float64 [N]. D is the KL, in nats a token, of the
        policy that wrote a prompt's last completion to that of now, estimated on that completion; without one, 0."""
        distance = np.zeros(len(places))
        rows = [row for row, place in enumerate(places.tolist()) if place in self.kept]
        kept = [self.kept[int(places[row])] for row in rows]
        if kept:
            now = self.in_pieces(model, _as_written(kept), lambda each: unit_log_probs(self.family, model, each))
            for row, each, values in zip(rows, kept, now):
                change = values[: len(each.log_probs)].astype(np.float64) - each.log_probs
                distance[row] = float((np.expm1(change) - change).mean())
        rho = 2.0 ** (-distance / self.flags.d_half)
        return rho.clip(self.flags.rho_min, self.flags.rho_max)

    def state(self) -> dict[str, Any]:
        """The tracker and the completions that were kept, as tensors."""
        places = list(self.kept)
        kept = [self.kept[place] for place in places]
        numbers = [[place, len(k.prompt), len(k.completion), len(k.log_probs), k.id]
                   for place, k in zip(places, kept)]  # fmt: skip
        tokens = [token for each in kept for token in (*each.prompt, *each.completion)]
        return {
            **super().state(),
            "mean": torch.from_numpy(self.tracker.mean.copy()),
            "count": torch.from_numpy(self.tracker.count.copy()),
            "numbers": torch.tensor(numbers, dtype=torch.int64).view(-1, 5),
            "tokens": torch.tensor(tokens, dtype=torch.int32),
            "log_probs": torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *(k.log_probs for k in kept)])),
        }

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.tracker = Tracker(len(state["mean"]))
        self.tracker.mean, self.tracker.count = state["mean"].numpy().copy(), state["count"].numpy().copy()
        tokens, log_probs = state["tokens"].tolist(), state["log_probs"].numpy()
        self.kept, token, unit = {}, 0, 0
        for place, prompt, completion, units, completion_id in state["numbers"].tolist():
            middle, end = token + prompt, token + prompt + completion
            own = log_probs[unit : unit + units].copy()
            self.kept[place] = Kept(tokens[token:middle], tokens[middle:end], own, completion_id)
            token, unit = end, unit + units


def _as_written(kept: list[Kept]) -> Written:
    """Enough of a rollout to score its tokens again."""
    none = np.zeros(len(kept), np.float32)
    ids = np.array([each.id for each in kept], dtype=np.int64)
    return Written(
        [each.prompt for each in kept],
        [each.completion for each in kept],
        ids,
        None,
        none != 0,
        none,
        {},
        none != 0,
        [],
    )
