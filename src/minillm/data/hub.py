"""Rows of a dataset on the Hugging Face hub (or any path that `datasets` reads), streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator

from minillm.data.files import Row
from minillm.log import UserError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def looks_like_hub_name(text: str) -> bool:
    """owner/name."""
    return bool(NAME.fullmatch(text))


def hub_rows(name: str, *, split: str = "train") -> Iterator[Row]:
    """Rows of a dataset, in its order, without holding it in memory; a row's line is its number.

    Raises:
        UserError: `datasets` is missing, or the dataset cannot be opened.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name}: the hub is read with datasets. Install it with: pip install datasets") from error
    try:
        stream = datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # the library has many kinds: no network, no such name, no such split
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} (split {split}) cannot be opened: {reason}. Check the name and the network, or give a local file."
        ) from error
    for number, value in enumerate(stream, 1):
        yield Row(dict(value), name, number)
