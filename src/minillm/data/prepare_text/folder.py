"""The folders of a preparation: what identifies it, is it finished, where was it left?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.atomic import write_text
from minillm.log import UserError

if TYPE_CHECKING:
    from minillm.data.prepare_text import PrepareTextSettings
    from minillm.data.sources import Source

STATE_FILE = "state.json"


def identify(settings: PrepareTextSettings, sources: Sequence[Source]) -> dict[str, Any]:
    """All that decides what comes out: the same identity, the same bytes."""
    from minillm.data.prepare_text import tokens_of
    from minillm.data.shards import FORMAT_VERSION
    from minillm.text.tokenizer import Tokenizer

    identity = {name: value for name, value in asdict(settings).items() if name not in ("output_dir", "num_workers")}
    identity["shard_tokens"] = tokens_of(settings.shard_tokens)
    identity["input"] = [source.identity() for source in sources]
    if not settings.vocab_size:
        identity["tokenizer"] = text_hash(Tokenizer.load(settings.tokenizer or None).json_text)
    return {"format_version": FORMAT_VERSION, **identity}


def is_finished(output: Path, identity: dict[str, Any]) -> bool:
    """Is `output` there and what would be made now? Raises UserError when it is something else, or damaged."""
    from minillm.data.shards import CONFIG_FILE, is_prepared_text, read_config
    from minillm.data.store import store_problem

    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not is_prepared_text(output):
        raise UserError(f"{output} is there and holds something else. Choose another --output_dir.")
    config = read_config(output)
    _refuse_differences(config["identity"], identity, output)
    problem = store_problem(output, config["fingerprint"], CONFIG_FILE)
    if problem:
        raise UserError(f"{output} is damaged: {problem}. Remove that folder and prepare the text again.")
    return True


def _refuse_differences(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    different = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if not different:
        return
    lines = [f"{folder} was prepared differently; nothing in it is changed. What differs:"]
    for name in different:
        if name == "input":
            lines += [f"  --input: {line}" for line in _input_differences(found["input"], wanted["input"])]
        else:
            lines.append(f"  --{name}: there {found.get(name)!r}, now {wanted.get(name)!r}")
    lines.append("Choose another --output_dir, or remove that folder.")
    raise UserError("\n".join(lines))


def _input_differences(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> list[str]:
    before, now = ({each["name"]: each for each in side} for side in (found, wanted))
    lines = [f"{name} is no longer there" for name in before if name not in now]
    lines += [f"{name} is new" for name in now if name not in before]
    lines += [f"{name} has changed" for name in now if name in before and before[name] != now[name]]
    return lines[:10] or ["the files come in another order"]


def refuse_input_as_output(sources: Sequence[Source], output: Path) -> None:
    """Raises UserError for an output in which the input stands: it would be input the next time."""
    target = output.resolve()
    for source in sources:
        if source.path and target in source.path.resolve().parents:
            raise UserError(f"--output_dir {output} holds the input {source.name}. Choose another folder.")


@contextmanager
def clear_disk_errors(building: Path) -> Iterator[None]:
    """What the disk refuses, as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{building} cannot be written: {error.strerror or error}. What is done is kept there: make room, run the "
            "same command again, and it goes on."
        ) from error


def read_state(building: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Where the preparation in this folder was left. Raises UserError when it is another one."""
    path = building / STATE_FILE
    if not path.exists():
        return {"identity": identity}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        found = state["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}). Remove the folder {building} and prepare again.") from error
    _refuse_differences(found, identity, building)
    return state


def text_hash(text: str) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A reader sees the old file or the new one."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))
