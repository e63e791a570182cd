"""The table of families. A new family is one file and one line here; command line, help and tests read it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from minillm.log import UserError

if TYPE_CHECKING:
    from minillm.families.base import Family

FAMILIES = {
    "ar": "minillm.families.autoregressive:Autoregressive",
}


def get_family(name: str) -> Family:
    """The family called `name`; raises UserError where there is none."""
    if name not in FAMILIES:
        raise UserError(f"architecture {name!r} does not exist; there is: {', '.join(FAMILIES)}")
    module, attribute = FAMILIES[name].split(":")
    return getattr(import_module(module), attribute)()
