"""White-box distillation: the student learns the teacher's distribution over the next (or hidden) token, on the same
view of the same rows. The divergences are in models/divergence.py.

One view serves both models, so nothing here asks which family it is. It is made by the student: where a family's view
holds beliefs (SDD), they are the student's own, since those are what the student will read when it writes. The
weights of the view are those of both losses.

With a share of the rows the student writes the answers itself, and learns from what the teacher says about them
(generalised knowledge distillation, arXiv 2306.13649); there is no cross-entropy there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from minillm.families.base import Family, Noise, TokenBatch, View
from minillm.families.noise import uniform
from minillm.methods.base import Method, Metrics, MicroLoss, Prepared, real_tokens
from minillm.methods.likelihood import reported, with_router_loss
from minillm.models.divergence import Distilled, Objective, States, TopK, distillation_loss
from minillm.models.transformer import LanguageModel

OWN = 8  # the stream of a row's random numbers that says whether the student writes its answers

# (student, rows with the answers of the data, their noise) -> the same rows with answers of the student
Writer = Callable[[LanguageModel, TokenBatch, Noise], TokenBatch]


class Part(NamedTuple):
    """Rows of a micro-batch that are treated alike."""

    view: View
    sample_ids: Tensor  # int64 [B]
    evaluating: bool
    own: bool  # the student wrote the answers


class Teacher(Protocol):
    """What is asked: its distributions at the N positions of a view that weigh, row after row."""

    sha256: str  # of what it is read from

    def about(self, part: Part) -> States | TopK: ...


class ModelTeacher:
    """A model of ours, frozen."""

    def __init__(self, model: LanguageModel, sha256: str) -> None:
        self.model, self.sha256 = model.requires_grad_(False).eval(), sha256

    @torch.no_grad()
    def about(self, part: Part) -> States:
        return States(part.view.through(self.model).hidden[part.view.weights != 0], self.model.head_weight)


class Distillation(Method):
    name = "distillation"
    counts = "tokens of a teacher"

    def __init__(
        self,
        family: Family,
        teacher: Teacher,
        *,
        objective: Objective,
        ce_weight: float,
        seed: int,
        own_share: float = 0.0,
        write: Writer | None = None,
    ) -> None:
        self.family, self.teacher, self.objective = family, teacher, objective
        self.ce_weight, self.seed, self.own_share, self.write = ce_weight, seed, own_share, write

    def borrowed(self) -> dict[str, str]:
        return {"teacher": self.teacher.sha256}

    def prepare(self, model: LanguageModel, batch: Any, device: torch.device, step: int, first_slot: int) -> Prepared:
        rows = TokenBatch.from_numpy(batch, device)
        noise = Noise.of(self.seed, rows, step, first_slot)
        own = torch.zeros(len(rows.tokens), dtype=torch.bool, device=device)
        if self.write is not None and step >= 0:
            own = uniform(noise.seeds, OWN, 1).squeeze(1) < self.own_share
        parts, tokens = [], 0
        for written in (False, True):
            chosen = own == written
            if not bool(chosen.any()):
                continue
            some, its_noise = _some(rows, noise, chosen)
            if written and self.write is not None:
                some = self.write(model, some, its_noise)
            view = self.family.view(model, some, its_noise)
            parts.append(Part(view, some.sample_ids, step < 0, written))
            tokens += real_tokens(some)
        return Prepared(parts, sum(part.view.count for part in parts), tokens)

    def loss(self, model: LanguageModel, data: list[Part]) -> MicroLoss:
        total: Tensor | None = None
        metrics: Metrics = {}
        for part in data:
            loss, found = self._part(model, part)
            total = loss if total is None else total + loss
            for name, (value, count) in found.items():
                before, counted = metrics.get(name, (0.0, 0.0))
                metrics[name] = (before + value, counted + count)
        assert total is not None
        return MicroLoss(total, metrics)

    def _part(self, model: LanguageModel, part: Part) -> tuple[Tensor, Metrics]:
        view = part.view
        output = view.through(model)
        share = torch.full((1, 1), 0.0 if part.own else self.ce_weight, device=view.weights.device)
        summed = distillation_loss(
            output.hidden, model.head_weight, self.teacher.about(part), view.targets, view.weights, share,
            self.objective,
        )  # fmt: skip
        loss, router = with_router_loss(summed.loss, output, model, view.count)
        return loss, {**_metrics(part, summed, share), **router}


def _metrics(part: Part, summed: Distilled, share: Tensor) -> Metrics:
    """As in likelihood training, what follows an end is trained but no part of what is reported."""
    view, count = part.view, float(part.view.count)
    told = reported(view, summed.cross_entropy, summed.hits)
    shown = view.weights != 0 if view.extra is None else (view.weights != 0) & ~view.extra
    divergence = (summed.divergence * shown).sum()
    whole = ((share * summed.cross_entropy + (1.0 - share) * summed.divergence) * shown).sum()
    agreement = ((summed.agreements & shown).sum(), float(shown.sum()))
    if part.own:
        rows = float(len(view.targets))
        return {
            "loss": (whole, count), "on_policy/divergence": (divergence, count), "on_policy/agreement": agreement,
            "on_policy/length": (torch.tensor(count), rows),
        }  # fmt: skip
    cross_entropy = told.pop("loss")
    return {**told, "loss": (whole, count), "cross_entropy": cross_entropy, "divergence": (divergence, count),
            "agreement": agreement}  # fmt: skip


def _some(rows: TokenBatch, noise: Noise, chosen: Tensor) -> tuple[TokenBatch, Noise]:
    """The chosen rows (bool [B]) and their noise."""
    if bool(chosen.all()):
        return rows, noise
    some = TokenBatch(*(None if each is None else each[chosen] for each in rows))  # type: ignore[arg-type]
    return some, noise._replace(seeds=noise.seeds[chosen], slots=noise.slots[chosen])
