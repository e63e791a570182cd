"""Files that open, and say what cannot be: sizes, versions, tokenizers, headers, parents."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from parts import (
    HUGE,
    Sound,
    fault,
    written,
)
from safetensors.torch import save_file

from minillm.checkpoint.files import hash_file, save_tensors
from minillm.manage.compress import compress
from minillm.text.tokenizer import Tokenizer

# --- configurations of impossible models ---


@fault("num_hidden_layers is 1000000000000")
def a_million_million_layers(sound: Sound, folder: Path) -> Any:
    return sound.with_config(num_hidden_layers=HUGE)


@fault("num_hidden_layers 2,000,000,000, and there are 2 in the weights")
def more_layers_than_weights(sound: Sound, folder: Path) -> Any:
    return sound.with_config(num_hidden_layers=2_000_000_000)


@fault("gate_proj.weight is .*expected")
def a_width_that_is_not_there(sound: Sound, folder: Path) -> Any:
    return sound.with_config(intermediate_size=2**31 - 1)


@fault("num_experts 1,000,000,000, and there are 0")
def a_thousand_million_experts(sound: Sound, folder: Path) -> Any:
    return sound.with_config(use_moe=True, num_experts=10**9)


@fault("max_position_embeddings is 2147483647")
def positions_that_fill_the_memory(sound: Sound, folder: Path) -> Any:
    return sound.with_config(max_position_embeddings=2**31 - 1)


@fault("of no possible model|expected")
def sizes_whose_product_is_no_number(sound: Sound, folder: Path) -> Any:
    return sound.with_config(vocab_size=2**31 - 1, hidden_size=2**31 - 1)


@fault("hidden_size is -16")
def a_negative_size(sound: Sound, folder: Path) -> Any:
    return sound.with_config(hidden_size=-16)


@fault("num_key_value_heads is 0")
def no_heads(sound: Sound, folder: Path) -> Any:
    return sound.with_config(num_key_value_heads=0)


@fault("hidden_size is '16'")
def a_size_as_text(sound: Sound, folder: Path) -> Any:
    return sound.with_config(hidden_size="16")


@fault("rope_theta is nan")
def a_base_that_is_no_number(sound: Sound, folder: Path) -> Any:
    return sound.with_config(rope_theta=float("nan"))


@fault("denoiser is 'magic'")
def an_unknown_part(sound: Sound, folder: Path) -> Any:
    return sound.with_config(denoiser="magic")


@fault("fields this version does not know: wings")
def an_unknown_field(sound: Sound, folder: Path) -> Any:
    return sound.with_config(wings=2)


@fault("has no vocab_size")
def a_configuration_without_a_vocabulary(sound: Sound, folder: Path) -> Any:
    return sound.content(model_config={"hidden_size": 16})


@fault("model_config is a list")
def a_configuration_that_is_a_list(sound: Sound, folder: Path) -> Any:
    return sound.content(model_config=[1, 2])


@fault("architecture is 'rnn'")
def an_unknown_architecture(sound: Sound, folder: Path) -> Any:
    return sound.content(architecture="rnn", family={"architecture": "rnn"})


@fault("family in .* is a str")
def a_family_that_is_text(sound: Sound, folder: Path) -> Any:
    return sound.content(family="ar")


@fault("its adapter cannot be merged")
def an_adapter_without_a_rank(sound: Sound, folder: Path) -> Any:
    return sound.content(adapter={"rank": 0, "alpha": 16.0, "targets": ["q_proj"]})


@fault("its adapter cannot be merged")
def an_adapter_that_is_text(sound: Sound, folder: Path) -> Any:
    return sound.content(adapter="q_proj")


# --- versions ---


@fault("format_version 99.*update MiniLLM")
def a_version_from_the_future(sound: Sound, folder: Path) -> Any:
    return sound.content(format_version=99)


@fault("format_version is '1'")
def a_version_that_is_text(sound: Sound, folder: Path) -> Any:
    return sound.content(format_version="1")


@fault("format_version is 0")
def a_version_before_the_first(sound: Sound, folder: Path) -> Any:
    return sound.content(format_version=0)


# --- tokenizers ---


@fault("does not match the fingerprint")
def a_tokenizer_that_was_changed(sound: Sound, folder: Path) -> Any:
    saved = sound.tokenizer.to_dict()
    return sound.content(tokenizer={**saved, "chat_template": saved["chat_template"] + " "})


@fault("vocabulary of 281, the tokenizer 280|280 entries, its model 281")
def the_tokenizer_of_another_model(sound: Sound, folder: Path) -> Any:
    values = json.loads(sound.tokenizer.json_text)
    merge = values["model"]["merges"].pop()
    values["model"]["vocab"].pop(merge if isinstance(merge, str) else "".join(merge))
    other = Tokenizer(json.dumps(values), sound.tokenizer.chat_template)
    return sound.content(tokenizer=other.to_dict())


@fault("its tokenizer cannot be used")
def a_tokenizer_that_is_cut_short(sound: Sound, folder: Path) -> Any:
    saved = sound.tokenizer.to_dict()
    return sound.content(tokenizer={**saved, "json": saved["json"][:200]})


@fault("no text for json and chat_template")
def a_tokenizer_that_is_no_text(sound: Sound, folder: Path) -> Any:
    return sound.content(tokenizer={"json": 5, "chat_template": None})


# --- safetensors whose header lies ---


def safetensors(folder: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return written(folder / "bad.safetensors", struct.pack("<Q", length or len(text)) + text + body)


def entry(*offsets: int, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@fault("cannot be read")
def a_header_as_long_as_the_disk(sound: Sound, folder: Path) -> Path:
    return safetensors(folder, {"a": entry(0, 8)}, bytes(8), length=2**62)


@fault("cannot be read")
def a_header_that_is_no_json(sound: Sound, folder: Path) -> Path:
    return safetensors(folder, b"{not json", bytes(8))


@fault("cannot be read")
def offsets_behind_the_end(sound: Sound, folder: Path) -> Path:
    return safetensors(folder, {"a": entry(0, 8000)}, bytes(8))


@fault("cannot be read")
def offsets_that_overlap(sound: Sound, folder: Path) -> Path:
    return safetensors(folder, {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12))


@fault("cannot be read")
def a_shape_that_does_not_fit_its_bytes(sound: Sound, folder: Path) -> Path:
    return safetensors(folder, {"a": entry(0, 8, shape=(HUGE,))}, bytes(8))


@fault("cannot be read")
def a_type_that_does_not_exist(sound: Sound, folder: Path) -> Path:
    return safetensors(folder, {"a": entry(0, 8, dtype="F99")}, bytes(8))


@fault("cannot be read")
def safetensors_that_are_cut_short(sound: Sound, folder: Path) -> Path:
    save_file(sound.weights, folder / "whole.safetensors")
    whole = (folder / "whole.safetensors").read_bytes()
    (folder / "whole.safetensors").unlink()
    return written(folder / "bad.safetensors", whole[:-100])


# --- compressed checkpoints ---


def packed(sound: Sound, folder: Path, method: str = "zstd") -> Path:
    save_tensors(folder / "parent.pth", {key: value + 1 for key, value in sound.weights.items()})
    digest = hash_file(folder / "parent.pth").read_text().split()[0]
    parent = {"path": str(folder / "parent.pth"), "sha256": digest, "stage": "pretrain", "step": 1}
    save_tensors(folder / "bad.pt", sound.content(parent=parent))
    path = compress(folder / "bad.pt", method)
    hash_file(path).unlink()
    return path


@fault("cannot be unpacked")
def a_compressed_file_that_is_cut_short(sound: Sound, folder: Path) -> Path:
    path = packed(sound, folder)
    return written(path, path.read_bytes()[:-50])


@fault("unpacks to 1,000,000,000,000,000 bytes")
def a_compressed_file_that_claims_a_petabyte(sound: Sound, folder: Path) -> Path:
    return written(folder / "bad.pt.zst", b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 10**15) + b"\x01\x00\x00")


@fault("its header is damaged")
def a_compressed_file_without_its_hash(sound: Sound, folder: Path) -> Path:
    header = json.dumps({"size": 5}).encode()
    return written(folder / "bad.pt.zst", struct.pack("<II", 0x184D2A5E, len(header)) + header)


@fault("another SHA-256|cannot be unpacked")
def a_compressed_file_with_the_hash_of_another(sound: Sound, folder: Path) -> Path:
    path = packed(sound, folder)
    whole = path.read_bytes()
    at = whole.index(b'"sha256": "') + 11
    return written(path, whole[:at] + b"0" * 64 + whole[at + 64 :])


@fault("which is not there")
def a_difference_without_its_parent(sound: Sound, folder: Path) -> Path:
    path = packed(sound, folder, "delta")
    (folder / "parent.pth").unlink()
    return path


@fault("not the recorded one any more")
def a_difference_from_another_parent(sound: Sound, folder: Path) -> Path:
    path = packed(sound, folder, "delta")
    save_tensors(folder / "parent.pth", dict(sound.weights))
    return path


@fault("its header is damaged")
def a_difference_outside_of_its_file(sound: Sound, folder: Path) -> Path:
    path = packed(sound, folder, "delta")
    whole = path.read_bytes()
    length = struct.unpack("<I", whole[4:8])[0]
    header = json.loads(whole[8 : 8 + length])
    header["segments"][0][0] = HUGE
    text = json.dumps(header).encode()
    return written(path, whole[:4] + struct.pack("<I", len(text)) + text + whole[8 + length :])


# --- what lies beside flat weights ---


def beside(sound: Sound, folder: Path, text: str) -> Path:
    """Flat weights with such a config.json in the run folder beside them."""
    (folder / "pretrain_16").mkdir()
    (folder / "pretrain_16" / "config.json").write_text(text)
    torch.save(sound.weights, folder / "pretrain_16.pth")
    sound.tokenizer.save(folder / "pretrain_16")
    return folder / "pretrain_16.pth"


@fault("config.json is not valid JSON")
def a_configuration_beside_that_is_no_json(sound: Sound, folder: Path) -> Path:
    return beside(sound, folder, '{"minillm": ')


@fault("config.json is a list")
def a_configuration_beside_that_is_a_list(sound: Sound, folder: Path) -> Path:
    return beside(sound, folder, "[1, 2]")


@fault("head_dim is -4")
def a_configuration_beside_with_a_negative_size(sound: Sound, folder: Path) -> Path:
    return beside(sound, folder, json.dumps({"minillm": {**sound.config.to_dict(), "head_dim": -4}}))
