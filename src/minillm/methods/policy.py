"""What the methods that learn from rewards share: ratios, the clipped loss, the pull to the reference, what is logged.

N completions of a rollout, B of a micro-batch, L length with the prompt, U units: what has a ratio of its own. Where
tokens have an order a unit is a token, and U the longest completion. Where they have none it is the whole completion,
U = 1: its log-probability is divided by its length (arXiv 2507.18071, equation 7), and it weighs as its tokens do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from minillm import processes
from minillm.families.base import Family, Noise, TokenBatch
from minillm.families.noise import noise_seeds
from minillm.methods.base import Method, Metrics, MicroLoss, Prepared
from minillm.methods.settings import PolicySettings
from minillm.models.transformer import LanguageModel

ROLLOUT_IDS = 1 << 20  # ids of the next rollout begin so much later
PIECE_TOKENS = {"cpu": 4096, "cuda": 1 << 16}  # read at once where no gradient is needed
KL_LIMIT = 10.0  # nats a token: so far from where it came from, a policy writes something else altogether
COLLAPSE = 0.01  # of the first entropy: what is left is one answer to each prompt


@dataclass(frozen=True)
class Written:
    """N completions and what they are worth; those of one prompt stand together."""

    prompts: list[list[int]]
    completions: list[list[int]]  # with the stop token, where one was written
    ids: np.ndarray  # int64 [N], in the run, one for all completions of a prompt; noise belongs to it
    log_probs: list[list[float]] | None  # of the completions' tokens, by whoever wrote them
    finished: np.ndarray  # bool [N]
    rewards: np.ndarray  # float32 [N], 0 where failed
    parts: dict[str, np.ndarray]  # float32 [N] of each reward function, NaN where it failed
    failed: np.ndarray  # bool [N]: could not be judged, so nothing is learned from it
    texts: list[tuple[str, str, str]]  # prompt, completion, right answer

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each completion: int64 [N]."""
        return np.array([len(tokens) for tokens in self.completions], dtype=np.int64)


class Writer(Protocol):
    """Writes and judges completions."""

    elsewhere: bool  # with weights, or arithmetic, that may be others than the policy's

    def update(self, model: LanguageModel) -> None:
        """From now on, write with these weights."""

    def write(
        self, model: LanguageModel, prompts: Any, *, count: int, seed: int | None,
        before: Sequence[Sequence[int]] = (),
    ) -> Written:  # fmt: skip
        """`count` completions of each prompt of a PromptBatch; seed None: always the most probable token. before: the
        prompts ahead of these that other processes write."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class ExperienceBatch:
    """B completions and what the method made of them when they were written."""

    prompts: list[list[int]]
    completions: list[list[int]]
    ids: np.ndarray  # int64 [B], in the run
    values: dict[str, np.ndarray]  # float32 [B, U]: advantages, and what else the loss needs
    log: dict[str, np.ndarray]  # float32 [B], for the trackers; NaN: nothing to say

    @property
    def sample_ids(self) -> np.ndarray:
        return self.ids


class Rows(NamedTuple):
    """Prompts with their completions on the device, and where the units are."""

    batch: TokenBatch  # loss_mask: the completions
    noise: Noise
    places: Tensor  # int64 [B, U]: the position that predicts each token of the completion
    mask: Tensor  # bool [B, U]
    weights: Tensor  # float32 [B, U]: the tokens that a unit stands for; 0 where there is none
    prompts: Tensor  # int64 [B]: their lengths


class Experience(NamedTuple):
    """A micro-batch as the loss takes it."""

    rows: Rows
    values: dict[str, Tensor]  # float32 [B, U]
    log: dict[str, np.ndarray]


def rows_of(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], ids: np.ndarray, family: Family,
    *, seed: int, device: torch.device,
) -> Rows:  # fmt: skip
    """Right-padded. Noise belongs to (seed, id): whoever scores a completion, the policy then and now or the reference,
    does so under the same noise, so a ratio begins at 1. The completions of a prompt share it too: what is alike in
    all of them has no gradient, as their advantages cancel."""
    longest = max(len(prompt) + len(written) for prompt, written in zip(prompts, completions))
    units = max(map(len, completions)) if family.ordered else 1
    tokens = np.zeros((len(ids), longest), np.int64)
    answers = np.zeros((len(ids), longest), np.bool_)
    segments = np.full((len(ids), longest), -1, np.int32)
    before = np.array([len(prompt) for prompt in prompts])
    lengths = np.array([len(written) for written in completions])
    for row, (prompt, written) in enumerate(zip(prompts, completions)):
        end = len(prompt) + len(written)
        tokens[row, :end] = [*prompt, *written]
        answers[row, len(prompt) : end] = True
        segments[row, :end] = 0
    place = np.arange(units)
    mask = place < (lengths if family.ordered else np.ones_like(lengths))[:, None]
    weights = mask.astype(np.float32) if family.ordered else lengths[:, None].astype(np.float32)

    def move(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    sample_ids = move(ids)
    batch = TokenBatch(move(tokens), move(answers), None, None if family.causal else move(segments), sample_ids)
    noise = Noise(noise_seeds(seed, sample_ids, -1), sample_ids, seed, -1)
    places = np.minimum(before[:, None] - 1 + place, longest - 1)
    return Rows(batch, noise, move(places), move(mask), move(weights), move(before))


def unit_log_probs(family: Family, model: LanguageModel, rows: Rows) -> Tensor:
    """Log-probability in nats of each unit, float32 [B, U]: of a token, or the mean over a completion's tokens."""
    score = family.score(model, rows.batch, rows.noise)
    if score.per_token is None:
        return (score.total / score.count.clamp(min=1))[:, None]
    return score.per_token.gather(1, rows.places) * rows.mask


