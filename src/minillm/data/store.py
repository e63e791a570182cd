"""Token ids on disk: every input is tokenized once, into arrays that are mapped into memory.

A store is a folder in a cache: `tokens.bin` (uint16 or uint32), `offsets.npy` (where each document begins and
ends), `places.npy` (file and line of each document), `meta.json` (counts, hashes, and what was not usable);
conversations and pairs also have `mask.bin` (1 = trained). The folder's name ends in a fingerprint of the
input bytes, the tokenizer and this format: a store is reused exactly as long as it would be rebuilt the same.
It is written beside and renamed: two processes may build the same one, the first to finish wins.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minillm import log
from minillm.data.encode import READERS, Counts, chunks, encoded
from minillm.data.files import RowReport, find_files
from minillm.data.shards import CONFIG_FILE, is_prepared_text, map_part, read_config
from minillm.log import UserError

if TYPE_CHECKING:
    from minillm.text.tokenizer import Tokenizer

FORMAT_VERSION = 2
CACHE_FOLDER = ".minillm_cache"
STALE_SECONDS = 24 * 3600
PREPARED_SUFFIXES = (".bin", ".npy")


@dataclass(frozen=True)
class TokenStore:
    """Token ids of N documents, mapped into memory (read-only).

    tokens: uint16 or uint32 [T], or a ShardedTokens of several files, which has slices only; mask: uint8 [T]
    (1 = trained), None for texts; offsets: int64 [N+1];
    places: int64 [N, 2], index into `files` and line. A pair is two documents: 2i chosen, 2i+1 rejected.
    """

    folder: Path
    kind: str
    tokens: np.ndarray
    mask: np.ndarray | None
    offsets: np.ndarray
    places: np.ndarray
    files: tuple[str, ...]
    bytes_per_token: float  # UTF-8 bytes of what is trained on, per trained token
    report: RowReport

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    def place(self, document: int) -> str:
        """Where a document came from, as file:line."""
        if not len(self.places):
            return f"{self.folder}:{document + 1}"
        file, line = self.places[document]
        return f"{self.files[file]}:{line}"


def build_store(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    kind: str,
    cache_dir: str | Path | None = None,
    num_workers: int = 0,
) -> TokenStore:
    """The store of `path`, from the cache when unchanged, otherwise tokenized now.

    kind: "texts", "conversations" or "pairs". num_workers: processes that tokenize a large input; 0 and 1
    mean the threads of the tokenizer. Raises UserError when there is no usable row or no room for the cache.
    """
    files = find_files(path)
    fingerprint = _fingerprint(files, tokenizer, kind)
    root = cache_root(path, cache_dir)
    name = re.sub(r"[^\w.-]+", "_", Path(path).name).strip("._") or "data"
    folder = root / f"{name}-{kind}-{fingerprint[:16]}"
    if folder.exists():
        problem = store_problem(folder, fingerprint)
        if not problem:
            store = _renamed(_open_store(folder), str(path), tuple(map(str, files)))
            store.report.log()
            return store
        log.warn(f"the cached tokens in {folder} are damaged ({problem}); they are made again from {path}")
    beside = root / f".{folder.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.building"
    try:
        beside.mkdir(parents=True)
        _remove_stale(root)
        _write_store(beside, path, files, tokenizer, kind, fingerprint, num_workers)
        _put_in_place(beside, folder, fingerprint)
    except OSError as error:
        raise UserError(
            f"The tokens of {path} could not be written to {root}: {error.strerror or error}. "
            "Set MINILLM_CACHE_DIR to a folder with room."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return _open_store(folder)


def cache_root(path: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The folder for caches: `cache_dir`, else $MINILLM_CACHE_DIR, else `.minillm_cache` beside the data,
    else (when nothing may be written there) the user's cache folder.

    Raises UserError when none can be written.
    """
    chosen = cache_dir or os.environ.get("MINILLM_CACHE_DIR")
    if chosen:
        candidates = [Path(chosen).expanduser()]
    else:
        beside = Path(path) if Path(path).exists() else Path(re.split(r"[*?\[]", str(path))[0])
        while not beside.is_dir():
            beside = beside.parent
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillm"
        candidates = [beside / CACHE_FOLDER, user]
    for candidate in candidates:
        if _writable(candidate):
            return candidate
    raise UserError(
        f"No cache for tokens can be written to {' or '.join(map(str, candidates))}. "
        "Set MINILLM_CACHE_DIR to a folder that can."
    )


def _writable(folder: Path) -> bool:
    """Tries it. A folder whose mode forbids writing to everyone counts as read-only even for root."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        if not existing.stat().st_mode & 0o222:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _fingerprint(files: list[Path], tokenizer: Tokenizer, kind: str) -> str:
    digest = hashlib.sha256(f"{FORMAT_VERSION} {kind} {tokenizer.fingerprint}\n".encode())
    for file in files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """Of a file's bytes, in hex. Raises UserError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()


