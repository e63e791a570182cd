"""Files that would run code, are cut short or changed, unfold to more than they are, or hold other tensors."""

from __future__ import annotations

import datetime
import functools
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts import (
    HUGE,
    PLANTED,
    Payload,
    Sound,
    archive,
    fault,
    written,
)

from minillm.checkpoint.files import hash_file, save_tensors

# --- pickles that would run code, or hold what is no tensor ---

CODE = "could execute code"


@fault(CODE)
def code_in_an_archive(sound: Sound, folder: Path) -> Any:
    return sound.content(extra=Payload())


@fault(CODE)
def code_in_place_of_a_tensor(sound: Sound, folder: Path) -> Any:
    return sound.with_weights(model__norm__weight=Payload())


@fault(CODE)
def code_in_the_older_form(sound: Sound, folder: Path) -> Path:
    torch.save({"w": torch.ones(2), "extra": Payload()}, folder / "bad.pth", _use_new_zipfile_serialization=False)
    return folder / "bad.pth"


@fault(CODE)
def code_in_a_bare_pickle(sound: Sound, folder: Path) -> Path:
    return written(folder / "bad.pth", pickle.dumps(Payload(), protocol=2))


@fault("safe to read|could execute code")
def code_in_a_pickle_of_a_new_protocol(sound: Sound, folder: Path) -> Path:
    return written(folder / "bad.pth", pickle.dumps(Payload(), protocol=5))


