"""The table of families. A new family is one file and one line here; command line, help and tests read it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minillm.log import UserError

if TYPE_CHECKING:
    from minillm.families.base import Family
    from minillm.families.settings import FamilyConfig

FAMILIES = {
    "ar": "minillm.families.autoregressive:Autoregressive",
    "diffusion": "minillm.families.diffusion:Diffusion",
    "sdd": "minillm.families.sdd:SparseDistributionDiffusion",
}


def get_family(config: FamilyConfig, tokenizer: Any) -> Family:
    """The family of a configuration, over this tokenizer's vocabulary; raises UserError where there is none."""
    from minillm.families.base import SpecialIds

    if config.architecture not in FAMILIES:
        raise UserError(f"architecture {config.architecture!r} does not exist; there is: {', '.join(FAMILIES)}")
    module, attribute = FAMILIES[config.architecture].split(":")
    return getattr(import_module(module), attribute)(config, SpecialIds.of(tokenizer))


def saved_family(values: dict[str, Any], tokenizer: Any) -> Family:
    """The family a checkpoint was trained in, from what it says of it."""
    from minillm.families.settings import FamilyConfig

    return get_family(FamilyConfig.from_dict(values), tokenizer)
