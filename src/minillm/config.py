"""Settings: frozen dataclasses become flat flags, and a YAML file holds the same flags (`--config`).

A field's metadata is its whole description: `help`, and where wanted `choices`, `aliases`, `min`, `max`
(inclusive), `above` (exclusive), `bare` (the value of the flag given without one), `words` (what may stand for a
number, with the number it becomes), `positional`.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from minillm.log import UserError

# What a run adds to the flags when it writes training_config.json: read over, so that the file is a recipe.
RESOLVED = {"run_name", "stage", "architecture", "total_steps", "version", "processes"}
TRUE, FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


class UsageError(UserError):
    """A wrong flag or value; the command line exits with 2."""


def _convert(name: str, kind: Any, raw: Any) -> Any:
    """A flag's text, or a YAML value, as the field's type. YAML reads 1e-3 as text; so do we."""
    if kind is bool:
        text = str(raw).lower()
        if text in TRUE | FALSE:
            return text in TRUE
        raise UsageError(f"--{name}: {raw!r} is neither true nor false")
    if kind is str:
        if isinstance(raw, bool):  # YAML reads on and off, too, as true and false
            return "on" if raw else "off"
        return str(raw)
    try:
        if kind is int:
            number = float(raw)
            if number != int(number):
                raise ValueError
            return int(number)
        return kind(raw)
    except (ValueError, TypeError, OverflowError):
        wanted = {"int": "a whole number", "float": "a number"}.get(kind.__name__, kind.__name__)
        raise UsageError(f"--{name}: {raw!r} is not {wanted}") from None


def _check(name: str, value: Any, meta: Any) -> None:
    choices = meta.get("choices")
    if choices and value not in choices:
        shown = [choice for choice in choices if choice]
        near = difflib.get_close_matches(str(value), shown, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"--{name}: {value!r} is not one of {', '.join(shown)}.{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"--{name} is {value}: give a finite number")
    if "min" in meta and value < meta["min"]:
        raise UsageError(f"--{name} is {value}: it must be at least {meta['min']}")
    if "above" in meta and value <= meta["above"]:
        raise UsageError(f"--{name} is {value}: it must be greater than {meta['above']}")
    if "max" in meta and value > meta["max"]:
        raise UsageError(f"--{name} is {value}: it must be at most {meta['max']}")


class _Help(argparse.HelpFormatter):
    """One line a flag where it fits; a flag's aliases once, before what it takes."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return ", ".join(action.option_strings) + " " + self._format_args(action, "")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\nSee: {self.prog} --help")


def _default_text(field: Field[Any]) -> str:
    if field.default is MISSING:
        return "required"
    if isinstance(field.default, tuple):
        return f"default {' '.join(field.default)}" if field.default else ""
    return f"default {field.default}" if field.default not in ("", False, 0) else ""


def _add_flags(parser: _Parser, classes: Sequence[type]) -> None:
    for settings in classes:
        title = (settings.__doc__ or settings.__name__).strip().splitlines()[0]
        group = parser.add_argument_group(title)
        for field in fields(settings):
            meta = field.metadata
            default = _default_text(field)
            text = meta.get("help", "") + (f" ({default})" if default and "default" not in meta.get("help", "") else "")
            text = text.replace("%", "%%")
            if meta.get("positional"):
                optional = field.default is not MISSING
                several = get_type_hints(settings)[field.name] == tuple[str, ...]
                nargs = ("*" if optional else "+") if several else ("?" if optional else None)
                parser.add_argument(field.name, nargs=nargs, default=argparse.SUPPRESS, help=text)
                continue
            is_bool = get_type_hints(settings)[field.name] is bool
            shown = [choice for choice in meta.get("choices", ()) if choice]
            metavar = (
                "{" + ",".join(shown) + "}"
                if shown
                else ("true|false" if is_bool else field.name.split("_")[-1].upper())
            )
            names = [f"--{name}" for name in (field.name, *meta.get("aliases", ()))]
            common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
            bare = "true" if is_bool else meta.get("bare")
            if get_type_hints(settings)[field.name] == tuple[str, ...]:
                group.add_argument(*names, nargs="+", **common)
            elif bare is not None:
                group.add_argument(*names, nargs="?", const=bare, metavar=metavar, **common)
            else:
                group.add_argument(*names, metavar=metavar, **common)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same flags; flags given here win")


def _read_yaml(path: Path, names: dict[str, str]) -> dict[str, Any]:
    """The flags in a recipe, by field name. `names` maps every accepted spelling to its field."""
    import yaml

    if not path.is_file():
        raise UsageError(f"--config: there is no file {path}")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} must hold `flag: value` lines, not a {type(loaded).__name__}")
    result: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name in RESOLVED:
            continue
        if name not in names:
            raise UsageError(f"{path}: unknown setting {key!r}.{_suggest(name, list(names))}")
        if value is not None:
            result[names[name]] = value
    return result


def _suggest(name: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {prefix}{near[0]}?" if near else ""


def normalise(argv: Sequence[str]) -> list[str]:
    """Underscores and hyphens are one in the names of flags: --max-steps=5 becomes --max_steps=5."""
    result = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
        result.append(word)
    return result


def parse(program: str, description: str, classes: Sequence[type], argv: Sequence[str]) -> list[Any]:
    """Settings objects, one per class, from a command line and an optional recipe.

    Raises:
        UsageError: an unknown flag or key (with a suggestion), or an impossible value.
    """
    words = [field.name.upper() for each in classes for field in fields(each) if field.metadata.get("positional")]
    usage = " ".join([program, *words, "[--flag value ...]"])
    parser = _Parser(prog=program, usage=usage, description=description, allow_abbrev=False, formatter_class=_Help)
    _add_flags(parser, classes)
    names: dict[str, str] = {}
    for settings in classes:
        for field in fields(settings):
            names.update({name: field.name for name in (field.name, *field.metadata.get("aliases", ()))})
    given, unknown = parser.parse_known_args(normalise(argv))
    if unknown:
        flag = unknown[0].split("=")[0]
        hint = _suggest(flag.lstrip("-"), [*names, "config", "help"], "--") if flag.startswith("-") else ""
        raise UsageError(f"unknown argument {flag}.{hint}\nSee: {program} --help")
    values = vars(given)
    recipe = values.pop("config", None)
    if recipe:
        values = {**_read_yaml(Path(recipe), names), **values}
    return [_build(settings, values) for settings in classes]


def _build(settings: type, values: dict[str, Any]) -> Any:
    hints = get_type_hints(settings)
    arguments = {}
    for field in fields(settings):
        if field.name in values:
            raw = values[field.name]
            words = field.metadata.get("words", {})
            if str(raw) in words:
                arguments[field.name] = words[str(raw)]
                continue
            if hints[field.name] == tuple[str, ...]:
                value: Any = tuple(str(item) for item in (raw if isinstance(raw, list | tuple) else [raw]))
            else:
                value = _convert(field.name, hints[field.name], raw)
        elif field.default is not MISSING:
            value = field.default
        else:
            what = field.name.upper() if field.metadata.get("positional") else f"--{field.name}"
            raise UsageError(f"{what} is required: {field.metadata.get('help', '')}")
        _check(field.name, value, field.metadata)
        arguments[field.name] = value
    return settings(**arguments)
