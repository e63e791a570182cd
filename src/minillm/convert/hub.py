"""The Hugging Face hub, through huggingface_hub, which is imported where it is used. The token comes from HF_TOKEN, and
from nowhere else."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm.atomic import put_in_place, temporary_path
from minillm.log import UserError, format_size, info

# What a model is read from: tensors, configuration and tokenizer. No code and no other program's formats.
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
# What is pushed besides. Pickles, optimizer state and logs, which may hold paths of this machine, stay here.
PUSHED_TOO = ("adapter_config.json", "modeling_*.py", "*.gguf", "LICENSE*")
CARD = "README.md"
CHECKPOINTS = ("best_model.pt", "last.pt")


@dataclass(frozen=True, kw_only=True)
class PushSettings:
    """Push a model to the hub"""

    source: str = field(
        metadata={"help": "an exported folder, a run folder (its best) or a checkpoint", "positional": True}
    )
    repo_id: str = field(metadata={"help": "where to: OWNER/NAME"})
    revision: str = field(default="", metadata={"help": "branch; made where there is none (default: main)"})
    public: bool = field(
        default=False, metadata={"help": "everybody may see a repository that is made (default: nobody)"}
    )
    dry_run: bool = field(default=False, metadata={"help": "list files and sizes, print the card, send nothing"})
    include: tuple[str, ...] = field(
        default=(), metadata={"help": "files of the folder that are left out otherwise, as in training_log.json"}
    )
    license: str = field(default="", metadata={"help": "for the card: apache-2.0, mit, ..."})
    language: tuple[str, ...] = field(default=(), metadata={"help": "for the card: en zh ..."})
    datasets: tuple[str, ...] = field(
        default=(), metadata={"help": "for the card: datasets on the hub it was trained on"}
    )
    base_model: str = field(default="", metadata={"help": "for the card: the model it was made from, OWNER/NAME"})
    no_check: bool = field(default=False, metadata={"help": "of a checkpoint: export it without checking the export"})


@dataclass(frozen=True, kw_only=True)
class PullSettings:
    """Pull a model from the hub"""

    repo_id: str = field(metadata={"help": "OWNER/NAME", "positional": True})
    output: str = field(metadata={"help": "folder to write; it must not exist or be empty"})
    revision: str = field(default="", metadata={"help": "branch, tag or commit (default: main)"})


def push(settings: PushSettings) -> None:
    """Send what is not there yet, in one commit: the repository is never half of a model.

    A push that was interrupted is given again: the hub keeps large files that arrived whole, and is asked first.

    Raises:
        UserError: there is nothing to push, no token, or the hub refuses or cannot be reached.
    """
    _require(settings.repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = _folder_to_push(settings, Path(temporary))
        files, left_out = _chosen(folder, settings.include)
        card = _card(folder, settings)
        if left_out:
            info(f"[push] not sent, unless --include names it: {', '.join(left_out)}")
        if settings.dry_run:
            for name, path in files.items():
                print(f"{format_size(path.stat().st_size):>10}  {name}")
            print(f"{format_size(len(card.encode())):>10}  {CARD}\n\n{card}")
            return
        _send(settings, {**files, CARD: card.encode()})


def _send(settings: PushSettings, contents: Mapping[str, Path | bytes]) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

    token = _token()
    if not token:
        raise UserError("pushing needs a token that may write, in the environment variable HF_TOKEN; it is not set")
    api, revision = HfApi(token=token), settings.revision or None
    with _explained(settings.repo_id, settings.revision):
        api.create_repo(settings.repo_id, private=not settings.public, exist_ok=True)
        if revision:
            api.create_branch(settings.repo_id, branch=revision, exist_ok=True)
        there = {
            file.path: file
            for file in api.list_repo_tree(settings.repo_id, recursive=True, revision=revision)
            if isinstance(file, RepoFile)
        }
        fresh = {name: content for name, content in contents.items() if not _same(content, there.get(name))}
        if skipped := [name for name in contents if name not in fresh]:
            info(f"[push] there already, not sent again: {', '.join(skipped)}")
        if fresh:
            size = format_size(sum(map(_size, fresh.values())))
            info(f"[push] sending {', '.join(fresh)} ({size})")
            api.create_commit(
                settings.repo_id,
                [CommitOperationAdd(name, content) for name, content in fresh.items()],
                commit_message="minillm push",
                revision=revision,
            )
        where = f"{api.endpoint}/{settings.repo_id}" + (f"/tree/{revision}" if revision else "")
        visible = "private" if api.model_info(settings.repo_id, revision=revision).private else "public"
    info(f"[push] {where} ({visible}): {len(fresh)} files sent, {len(skipped)} were there")


def pull(settings: PullSettings) -> None:
    """All files of a repository, in a folder. What was fetched before is not fetched again.

    Raises:
        UserError: the folder has something in it, or the hub refuses or cannot be reached.
    """
    output = Path(settings.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty: choose another --output")
    _require(settings.repo_id)
    from huggingface_hub import HfApi

    with _explained(settings.repo_id, settings.revision):  # asked first: else what was fetched before would do
        now = HfApi(token=_token() or False).model_info(settings.repo_id, revision=settings.revision or None).sha
    source = download(settings.repo_id, now or settings.revision, ())
    beside = temporary_path(output)
    try:
        shutil.copytree(source, beside)  # the cache has links to other places
        put_in_place(beside, output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    files = [path for path in output.rglob("*") if path.is_file()]
    size = format_size(sum(path.stat().st_size for path in files))
    info(f"[pull] {settings.repo_id} at {str(now)[:12]} -> {output}: {len(files)} files, {size}")


def download(repo_id: str, revision: str = "", files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder with a model's files from the hub, in huggingface_hub's cache: what is there is not fetched again.

    Args:
        repo_id: as in OWNER/NAME.
        revision: branch, tag or commit; empty is the main branch.
        files: patterns of names; none are all files.

    Raises:
        UserError: there is no such model, it may not be read, or the hub cannot be reached.
    """
    _require(repo_id)
    from huggingface_hub import snapshot_download

    with _explained(repo_id, revision):
        folder = snapshot_download(
            repo_id, revision=revision or None, allow_patterns=list(files) or None, token=_token() or False
        )
    return Path(folder)