def k3(log_ratio: Tensor) -> Tensor:
    """An estimate of KL(p || q) from samples of p, log_ratio = log q - log p: never negative, unbiased, of low variance
    (J. Schulman, Approximating KL divergence, 2020; arXiv 2402.03300, equation 4)."""
    return torch.expm1(log_ratio) - log_ratio


def policy_terms(
    new: Tensor, old: Tensor, advantages: Tensor, *, low: float, high: float, cispo: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss of each unit and whether it is clipped, [B, U] both; arguments are [B, U], log-probabilities in nats.

    -min(ratio A, clip(ratio, 1 - low, 1 + high) A) (arXiv 1707.06347, equation 7; high above low: 2503.14476,
    equation 10), or with `cispo` -min(ratio, 1 + high) A log p, where the ratio has no gradient (2506.13585,
    equation 4).
    """
    ratio = torch.exp(new - old)
    with torch.no_grad():
        clipped = ((ratio < 1.0 - low) & (advantages < 0)) | ((ratio > 1.0 + high) & (advantages > 0))
    if cispo:
        return -ratio.detach().clamp(max=1.0 + high) * advantages * new, (ratio > 1.0 + high).detach()
    bounded = ratio.clamp(1.0 - low, 1.0 + high)
    return -torch.minimum(ratio * advantages, bounded * advantages), clipped


def spread_over_units(per_row: np.ndarray, units: np.ndarray) -> np.ndarray:
    """[N] -> float32 [N, U], 0 where there is no unit; units: [N, U], not 0 where there is one."""
    return np.where(units != 0, per_row[:, None], 0.0).astype(np.float32)


class PolicyMethod(Method):
    """Learns from completions of its own and their rewards. A method of this kind says what each was worth
    (`credit`), and may choose the prompts and add to the loss."""

    counts = "completions"
    better = "reward"
    measured_at_once = 128  # written together

    def __init__(
        self, family: Family, writer: Writer, reference: LanguageModel | None, settings: PolicySettings, seed: int,
        *, count: int = 1,
    ) -> None:  # fmt: skip
        self.family, self.writer, self.reference = family, writer, reference
        self.settings, self.seed = settings, seed
        self.count = count  # completions of a prompt
        self.high = settings.epsilon_high or settings.epsilon
        self.steps_per_rollout = settings.steps_per_generation * settings.num_iterations
        self._samples: list[dict[str, Any]] = []
        self._first: dict[str, float] = {}  # entropy and reward as they were first logged

    # -- what a method of this kind says

    def credit(self, model: LanguageModel, written: Written, places: np.ndarray) -> Credit:
        """What each completion was worth, no gradients: places int64 [N] are those of the prompts in the pool."""
        raise NotImplementedError

    def choose(self, rollout: int, count: int, pool: int) -> np.ndarray:
        """The prompts of a rollout, as places in the pool: one after another, int64 [count]."""
        return rollout * count + np.arange(count)

    def beside(self, model: LanguageModel, data: Experience) -> tuple[Tensor | None, Metrics]:
        """What is lost besides the policy's own terms, [B, U], and its metrics."""
        return None, {}

    @property
    def needs_old(self) -> bool:
        """Are log-probabilities at the time of writing asked for? Not where a rollout makes one step, of the policy's
        own: then they are those of now."""
        return self.steps_per_rollout > 1 or self.writer.elsewhere

    # -- the loop's side

    def frozen(self) -> dict[str, LanguageModel]:
        return {"reference": self.reference} if self.reference is not None else {}

    def state(self) -> dict[str, Any]:
        return {"first": dict(self._first)}

    def restore(self, state: dict[str, Any]) -> None:
        self._first = dict(state["first"])

    def learn(self, model: LanguageModel, written: Written, rollout: int, places: np.ndarray) -> Credit:
        """Everything that is kept of a rollout besides its tokens."""
        credit = self.credit(model, written, places)
        if self.needs_old and "old" not in credit.values:
            credit.values["old"] = self.old_log_probs(model, written)
        rewards = np.where(written.failed, np.nan, written.rewards)
        spread = float(np.nanstd(rewards)) if not written.failed.all() else float("nan")
        log = {
            "reward": rewards,
            "reward_std": np.full(len(places), spread),
            "reward_failed": written.failed,
            "completion_length": written.lengths,
            "unfinished": ~written.finished,
            **{f"rewards/{name}": part for name, part in written.parts.items()},
            **credit.log,
        }  # fmt: skip
        every, first_step = self.settings.log_completions, rollout * self.steps_per_rollout
        if every and first_step % every < self.steps_per_rollout:
            self._samples = [
                {"prompt": prompt, "completion": text, "answer": answer, "reward": float(written.rewards[row]),
                 **{name: float(part[row]) for name, part in written.parts.items()},
                 "advantage": float(credit.values["advantages"][row].flat[0])}
                for row, (prompt, text, answer) in enumerate(written.texts[:8])
            ]  # fmt: skip
        return Credit(credit.values, {name: np.asarray(value, np.float32) for name, value in log.items()})

    def samples(self) -> list[dict[str, Any]]:
        rows, self._samples = self._samples, []
        return rows

    def prepare(
        self, model: LanguageModel, batch: ExperienceBatch, device: torch.device, step: int, first_slot: int
    ) -> Prepared:
        rows = rows_of(batch.prompts, batch.completions, batch.ids, self.family, seed=self.seed, device=device)
        units = rows.mask.shape[1]
        values = {name: torch.from_numpy(array[:, :units]).to(device) for name, array in batch.values.items()}
        lengths = [len(tokens) for tokens in batch.completions]
        count = {"grpo": len(lengths), "dr_grpo": len(lengths) * self.settings.max_completion_length}
        read = sum(lengths) + sum(map(len, batch.prompts))
        return Prepared(Experience(rows, values, batch.log), count.get(self.settings.loss_type, sum(lengths)), read)

    def loss(self, model: LanguageModel, data: Experience) -> MicroLoss:
        rows, values, settings = data.rows, data.values, self.settings
        new = unit_log_probs(self.family, model, rows)
        old = values.get("old", new.detach())
        terms, clipped = policy_terms(
            new, old, values["advantages"], low=settings.epsilon, high=self.high, cispo=settings.loss_type == "cispo"
        )
        weights, tokens = rows.weights, float(rows.weights.sum())
        metrics: Metrics = {
            "policy_loss": ((terms.detach() * weights).sum(), tokens),
            "entropy": (-(new.detach() * weights).sum(), tokens),
            "clip_ratio": ((clipped * weights).sum(), tokens),
            "approx_kl": ((k3(old - new.detach()) * weights).sum(), tokens),
        }
        if self.reference is not None:
            with torch.no_grad():
                reference = unit_log_probs(self.family, self.reference, rows)
            kl = k3(reference - new)
            metrics["kl"] = ((kl.detach() * weights).sum(), tokens)
            terms = terms + settings.beta * kl
        more, their_metrics = self.beside(model, data)
        if more is not None:
            terms = terms + more
        for name, value in data.log.items():
            said = ~np.isnan(value)
            metrics[name] = (torch.tensor(float(value[said].sum())), float(said.sum()))
        if settings.loss_type == "grpo":  # the mean of a completion's tokens, then of the completions
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1.0)
        return MicroLoss((terms * weights).sum(), {**metrics, **their_metrics})

    def before_measuring(self, model: LanguageModel) -> None:
        self.writer.update(model)

    def measure(self, model: LanguageModel, batch: Any, device: torch.device, first_slot: int) -> Metrics:
        """Rewards of the most probable completions of held-out prompts."""
        written = self.writer.write(model, batch, count=1, seed=None)
        rows = {"reward": np.where(written.failed, 0.0, written.rewards), "completion_length": written.lengths}
        rows |= {f"rewards/{name}": part for name, part in written.parts.items()}
        return {
            name: (torch.tensor(float(np.nansum(value))), float((~np.isnan(value)).sum()))
            for name, value in rows.items()
        }

    def alarm(self, means: dict[str, float]) -> str:
        """What is wrong and what to change, of the means of a logged line; "" where all is well."""
        entropy, reward = means.get("entropy"), means.get("reward")
        if entropy is None or reward is None:
            return ""
        kl = max(means.get("kl", 0.0), means.get("approx_kl", 0.0))
        if kl > KL_LIMIT:
            return (
                f"the policy is {kl:.3g} nats a token away from where it came from. Try a lower --learning_rate, a "
                "larger --beta, or fewer --num_iterations"
            )
        if not self._first:
            self._first = {"entropy": entropy, "reward": reward}
        if entropy < COLLAPSE * self._first["entropy"] and reward <= self._first["reward"]:
            return (
                f"the entropy fell from {self._first['entropy']:.3g} to {entropy:.3g} nats a token and the reward did "
                f"not rise ({self._first['reward']:.3g} -> {reward:.3g}): the policy writes one answer to each prompt "
                "and can learn no more. Try a lower --learning_rate, a larger --beta, or --epsilon_high 0.28"
            )
        return ""

    # -- for the methods

    def old_log_probs(self, model: LanguageModel, written: Written) -> np.ndarray:
        """Of each unit when it was written, float32 [N, U]: what the writer said, else what the model says now."""
        if self.family.ordered and written.log_probs is not None:
            return padded(written.log_probs)
        return self.in_pieces(model, written, lambda rows: unit_log_probs(self.family, model, rows))

    @torch.no_grad()
    def in_pieces(self, model: LanguageModel, written: Written, read: Callable[[Rows], Tensor]) -> np.ndarray:
        """`read` of all rows, some at a time, those of like length together: [B, U] each, float32 [N, U] in all."""
        device = model.head_weight.device
        lengths = np.array([len(p) + len(c) for p, c in zip(written.prompts, written.completions)])
        size = max(1, PIECE_TOKENS.get(device.type, PIECE_TOKENS["cpu"]) // int(lengths.max()))
        result = np.zeros((len(lengths), int(written.lengths.max()) if self.family.ordered else 1), np.float32)
        order = np.argsort(lengths, kind="stable")
        for start in range(processes.rank() * size, len(order), processes.size() * size):
            part = order[start : start + size]
            rows = rows_of(
                [written.prompts[i] for i in part], [written.completions[i] for i in part], written.ids[part],
                self.family, seed=self.seed, device=device,
            )  # fmt: skip
            values = read(rows).float().cpu().numpy()
            result[part, : values.shape[1]] = values
        return processes.summed(torch.from_numpy(result)).numpy()  # each has filled in what the others left at 0

    def units(self, written: Written) -> np.ndarray:
        """The tokens each unit stands for, 0 where there is none: float32 [N, U]."""
        lengths = written.lengths[:, None]
        if not self.family.ordered:
            return lengths.astype(np.float32)
        return (np.arange(int(lengths.max())) < lengths).astype(np.float32)


class Credit(NamedTuple):
    """What a method makes of a rollout."""

    values: dict[str, np.ndarray]  # float32 [N, U]: "advantages", and what else the loss needs
    log: dict[str, np.ndarray]  # [N]


def padded(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Rows of unlike length below each other, zeros behind them: float32 [N, U]."""
    result = np.zeros((len(rows), max(map(len, rows))), np.float32)
    for index, row in enumerate(rows):
        result[index, : len(row)] = row
    return result
