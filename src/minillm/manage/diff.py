"""minillm checkpoint diff: what distinguishes two checkpoints."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MOST_KEYS = 10  # that are listed by name


@dataclass(frozen=True)
class DiffSettings:
    """Compare two checkpoints"""

    a: str = field(metadata={"help": "a file, or a run folder (its best)", "positional": True})
    b: str = field(metadata={"help": "the other one", "positional": True})


def run(settings: DiffSettings) -> None:
    """Print fields of the configuration that differ, how far the weights of each layer moved (the norm of the change
    over the norm of A's weights), keys that only one has, and whether the tokenizers are equal.

    Raises:
        UserError: one of them cannot be read.
    """
    from minillm.checkpoint.files import extract_weights
    from minillm.checkpoint.folders import checkpoint_path, read_checkpoint
    from minillm.checkpoint.loader import config_of, family_of

    paths = [checkpoint_path(text) for text in (settings.a, settings.b)]
    contents = [read_checkpoint(path) for path in paths]
    first, second = (extract_weights(content, path) for content, path in zip(contents, paths))
    print(f"A {paths[0]}\nB {paths[1]}")
    rows = []
    for title, sections in (
        ("", [_about(content) for content in contents]),
        ("model_config.", [config_of(content, path).to_dict() for content, path in zip(contents, paths)]),
        ("family.", [family_of(content, path) for content, path in zip(contents, paths)]),
        ("train_config.", [_section(content, "train_config") for content in contents]),
    ):
        one, two = sections
        names = sorted({*one, *two}) if one and two else []
        rows += [(title + name, one.get(name), two.get(name)) for name in names if one.get(name) != two.get(name)]
    print("\nconfiguration:" + ("" if rows else " equal"))
    for name, old, new in rows:
        print(f"  {name}: {_text(old)} -> {_text(new)}")
    print("\nweights, change of the norm relative to A:")
    changes, shapes = layer_changes(first, second)
    width = max((len(name) for name in changes), default=0)
    for name, change in changes.items():
        print(f"  {name:<{width}}  {'equal' if change == 0 else f'{change:.3e}'}")
    for title, keys in (
        ("only in A", sorted(set(first) - set(second))), ("only in B", sorted(set(second) - set(first))),
        ("of other shapes", shapes),
    ):  # fmt: skip
        if keys:
            more = f" and {len(keys) - MOST_KEYS} more" if len(keys) > MOST_KEYS else ""
            print(f"  {title}: {', '.join(keys[:MOST_KEYS])}{more}")
    print(f"\ntokenizer: {_tokenizers(contents)}")


def layer_changes(first: dict[str, Tensor], second: dict[str, Tensor]) -> tuple[dict[str, float], list[str]]:
    """(the relative change ||B - A|| / ||A|| in the Euclidean norm, by layer; keys whose shapes differ)."""
    sums: dict[str, list[float]] = {}
    shapes = []
    for key, value in first.items():
        if key not in second:
            continue
        if value.shape != second[key].shape:
            shapes.append(key)
            continue
        found = re.match(r"(model\.layers\.\d+)\.", key)
        total = sums.setdefault(found[1] if found else key.removesuffix(".weight"), [0.0, 0.0])
        old, new = value.double(), second[key].double()
        total[0] += float((new - old).square().sum())
        total[1] += float(old.square().sum())
    return {name: (change / max(norm, 1e-300)) ** 0.5 for name, (change, norm) in sums.items()}, shapes


def _about(content: Any) -> dict[str, Any]:
    from minillm.manage.catalog import facts

    full = isinstance(content, dict) and "model_state_dict" in content
    names = ("stage", "step", "validation_loss", "format_version")
    return {name: value for name, value in facts(content).items() if name in names} if full else {}


def _section(content: Any, key: str) -> dict[str, Any]:
    value = content.get(key) if isinstance(content, dict) else None
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return "not there" if value is None else str(value)


def _tokenizers(contents: list[Any]) -> str:
    one, two = (_section(content, "tokenizer") for content in contents)
    if not one or not two:
        return "unknown, as at least one of the files has none in it"
    if one.get("json") != two.get("json"):
        return "different tokens"
    return "equal" if one.get("chat_template") == two.get("chat_template") else "equal tokens, another chat template"
