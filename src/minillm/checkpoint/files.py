"""Files that can be trusted: written beside and renamed, recorded with a SHA-256, verified before use,
opened without executing code."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from minillm.atomic import sync, sync_folder, temporary_path, write_text
from minillm.checkpoint.compressed import SUFFIXES, unpack
from minillm.checkpoint.safety import check_archive, check_plain, check_version
from minillm.log import UserError
from minillm.models.config import ModelConfig


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces; of a model's folder that of its files' names and digests."""
    digest = hashlib.sha256()
    if path.is_dir():
        for each in sorted(each for each in path.iterdir() if each.is_file()):
            digest.update(f"{each.name} {sha256(each)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def hash_file(path: Path) -> Path:
    """The file beside `path` that records its hash, in the form `sha256sum -c` reads."""
    return path.with_name(path.name + ".sha256")


def _commit(temporary: Path, path: Path, digest: str) -> None:
    """Rename a finished file into place together with its hash. In between, the hash file names both the old
    content and the new, so that a kill at any moment leaves a file that verifies."""
    sidecar = hash_file(path)
    lines = f"{digest}  {path.name}\n"
    if path.exists() and sidecar.exists():
        write_text(sidecar, lines + sidecar.read_text(encoding="utf-8"))
    else:
        write_text(sidecar, lines + (f"{sha256(path)}  {path.name}\n" if path.exists() else ""))
    os.replace(temporary, path)
    sync_folder(path.parent)
    write_text(sidecar, lines)


def write_archive(content: Any, file: IO[bytes]) -> None:
    """torch.save. Raises OSError where the disk is full, of which torch's own error does not speak."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(errno.EIO, str(error).splitlines()[0]) from error


def save_tensors(path: Path, content: Any, also: tuple[Path, ...] = ()) -> None:
    """torch.save, atomic and with its hash; `also` names further paths for the same content (hard links where
    the file system has them, else copies).

    Raises:
        OSError: the disk is full or not writable; what stood under these names is untouched.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # by name, the archive inside would carry the temporary name
            write_archive(content, file)

    _save(path, write, also)


def save_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A .safetensors file, atomic and with its hash. Raises OSError as save_tensors does."""
    from safetensors.torch import save_file

    _save(path, lambda temporary: save_file(tensors, str(temporary), metadata={"format": "pt", **metadata}), ())


def _save(path: Path, write: Callable[[Path], None], also: tuple[Path, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        write(temporary)
        sync(temporary)
        digest = sha256(temporary)
        for other in also:
            twin = temporary_path(other)
            twin.unlink(missing_ok=True)
            try:
                os.link(temporary, twin)
            except OSError:
                shutil.copyfile(temporary, twin)
            _commit(twin, other, digest)
        _commit(temporary, path, digest)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a checkpoint and its hash."""
    path.unlink(missing_ok=True)
    hash_file(path).unlink(missing_ok=True)


def verify_hash(path: Path) -> bool:
    """True if the file matches its recorded hash, False if none is recorded.

    Raises:
        UserError: it does not match: cut short or changed.
    """
    sidecar = hash_file(path)
    if not sidecar.is_file():
        return False
    recorded = {
        line.split()[0] for line in sidecar.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
    }
    if sha256(path) not in recorded:
        raise UserError(
            f"{path} does not match its recorded SHA-256 ({sidecar.name}): it was cut short or changed. "
            "Use another checkpoint of the run (step_*.pt, best_model.pt)"
        )
    return True


def read_tensors(path: Path) -> Any:
    """Content of a .pt, .pth, .bin or .safetensors file on the CPU, or of one that `minillm checkpoint compress` made;
    verified, without executing code.

    Raises:
        UserError: the file is missing, damaged, of a later version, or holds something other than tensors and plain
            containers.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: the write that made it never finished")
    verify_hash(path)
    if path.suffix in SUFFIXES:
        return _open(io.BytesIO(unpack(path)), path)
    return _open(path, path)


def peek(path: Path) -> Any:
    """The same without reading the tensors, whose values stay on disk until they are used, and without verifying the
    hash: quick for files of any size, for those who want to know what is in one. Not for compressed files.

    Raises:
        UserError: as read_tensors.
    """
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: the write that made it never finished")
    return _open(path, path, mmap=zipfile.is_zipfile(path))


def _open(file: Path | io.BytesIO, path: Path, *, mmap: bool = False) -> Any:
    if path.suffix != ".safetensors":
        check_archive(file, path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol of pickles that are refused
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # every reader has its own way to fail on a damaged file
        raise UserError(f"{path} {_reason(error)}") from error
    check_plain(content, path)
    check_version(content, path)
    return content


def _reason(error: Exception) -> str:
    """What torch or safetensors says of a file that it cannot open, in a sentence."""
    text = str(error)
    code = re.search(r"GLOBAL ([\w.]+)", text)
    if code or "Trying to" in text or "TorchScript" in text:
        named = f" ({code[1]})" if code else ""
        return f"holds more than tensors and plain containers{named}; loading it could execute code, so it is refused"
    if isinstance(error, KeyError | pickle.UnpicklingError):
        return "cannot be read as a checkpoint: it is neither an archive of torch's nor a pickle that is safe to read"
    return f"cannot be read as a checkpoint ({(text or type(error).__name__).splitlines()[0].split('. ')[0]})"


def extract_weights(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a full checkpoint (its averaged weights, where it has them) or a bare one, without the
    prefixes that wrappers add. An adapter that was trained beside the weights is merged into them.

    Raises:
        UserError: there are no tensors in it.
    """
    weights = content
    if isinstance(content, dict):
        for key in ("ema_state_dict", "model_state_dict", "state_dict", "model"):
            if isinstance(content.get(key), dict):
                weights = content[key]
                break
    if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds no weights: expected a state dict, or a checkpoint with model_state_dict")
    result = {}
    for key, value in weights.items():
        if isinstance(value, Tensor):
            if not isinstance(key, str):
                raise UserError(f"{path}: a tensor is called {key!r}; the names of weights are text")
            if key.endswith("_weight_qdata"):
                raise UserError(
                    f"{path}: {key} is quantised by torchao: only transformers reads it; take the full weights"
                )
            for prefix in ("module.", "_orig_mod."):
                key = key.replace(prefix, "")
            result[key] = value
    if isinstance(content, dict) and content.get("adapter") is not None:
        from minillm.models.lora import LoraConfig, folded, pairs_of, without_adapters

        try:
            scale = LoraConfig.from_dict(content["adapter"]).scale
            result = folded(without_adapters(result), pairs_of(result), scale)
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
            raise UserError(f"{path}: its adapter cannot be merged into its weights ({error!r})") from None
    return result


def check_finite(weights: dict[str, Tensor], path: Path) -> None:
    """Raises UserError naming the first tensor with NaN or infinity."""
    for key, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{path}: {key} has NaN or infinite values")


def check_fits(weights: dict[str, Tensor], config: ModelConfig, path: Path) -> None:
    """The weights have exactly the keys and shapes that `config` asks for. What it says is compared with the keys
    before anything of the size it claims is built.

    Raises:
        UserError: says what is wrong.
    """
    from minillm.models.transformer import LanguageModel

    for name, pattern, claimed in (
        ("num_hidden_layers", r"model\.layers\.(\d+)\.", config.num_hidden_layers),
        ("num_experts", r".*\.experts\.(\d+)\.", config.num_experts if config.use_moe else 0),
    ):
        there = len({found[1] for key in weights if (found := re.match(pattern, key))})
        if there != claimed:
            raise UserError(
                f"{path}: its configuration says {name} {claimed:,}, and there are {there:,} in the weights"
            )
    try:
        with torch.device("meta"):
            expected = LanguageModel(config).state_dict()
    except RuntimeError as error:  # sizes whose product is no number
        raise UserError(f"{path}: its configuration is of no possible model ({str(error).splitlines()[0]})") from None
    given = set(weights) - (set() if "lm_head.weight" in expected else {"lm_head.weight"})  # tied, but written out
    problems = [f"missing {key}" for key in sorted(set(expected) - given)]
    problems += [f"unexpected {key}" for key in sorted(given - set(expected))]
    for key, value in expected.items():
        if key in weights and weights[key].shape != value.shape:
            problems.append(f"{key} is {tuple(weights[key].shape)}, expected {tuple(value.shape)}")
        elif key in weights and not weights[key].is_floating_point():
            problems.append(f"{key} holds {str(weights[key].dtype).removeprefix('torch.')}, no floating-point numbers")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{path} does not fit the configured model: {'; '.join(problems[:3])}{more}")


def validate_weights(path: Path, model_config: ModelConfig) -> None:
    """A checkpoint opens safely, is finite, and has exactly the keys and shapes that `model_config` asks for.

    Raises:
        UserError: says what is wrong.
    """
    weights = extract_weights(read_tensors(path), path)
    check_finite(weights, path)
    check_fits(weights, model_config, path)