def _write_store(
    folder: Path,
    path: str | Path,
    files: list[Path],
    tokenizer: Tokenizer,
    kind: str,
    fingerprint: str,
    workers: int,
) -> None:
    """Tokenizes the input into `folder`, chunk by chunk, so that memory stays bounded."""
    started = time.monotonic()
    dtype = "uint16" if tokenizer.vocab_size <= 65_536 else "uint32"
    report = RowReport(str(path))
    counts = Counts()
    size = sum(file.stat().st_size for file in files)
    lengths, places = [], []
    files_seen: dict[str, int] = {}
    with (
        open(folder / "tokens.bin", "wb") as tokens,
        open(folder / "mask.bin", "wb") as masks,
        log.progress(size // 1_000 + 1, f"[data] tokenizing {path} (KB)") as bar,
    ):
        rows = chunks(READERS[kind](path, report), kind, files_seen)
        for chunk in encoded(rows, kind, tokenizer, dtype, workers if size > 32_000_000 else 0):
            tokens.write(chunk.tokens.tobytes())
            masks.write(chunk.mask.tobytes())
            lengths.append(chunk.lengths)
            places.append(chunk.places)
            counts.add(chunk.counts)
            bar.advance(report.bytes_read // 1_000 - bar.done)
    if not counts.trained_tokens:
        raise UserError(
            f"{path}: no token of any answer would be trained. The tokenizer's chat template does not mark "
            "answers as <|im_start|>assistant ... <|im_end|>."
        )
    if kind == "texts":
        (folder / "mask.bin").unlink()
    all_lengths = np.concatenate(lengths)
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(all_lengths)]).astype(np.int64))
    np.save(folder / "places.npy", np.concatenate(places))
    meta = {
        "format_version": FORMAT_VERSION, "fingerprint": fingerprint, "kind": kind, "dtype": dtype,
        "source": str(path), "files": list(files_seen), "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size, "documents": len(all_lengths), "tokens": counts.tokens,
        "trained_tokens": counts.trained_tokens, "text_bytes": counts.text_bytes, "report": report.to_dict(),
        "sha256": {file.name: file_sha256(file) for file in sorted(folder.iterdir())},
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
    report.log()
    seconds = max(time.monotonic() - started, 1e-9)
    log.info(
        f"[data] tokenized {path}: {report.used:,} rows, {counts.tokens:,} tokens in "
        f"{log.format_duration(seconds)} ({counts.tokens / seconds:,.0f} tokens/s)"
    )


def _put_in_place(beside: Path, folder: Path, fingerprint: str) -> None:
    """Renames the finished store. A damaged one in the way is moved aside; a good one (another process was
    faster) is kept."""
    for _ in range(10):
        try:
            os.rename(beside, folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if not store_problem(folder, fingerprint):
            return
        aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.building")
        try:
            os.rename(folder, aside)
        except FileNotFoundError:
            continue  # another process moved it away first
        shutil.rmtree(aside, ignore_errors=True)
    raise UserError(f"The cached tokens in {folder} cannot be replaced. Remove that folder and try again.")


def store_problem(
    folder: Path, fingerprint: str, record: str = "meta.json", names: Collection[str] | None = None
) -> str:
    """ "" when the store is whole, otherwise what is wrong with it. `record`: the file that has the hashes; `names`:
    the only files that matter."""
    try:
        meta = json.loads((folder / record).read_text(encoding="utf-8"))
        if meta["fingerprint"] != fingerprint:
            return f"{record} belongs to other data"
        for name, sha256 in meta["sha256"].items():
            if names is not None and name not in names:
                continue
            if not (folder / name).is_file():
                return f"{name} is missing"
            if file_sha256(folder / name) != sha256:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{record}: {error}"
    return ""


def _open_store(folder: Path) -> TokenStore:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return TokenStore(
        folder=folder,
        kind=meta["kind"],
        tokens=np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r"),
        mask=None if meta["kind"] == "texts" else np.memmap(folder / "mask.bin", dtype=np.uint8, mode="r"),
        offsets=np.load(folder / "offsets.npy", mmap_mode="r"),
        places=np.load(folder / "places.npy", mmap_mode="r"),
        files=tuple(meta["files"]),
        bytes_per_token=meta["text_bytes"] / max(meta["trained_tokens"], 1),
        report=RowReport.from_dict(meta["report"]),
    )


def _renamed(store: TokenStore, source: str, files: tuple[str, ...]) -> TokenStore:
    """The same content may have been tokenized under another path: places are given under the one asked for."""
    if store.files == files or len(store.files) != len(files):
        return store
    names = dict(zip(store.files, files))
    places: dict[str, list[str]] = {}
    for reason, kept in store.report.places.items():
        parts = [place.rpartition(":") for place in kept]
        places[reason] = [f"{names.get(file, file)}:{line}" for file, _, line in parts]
    return replace(store, files=files, report=replace(store.report, source=source, places=places))


def _remove_stale(root: Path) -> None:
    """Removes what builders that were killed left behind, once no builder can still be at work on it."""
    for left in root.glob(".*.building"):
        try:
            newest = max(p.stat().st_mtime for p in [left, *left.iterdir()])
        except OSError:
            continue
        if time.time() - newest > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def is_prepared(path: str | Path) -> bool:
    """Is this a file of token ids (.bin, .npy), the folder of a store or one of `minillm data prepare-text`?"""
    place = Path(path)
    if place.is_dir():
        return is_prepared_text(place) or (place / "tokens.bin").is_file() and (place / "meta.json").is_file()
    return place.is_file() and place.suffix in PREPARED_SUFFIXES


def open_prepared(path: str | Path, tokenizer: Tokenizer, *, kind: str, part: str = "train") -> TokenStore:
    """Token ids prepared before: the folder of a store, or (texts only) a .npy or .bin file of ids [T] or a folder
    of `minillm data prepare-text`, of which `part` is "train" or "val".

    A .bin file holds uint16 when the vocabulary has at most 65,536 entries, otherwise uint32.
    Raises UserError when it does not fit the tokenizer or the kind.
    """
    place = Path(path)
    if place.is_dir():
        if is_prepared_text(place):
            return _open_prepared_text(place, tokenizer, kind, part)
        return _open_prepared_folder(place, tokenizer, kind)
    if kind != "texts":
        raise UserError(f"{path}: a file of token ids can only be read by `minillm pretrain`.")
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 65_536 else "uint32")
    if place.stat().st_size < 2 * dtype.itemsize:
        raise UserError(f"{path} is empty: there are no tokens to read.")
    if place.suffix == ".npy":
        try:
            tokens: Any = np.load(place, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"{path} is not a readable .npy file: {error}") from error
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
            raise UserError(f"{path} must hold one row of whole numbers, not {tokens.dtype} {tokens.shape}.")
    else:
        if place.stat().st_size % dtype.itemsize:
            raise UserError(
                f"{path} is not a file of {dtype} token ids: its size is not a multiple of {dtype.itemsize}."
            )
        tokens = np.memmap(place, dtype=dtype, mode="r")
    for start in range(0, len(tokens), 1 << 24):
        piece = tokens[start : start + (1 << 24)]
        low, high = int(piece.min()), int(piece.max())
        if low < 0 or high >= tokenizer.vocab_size:
            raise UserError(
                f"{path} holds the id {low if low < 0 else high}, but the tokenizer has only "
                f"{tokenizer.vocab_size:,} entries. It was prepared with another tokenizer: "
                "give that one with --tokenizer."
            )
    sample = tokens[: 1 << 20].tolist()
    return TokenStore(
        folder=place,
        kind=kind,
        tokens=tokens,
        mask=None,
        offsets=np.array([0, len(tokens)], dtype=np.int64),
        places=np.zeros((0, 2), dtype=np.int64),
        files=(str(path),),
        bytes_per_token=tokenizer.token_bytes(sample) / len(sample),
        report=RowReport(str(path), used=1),
    )


def _open_prepared_folder(folder: Path, tokenizer: Tokenizer, kind: str) -> TokenStore:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        found = (meta["kind"], meta["tokenizer"], meta["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a folder of prepared tokens: meta.json: {error}") from error
    if found[0] != kind:
        raise UserError(f"{folder} holds {found[0]}, but {kind} are needed here.")
    if found[1] != tokenizer.fingerprint:
        raise UserError(f"{folder} was prepared with another tokenizer; give that one with --tokenizer.")
    problem = store_problem(folder, found[2])
    if problem:
        raise UserError(f"The prepared tokens in {folder} are damaged: {problem}. Prepare them again.")
    return _open_store(folder)


def _open_prepared_text(folder: Path, tokenizer: Tokenizer, kind: str, part: str) -> TokenStore:
    try:
        config = read_config(folder)
        if kind != "texts":
            raise UserError(f"{folder} holds texts, but {kind} are needed here.")
        if config["tokenizer"] != hashlib.sha256(tokenizer.json_text.encode()).hexdigest():
            raise UserError(f"{folder} was prepared with another tokenizer; give its own: --tokenizer {folder}")
        if not config[part]:
            raise UserError(f"{folder} has no {part} tokens.")
        names = [*config[part]["files"], config[part]["offsets"]]
        problem = store_problem(folder, config["fingerprint"], CONFIG_FILE, names)
        if problem:
            raise UserError(f"The prepared tokens in {folder} are damaged: {problem}. Prepare them again.")
        tokens, offsets = map_part(folder, part)
        return TokenStore(
            folder=folder,
            kind=kind,
            tokens=tokens,
            mask=None,
            offsets=offsets,
            places=np.zeros((0, 2), dtype=np.int64),
            files=tuple(config["source"]["names"]),
            bytes_per_token=config[part]["text_bytes"] / config[part]["tokens"],
            report=RowReport.from_dict(config["report"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a folder of prepared tokens: {CONFIG_FILE}: {error}") from error
