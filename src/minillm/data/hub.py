"""Rows of a dataset on the Hugging Face hub, or under any address that `datasets` reads, streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from minillm.data.files import COMPRESSIONS, Row
from minillm.log import UserError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")  # owner/name or owner/name:configuration
ADDRESS = re.compile(r"[a-z][a-z0-9]*://.+")
SHORT_NAMES = {
    "openwebtext": "Skylion007/openwebtext",
    "fineweb": "HuggingFaceFW/fineweb:sample-10BT",
    "fineweb-edu": "HuggingFaceFW/fineweb-edu:sample-10BT",
    "tinystories": "roneneldan/TinyStories",
}
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}), ".jsonl": ("json", {}), ".ndjson": ("json", {}), ".json": ("json", {}),
    ".txt": ("text", {"sample_by": "paragraph"}),
}  # fmt: skip


def looks_like_hub_name(text: str) -> bool:
    """owner/name."""
    return bool(NAME.fullmatch(text))


def hub_rows(name: str, *, split: str = "train", column: str = "", skip: int = 0) -> Iterator[Row]:
    """Rows of a dataset, in its order, without holding it in memory; a row's line is its number.

    name: of the hub (owner/name, with a configuration owner/name:configuration), a short name, or the address of
    files (s3://, hf://, https://). column: the only one that is wanted. skip: rows at the beginning to leave out.

    Raises:
        UserError: `datasets` is missing, or the dataset cannot be opened, read or has no such column.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name}: the hub is read with datasets. Install it with: pip install 'minillm-trainer[hub]'"
        ) from error
    try:
        stream = _opened(datasets, name, split)
        known = stream.column_names
        if column and known and column in known:
            stream = stream.select_columns([column])
        elif column and known:
            raise UserError(f"{name} has no column {column!r}. Its columns are: {', '.join(known)}.")
        for number, value in enumerate(stream.skip(skip) if skip else stream, skip + 1):
            yield Row(dict(value), name, number)
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # the library has many kinds: no network, no such name, no such split
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} (split {split}) cannot be read: {reason}. Check the name and the network, or give a local file."
        ) from error


def _opened(datasets: Any, name: str, split: str) -> Any:
    if not ADDRESS.fullmatch(name):
        path, _, configuration = SHORT_NAMES.get(name, name).partition(":")
        return datasets.load_dataset(path, configuration or None, split=split, streaming=True)
    plain = name.lower()
    for suffix in COMPRESSIONS:
        plain = plain.removesuffix(suffix)
    reader = next((found for suffix, found in READERS.items() if plain.endswith(suffix)), None)
    if reader is None:
        raise UserError(f"{name}: unknown file type. Readable are {', '.join(READERS)} (also as .gz or .zst).")
    builder, options = reader
    return datasets.load_dataset(builder, data_files={split: name}, split=split, streaming=True, **options)