@fault(CODE)
def code_in_weights_of_the_name_bin(sound: Sound, folder: Path) -> Path:
    torch.save({**sound.weights, "x": Payload()}, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


@fault(CODE)
def a_whole_module(sound: Sound, folder: Path) -> Any:
    return {"model": torch.nn.Linear(2, 2)}


@fault(CODE)
def a_numpy_array(sound: Sound, folder: Path) -> Any:
    return sound.content(extra=np.ones(2))


@fault(CODE)
def an_object_of_a_class(sound: Sound, folder: Path) -> Any:
    return sound.content(extra=datetime.timedelta(1))


@fault(CODE)
def a_function_with_arguments(sound: Sound, folder: Path) -> Any:
    return sound.content(extra=functools.partial(os.system, f"touch {PLANTED}"))


@fault("could execute code|refused unopened")
def a_scripted_module(sound: Sound, folder: Path) -> Path:
    with zipfile.ZipFile(folder / "bad.pt", "w") as file:
        for name in ("bad/constants.pkl", "bad/code/__torch__.py", "bad/data.pkl", "bad/version"):
            file.writestr(name, b"\x80\x02}." if name.endswith("pkl") else b"3\n")
    return folder / "bad.pt"


# --- files that are cut short, changed, or something else ---


@fault("is empty")
def an_empty_file(sound: Sound, folder: Path) -> Path:
    return written(folder / "bad.pt", b"")


@fault("cannot be read")
def a_page_instead_of_a_file(sound: Sound, folder: Path) -> Path:
    return written(folder / "bad.pt", b"<!DOCTYPE html><html><body>Not found</body></html>")


@fault("cannot be read")
def the_pointer_of_a_large_file(sound: Sound, folder: Path) -> Path:
    return written(folder / "bad.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")


@fault("cannot be read")
def random_bytes(sound: Sound, folder: Path) -> Path:
    return written(folder / "bad.pt", np.random.default_rng(1).bytes(4000))


@fault("cannot be read")
def the_first_half(sound: Sound, folder: Path) -> Path:
    whole = archive(sound)
    return written(folder / "bad.pt", whole[: len(whole) // 2])


@fault("cannot be read")
def without_its_last_bytes(sound: Sound, folder: Path) -> Path:
    return written(folder / "bad.pt", archive(sound)[:-40])


@fault("cannot be read")
def without_the_values_of_a_tensor(sound: Sound, folder: Path) -> Path:
    with zipfile.ZipFile(io.BytesIO(archive(sound))) as whole, zipfile.ZipFile(folder / "bad.pt", "w") as file:
        for entry in whole.infolist():
            if not entry.filename.endswith("/data/3"):
                file.writestr(entry, whole.read(entry))
    return folder / "bad.pt"


@fault("SHA-256")
def a_changed_byte(sound: Sound, folder: Path) -> Path:
    save_tensors(folder / "bad.pt", sound.content())
    whole = bytearray((folder / "bad.pt").read_bytes())
    whole[len(whole) // 2] ^= 1
    return written(folder / "bad.pt", bytes(whole))


@fault("SHA-256")
def the_hash_of_another_file(sound: Sound, folder: Path) -> Path:
    save_tensors(folder / "bad.pt", sound.content())
    hash_file(folder / "bad.pt").write_text("0" * 64 + "  bad.pt\n")
    return folder / "bad.pt"


@fault("SHA-256")
def a_hash_that_is_no_text(sound: Sound, folder: Path) -> Path:
    save_tensors(folder / "bad.pt", sound.content())
    hash_file(folder / "bad.pt").write_bytes(b"\xff\xfe\x00")
    return folder / "bad.pt"


# --- what unfolds to more than it is ---


@fault("refused unopened")
def an_archive_that_is_compressed(sound: Sound, folder: Path) -> Path:
    with (
        zipfile.ZipFile(io.BytesIO(archive(sound))) as whole,
        zipfile.ZipFile(folder / "bad.pt", "w", zipfile.ZIP_DEFLATED) as file,
    ):
        for entry in whole.infolist():
            file.writestr(entry.filename, whole.read(entry))
    return folder / "bad.pt"


@fault("refused unopened|cannot be read")
def an_archive_that_claims_a_gigabyte(sound: Sound, folder: Path) -> Path:
    whole = bytearray(archive(sound))
    entry = whole.rindex(b"PK\x01\x02")  # in the directory at its end: both sizes of the last file
    whole[entry + 20 : entry + 28] = struct.pack("<II", 10**9, 10**9)
    return written(folder / "bad.pt", bytes(whole))


@fault(r"norm.weight claims the shape \(1000000000000,\)")
def a_tensor_that_repeats_one_number(sound: Sound, folder: Path) -> Any:
    return sound.with_weights(model__norm__weight=torch.ones(1).expand(HUGE))


@fault("unfolds without end")
def lists_of_lists_of_lists(sound: Sound, folder: Path) -> Any:
    grown: Any = [1]
    for _ in range(30):
        grown = [grown] * 10
    return sound.content(training_log=grown)


@fault("unfolds without end")
def a_list_in_itself(sound: Sound, folder: Path) -> Any:
    ring: list[Any] = []
    ring.append(ring)
    return sound.content(training_log=ring)


@fault("unfolds without end|cannot be read")
def a_thousand_levels(sound: Sound, folder: Path) -> Path:
    deep = b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b"."  # lists in lists, as a pickle
    with zipfile.ZipFile(io.BytesIO(archive(sound))) as whole, zipfile.ZipFile(folder / "bad.pt", "w") as file:
        for entry in whole.infolist():
            file.writestr(entry, deep if entry.filename.endswith("data.pkl") else whole.read(entry))
    return folder / "bad.pt"


# --- tensors of other kinds ---


@fault("norm.weight has a shape and no values")
def a_tensor_without_values(sound: Sound, folder: Path) -> Any:
    return sound.with_weights(model__norm__weight=torch.ones(16, device="meta"))


@fault("norm.weight is not a plain tensor")
def a_sparse_tensor(sound: Sound, folder: Path) -> Any:
    return sound.with_weights(model__norm__weight=torch.ones(16).to_sparse())


@fault("norm.weight is not a plain tensor")
def a_quantized_tensor(sound: Sound, folder: Path) -> Any:
    return sound.with_weights(model__norm__weight=torch.quantize_per_tensor(torch.ones(16), 1.0, 0, torch.qint8))


@fault("norm.weight holds int64")
def whole_numbers(sound: Sound, folder: Path) -> Any:
    return sound.with_weights(model__norm__weight=torch.ones(16, dtype=torch.int64))


@fault("norm.weight has NaN or infinite values")
def not_a_number(sound: Sound, folder: Path) -> Any:
    return sound.with_weights(model__norm__weight=torch.full((16,), float("nan")))


@fault("norm.weight has NaN or infinite values")
def infinity(sound: Sound, folder: Path) -> Any:
    return sound.with_weights(model__norm__weight=torch.full((16,), float("-inf")))


@fault(r"norm.weight is \(8,\), expected \(16,\)")
def another_shape(sound: Sound, folder: Path) -> Any:
    return sound.with_weights(model__norm__weight=torch.ones(8))


@fault("missing model.norm.weight")
def a_missing_key(sound: Sound, folder: Path) -> Any:
    return sound.with_weights(model__norm__weight=None)


@fault("unexpected model.extra.weight")
def an_unexpected_key(sound: Sound, folder: Path) -> Any:
    return sound.with_weights(model__extra__weight=torch.ones(2))


@fault("the names of weights are text")
def a_tensor_with_a_number_for_a_name(sound: Sound, folder: Path) -> Any:
    return sound.content(model_state_dict={**sound.weights, 7: torch.ones(2)})


@fault("holds no weights|no whole model|key names")
def no_tensors_at_all(sound: Sound, folder: Path) -> Any:
    return {"model_state_dict": {}, "model_config": sound.config.to_dict()}


@fault("holds no weights|there are 0 in the weights|key names")
def weights_that_are_a_list(sound: Sound, folder: Path) -> Any:
    return sound.content(model_state_dict=list(sound.weights.values()))
