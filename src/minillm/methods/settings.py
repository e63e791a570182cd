"""The flags of single methods. No torch here: help must be quick."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PreferenceSettings:
    """Preference learning"""

    beta: float = field(default=0.1, metadata={"help": "strength of the pull towards the reference", "above": 0.0})
