"""What damaged and malicious checkpoints are made of: sound parts, and the table of faults.

`FAULTS` holds one small function for each fault in a file, with what has to be said of it; `FOLDERS` those in folders,
`RESUMED` those that only resuming minds. `PLANTED` is the file that a payload would create if it ran.
"""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from sound import SoundCheckpoint

from minillm.convert.huggingface import hf_config

PLANTED = "planted"
HUGE = 10**12


class Sound(SoundCheckpoint):
    """And a model as transformers writes it."""

    def model_folder(self, folder: Path) -> Path:
        """As transformers writes it, in two shards."""
        place = folder / "model"
        place.mkdir()
        values = hf_config(self.config, self.tokenizer, {"architecture": "ar"})
        (place / "config.json").write_text(json.dumps(values))
        self.tokenizer.save(place)
        keys = sorted(self.weights)
        shards = {"model-00001-of-00002.safetensors": keys[:4], "model-00002-of-00002.safetensors": keys[4:]}
        for name, part in shards.items():
            save_file({key: self.weights[key].contiguous() for key in part}, place / name)
        write_index(place, {key: name for name, part in shards.items() for key in part})
        return place


class Payload:
    """What runs code when it is unpickled: it would create a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {PLANTED}",)


class Fault(NamedTuple):
    make: Callable[[Sound, Path], Path]
    says: str  # a regular expression


FAULTS: dict[str, Fault] = {}


def fault(says: str) -> Callable[[Callable[[Sound, Path], Any]], Callable[[Sound, Path], Any]]:
    """The decorated function returns a path, or the content of a file that torch writes."""

    def register(make: Callable[[Sound, Path], Any]) -> Callable[[Sound, Path], Any]:
        @functools.wraps(make)
        def made(sound: Sound, folder: Path) -> Path:
            result = make(sound, folder)
            if isinstance(result, Path):
                return result
            torch.save(result, folder / "bad.pt")
            return folder / "bad.pt"

        FAULTS[make.__name__] = Fault(made, says)
        return make

    return register


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_index(place: Path, weight_map: Any) -> None:
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def archive(sound: Sound) -> bytes:
    """A sound checkpoint as bytes."""
    file = io.BytesIO()
    torch.save(sound.content(), file)
    return file.getvalue()


FOLDERS: dict[str, Fault] = {}


def folder_fault(says: str) -> Callable[[Callable[[Sound, Path], None]], Callable[[Sound, Path], None]]:
    """The decorated function damages a sound folder."""

    def register(damage: Callable[[Sound, Path], None]) -> Callable[[Sound, Path], None]:
        def made(sound: Sound, folder: Path) -> Path:
            place = sound.model_folder(folder)
            damage(sound, place)
            return place

        FOLDERS[damage.__name__] = Fault(made, says)
        return damage

    return register


SHARD = "model-00001-of-00002.safetensors"


RESUMED: dict[str, Fault] = {}


def resumed(name: str, says: str, make: Callable[[Sound], dict[str, Any]]) -> None:
    def made(sound: Sound, folder: Path) -> Path:
        torch.save(make(sound), folder / "bad.pt")
        return folder / "bad.pt"

    RESUMED[name] = Fault(made, says)