def _token() -> str:
    return os.environ.get("HF_TOKEN", "").strip()


def _require(repo_id: str) -> None:
    """UserError unless huggingface_hub is there and the name is one that the hub can have."""
    try:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import disable_progress_bars, validate_repo_id
    except ImportError:
        raise UserError(
            f"{repo_id}: the hub is reached with huggingface_hub: pip install 'minillm-trainer[hub]'"
        ) from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        validate_repo_id(repo_id)
        named = repo_id.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise UserError(f"{repo_id} is no name that the hub can have: give OWNER/NAME, of letters, digits, - _ and .")


@contextmanager
def _explained(repo_id: str, revision: str) -> Iterator[None]:
    """What goes wrong with the hub, as a sentence for the user."""
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT

    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, errors.HfHubHTTPError) and not _is_network(cause):
            cause = cause.__cause__
        if isinstance(cause, errors.RevisionNotFoundError):
            said = f"{repo_id} on the hub has no revision {revision}"
        elif isinstance(cause, errors.GatedRepoError):
            said = f"{repo_id} on the hub is open to those only who have asked: accept its terms on its page first"
        elif isinstance(cause, errors.HfHubHTTPError):
            said = _refusal(repo_id, cause)
        elif cause is not None or (isinstance(error, OSError) and error.errno is None):  # with a number: the disk's
            said = f"the hub ({ENDPOINT}) cannot be reached or broke off: {_first_line(cause or error)}. Try again"
        elif isinstance(error, ValueError):
            said = f"the hub ({ENDPOINT}) and {repo_id}: {_first_line(error)}"
        else:
            raise
        raise UserError(said) from error


def _is_network(error: BaseException) -> bool:
    """An error of httpx (or httpx2, which versions of huggingface_hub differ in) on the way to the hub."""
    return any(each.__name__ == "TransportError" for each in type(error).__mro__)


def _refusal(repo_id: str, error: Any) -> str:
    code = error.response.status_code
    if code == 401 and _token():
        return "the hub does not accept the token in HF_TOKEN: it is wrong or has expired"
    if code in (401, 404):
        hint = "with the token in HF_TOKEN" if _token() else "without a token; a private one needs it in HF_TOKEN"
        return f"the hub has no repository {repo_id} that can be seen {hint}"
    if code == 403:
        return f"the token in HF_TOKEN may not do this to {repo_id}: it needs the right to write there"
    return f"the hub failed ({code}) with {repo_id}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _folder_to_push(settings: PushSettings, temporary: Path) -> Path:
    """The folder that is sent: the one given, or the export of a checkpoint."""
    from minillm.checkpoint.sharded import is_sharded

    source = Path(settings.source)
    if not source.exists():
        raise UserError(f"there is no folder or checkpoint {source}")
    checkpoint = source
    if source.is_dir() and not is_sharded(source):
        found = [source / name for name in CHECKPOINTS if (source / name).is_file()]
        if not found:
            return source
        checkpoint = found[0]
    if checkpoint.suffix == ".gguf":
        raise UserError(f"{source} is one file: push the folder it is in")
    from minillm.convert import export

    target = temporary / settings.repo_id.split("/")[1]
    export.run(export.ExportSettings(checkpoint=str(checkpoint), output=str(target), no_check=settings.no_check))
    for pattern in settings.include:  # of the run folder
        for path in source.glob(pattern) if source.is_dir() else ():
            shutil.copyfile(path, target / path.name)
    return target


def _chosen(folder: Path, include: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """What is sent besides the card, by name, and the names of what is not."""
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.name != CARD}
    wanted = (*MODEL_FILES, *PUSHED_TOO, *include)
    chosen = {name: path for name, path in files.items() if any(fnmatch.fnmatch(name, each) for each in wanted)}
    if not any(name.endswith((".safetensors", ".gguf")) for name in chosen):
        raise UserError(f"{folder} has no .safetensors or .gguf file: `minillm export` makes a folder of a checkpoint")
    for pattern in include:
        if not fnmatch.filter(chosen, pattern):
            raise UserError(f"--include {pattern}: there is no such file in {folder}")
    return chosen, [name for name in files if name not in chosen and not name.startswith(".")]


def _card(folder: Path, settings: PushSettings) -> str:
    """The folder's card, with what the flags say in its metadata."""
    from minillm.convert.card import with_metadata

    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# {settings.repo_id.split('/')[1]}\n"
    text = text.replace("'FOLDER'", repr(settings.repo_id))  # what an export's card loads
    given = {
        "license": settings.license, "language": list(settings.language), "datasets": list(settings.datasets),
        "base_model": settings.base_model,
    }  # fmt: skip
    return with_metadata(text, {name: value for name, value in given.items() if value})


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _same(content: Path | bytes, there: Any) -> bool:
    """Is this what the hub has? It tells the SHA-256 of large files and git's hash of the others."""
    if there is None or (there.lfs.size if there.lfs else there.size) != _size(content):
        return False
    digest = hashlib.sha256() if there.lfs else hashlib.sha1(f"blob {_size(content)}\0".encode())
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest() == (there.lfs.sha256 if there.lfs else there.blob_id)
