"""How the pipeline talks: plain lines on stdout, in order with what its stages print."""

from __future__ import annotations

import os
from pathlib import Path


def say(line: str) -> None:
    print(line, flush=True)


def display(path: Path) -> str:
    """The path as one would type it here: relative below the working directory, else absolute."""
    text = os.path.normpath(path)
    here = os.getcwd() + os.sep
    return text[len(here) :] if text.startswith(here) else text
