"""Experience in the shape of data: whoever takes a batch may set off a rollout, and the loop does not know.

A rollout is steps_per_generation optimizer steps of completions, each gone over num_iterations times, in another order
every time. A slot is a completion in one of these passes. N completions of a rollout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from minillm import processes
from minillm.data.feedback import PromptBatch
from minillm.data.mixture import Mixture
from minillm.families.base import Sampling
from minillm.methods.policy import ROLLOUT_IDS, Credit, ExperienceBatch, PolicyMethod, Written
from minillm.methods.settings import GroupSettings, PolicySettings
from minillm.models.transformer import LanguageModel
from minillm.rollout.base import Engine
from minillm.rollout.rewards import RewardFunctions
from minillm.text.tokenizer import Tokenizer
from minillm.train import parallel
from minillm.train.settings import Settings

BLOCK = 32  # where tokens have no order: written one after another, as chat and generate do
STAGES_WITH_GROUPS = ("grpo",)


def completions_of_a_prompt(stage: str, settings: Settings) -> int:
    """How many completions a prompt gets in this stage."""
    return settings.of(GroupSettings).num_generations if stage in STAGES_WITH_GROUPS else 1


class Judged:
    """Completions by an engine, judged by reward functions: a `methods.policy.Writer`."""

    def __init__(
        self,
        engine: Engine,
        rewards: RewardFunctions,
        tokenizer: Tokenizer,
        settings: PolicySettings,
        *,
        elsewhere: bool = False,
    ) -> None:
        self.engine, self.rewards, self.tokenizer, self.elsewhere = engine, rewards, tokenizer, elsewhere
        self.sampling = Sampling(
            max_new_tokens=settings.max_completion_length,
            temperature=settings.temperature,
            stop_ids=(tokenizer.end_of_text_id, tokenizer.end_of_turn_id),
            steps=settings.denoising_steps,
            block_length=BLOCK,
        )

    def update(self, model: LanguageModel) -> None:
        """From now on, write with these weights. A server gets them once, whatever the number of processes."""
        if self.elsewhere:
            processes.main_only(lambda: self.engine.update(model))
        else:
            self.engine.update(model)

    def write(
        self, model: LanguageModel, prompts: PromptBatch, *, count: int, seed: int | None,
        before: Sequence[Sequence[int]] = (),
    ) -> Written:  # fmt: skip
        greedy = {"temperature": 0.0, "seed": 0}
        sampling = replace(self.sampling, **(greedy if seed is None else {"seed": seed}))
        earlier = {"before": before} if before else {}
        groups = self.engine.generate(prompts.prompts, count=count, sampling=sampling, **earlier)
        written = [completion for group in groups for completion in group]
        tokens = [each.tokens for each in written]
        asked = [self.tokenizer.decode(prompt) for prompt in prompts.prompts for _ in range(count)]
        texts = [self.tokenizer.decode(each) for each in tokens]
        answers = [answer for answer in prompts.answers for _ in range(count)]
        prompt_tokens = [prompt for prompt in prompts.prompts for _ in range(count)]
        judged = self.rewards(asked, texts, answers, tokens=(prompt_tokens, tokens))
        log_probs = [each.log_probs for each in written]
        return Written(
            prompts=prompt_tokens,
            completions=tokens,
            ids=np.arange(len(tokens)),
            log_probs=None if any(each is None for each in log_probs) else log_probs,  # type: ignore[arg-type]
            finished=np.array([each.finished for each in written]),
            rewards=judged.total,
            parts=judged.parts,
            failed=judged.failed,
            texts=list(zip(asked, texts, answers)),
        )

    def close(self) -> None:
        self.rewards.close()


class Experience:
    """Completions and what they were worth, in the order of a run: a `data.order.Feed`.

    The rollout under way is part of a checkpoint, as it was written by weights that are gone.
    """

    def __init__(
        self, prompts: Mixture, method: PolicyMethod, model: LanguageModel, *, rows_per_step: int, seed: int
    ) -> None:
        settings = method.settings
        self.prompts, self.method, self.model, self.seed = prompts, method, model, seed
        self.step_rows, self.passes = rows_per_step, settings.num_iterations
        self.rows = rows_per_step * settings.steps_per_generation  # completions of a rollout
        self.epoch_rows = prompts.epoch_rows * method.count * self.passes
        self.bytes_per_token = 0.0
        self.number = -1  # of the rollout at hand
        self.batch: ExperienceBatch | None = None  # all of it
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def take(self, slot: int, count: int) -> ExperienceBatch:
        """Completions of these slots, all of one step. The first of a rollout makes the model write it."""
        rollout, place = divmod(slot, self.rows * self.passes)
        if rollout != self.number:
            self._roll_out(rollout)
        assert self.batch is not None
        number, inside = divmod(place, self.rows)
        rows = self._order_of(rollout * self.passes + number)[inside : inside + count]
        return _chosen(self.batch, rows)

    def _roll_out(self, rollout: int) -> None:
        method = self.method
        places = method.choose(rollout, self.rows // method.count, self.prompts.epoch_rows)
        training = self.model.training
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for model in (self.model, *method.trained().values()):
                stack.enter_context(parallel.whole(model))
            method.writer.update(self.model)
            written = self._written(self._prompts(places), _seed(self.seed, rollout))
            written = replace(written, ids=rollout * ROLLOUT_IDS + np.arange(self.rows) // method.count)
            credit = method.learn(self.model, written, rollout, np.repeat(places, method.count))
        self.model.train(training)
        self.number, self.batch = rollout, _kept(written, credit)

    def _written(self, prompts: PromptBatch, seed: int) -> Written:
        """Completions of these prompts. Several processes write those of as many prompts each, and tell each other."""
        count = self.method.count
        if processes.size() == 1:
            return self.method.writer.write(self.model, prompts, count=count, seed=seed)
        share = len(prompts.prompts) // processes.size()
        first = processes.rank() * share
        own = PromptBatch(*(part[first : first + share] for part in vars(prompts).values()))
        before = prompts.prompts[:first]
        return _joined(
            processes.gathered(self.method.writer.write(self.model, own, count=count, seed=seed, before=before))
        )

    def _prompts(self, places: np.ndarray) -> PromptBatch:
        """The prompts that stand at these places of the order of all."""
        if (np.diff(places) == 1).all():
            return self.prompts.take(int(places[0]), len(places))
        parts = [self.prompts.take(int(place), 1) for place in places]
        return PromptBatch(
            [prompt for part in parts for prompt in part.prompts],
            [answer for part in parts for answer in part.answers],
            np.concatenate([part.sample_ids for part in parts]),
        )

    def _order_of(self, number: int) -> np.ndarray:
        """The completions of a pass, int64 [N]: shuffled among its steps, and within a step by length, so that rows
        which are read together need little padding."""
        if self._order[0] != number:
            assert self.batch is not None
            lengths = np.array([len(p) + len(c) for p, c in zip(self.batch.prompts, self.batch.completions)])
            order = np.arange(self.rows)
            if self.rows > self.step_rows:
                bits = np.random.PCG64(np.random.SeedSequence([self.seed % 2**64, number, 1])).random_raw(self.rows)
                order = np.argsort(bits, kind="stable")
            steps = [part[np.argsort(lengths[part], kind="stable")] for part in order.reshape(-1, self.step_rows)]
            self._order = (number, np.concatenate(steps))
        return self._order[1]

    def epoch(self, slot: int) -> float:
        return slot / self.epoch_rows

    def describe(self) -> str:
        return self.prompts.describe()

    def state(self) -> dict[str, Any]:
        """The rollout under way, as tensors and plain containers."""
        if self.batch is None:
            return {}
        batch = self.batch
        return {
            "number": self.number, "prompts": batch.prompts, "completions": batch.completions,
            "ids": torch.from_numpy(batch.ids),
            "values": {name: torch.from_numpy(array) for name, array in batch.values.items()},
            "log": {name: torch.from_numpy(array) for name, array in batch.log.items()},
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave. A rollout of another size is left behind, and the next one is written."""
        if not state or len(state["prompts"]) != self.rows:
            return
        self.number = int(state["number"])
        values, log = ({name: each.numpy() for name, each in state[key].items()} for key in ("values", "log"))
        self.batch = ExperienceBatch(state["prompts"], state["completions"], state["ids"].numpy(), values, log)

    def close(self) -> None:
        self.method.writer.close()
        self.prompts.close()


