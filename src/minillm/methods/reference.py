"""What methods share that compare the policy with a frozen reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm.families.base import Family
from minillm.methods.base import Method
from minillm.methods.settings import PreferenceSettings
from minillm.models.transformer import LanguageModel


class ReferenceScores(NamedTuple):
    """What the reference said of N rows, two log-probabilities each: asked once, looked up afterwards."""

    ids: np.ndarray  # int64 [N], sample ids in ascending order
    values: Tensor  # float32 [N, 2]

    def of(self, sample_ids: np.ndarray) -> Tensor:
        """float32 [B, 2] of the rows with these ids [B]. Raises KeyError for one that was not asked about."""
        places = np.searchsorted(self.ids, sample_ids).clip(max=len(self.ids) - 1)
        if not np.array_equal(self.ids[places], sample_ids):
            raise KeyError(f"the reference was not asked about some of the rows {sample_ids.tolist()}")
        return self.values[torch.from_numpy(places)]


class WithReference(Method):
    """A policy, and the model it begins as. The reference is None where the loss needs none, and where everything it
    has to say is in `precomputed` (training rows, validation rows)."""

    def __init__(
        self, family: Family, reference: LanguageModel | None, flags: PreferenceSettings, *, seed: int
    ) -> None:
        self.family, self.reference, self.flags, self.seed = family, reference, flags, seed
        self.precomputed: tuple[ReferenceScores, ReferenceScores | None] | None = None
        self._in_evaluation: dict[tuple[int, bytes], Tensor] = {}

    def frozen(self) -> dict[str, LanguageModel]:
        return {} if self.reference is None else {"reference": self.reference}

    def ask_reference(self, batch: Any, device: torch.device, step: int, first_slot: int) -> Tensor:
        """The two log-probabilities of each row of a batch, as `prepare` takes it: float32 [B, 2]."""
        raise NotImplementedError

    def known(self, batch: Any, device: torch.device, step: int, first_slot: int) -> Tensor | None:
        """What was precomputed of these rows: float32 [B, 2], or None. About validation rows the reference is asked
        once, since neither it nor they nor their noise change."""
        if self.precomputed is not None:
            scores = self.precomputed[step < 0]
            assert scores is not None
            return scores.of(batch.sample_ids).to(device)
        if step >= 0 or self.reference is None:
            return None
        place = (first_slot, batch.sample_ids.tobytes())
        if place not in self._in_evaluation:
            self._in_evaluation[place] = self.ask_reference(batch, device, step, first_slot)
        return self._in_evaluation[place]