def _joined(parts: Sequence[Written]) -> Written:
    """What several processes have written, in the order of their ranks."""

    def joined(name: str) -> list[Any]:
        return [each for part in parts for each in getattr(part, name)]

    said = all(part.log_probs is not None for part in parts)
    return Written(
        prompts=joined("prompts"), completions=joined("completions"), ids=np.arange(len(joined("completions"))),
        log_probs=joined("log_probs") if said else None,
        parts={name: np.concatenate([part.parts[name] for part in parts]) for name in parts[0].parts},
        texts=joined("texts"),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in ("finished", "rewards", "failed")},
    )  # fmt: skip


def _kept(written: Written, credit: Credit) -> ExperienceBatch:
    return ExperienceBatch(written.prompts, written.completions, written.ids, credit.values, credit.log)


def _chosen(batch: ExperienceBatch, rows: np.ndarray) -> ExperienceBatch:
    return ExperienceBatch(
        [batch.prompts[row] for row in rows],
        [batch.completions[row] for row in rows],
        batch.ids[rows],
        {name: array[rows] for name, array in batch.values.items()},
        {name: array[rows] for name, array in batch.log.items()},
    )


def _seed(seed: int, rollout: int) -> int:
    """Of the engine, another for every rollout."""
    return int(np.random.SeedSequence([seed % 2**64, rollout, 2]).generate_state(1, np.uint64)[0] >> np.uint64(2))
