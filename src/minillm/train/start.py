"""Where a run starts: the checkpoint it resumes or the weights it begins with, and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minillm import processes
from minillm.checkpoint.compressed import SUFFIXES
from minillm.checkpoint.files import check_finite, check_fits, extract_weights, peek, read_tensors, sha256
from minillm.checkpoint.folders import checkpoint_path, read_checkpoint, saved_architecture
from minillm.checkpoint.format import check_full
from minillm.checkpoint.loader import CheckpointLoader, config_of, family_of, flat_name, load_weights
from minillm.checkpoint.model import tokenizer_of
from minillm.checkpoint.safety import tensors_in
from minillm.checkpoint.sharded import is_sharded, read_sharded, sharded_checkpoints, step_of
from minillm.config import UsageError
from minillm.data.instructions import is_prepared_instructions
from minillm.data.shards import is_prepared_text
from minillm.families.base import Family
from minillm.families.settings import FamilyConfig
from minillm.log import UserError, info, warn
from minillm.models.config import LINEAR_LAYERS, ModelConfig, ModelSettings, build_model_config
from minillm.models.lora import LoraConfig, add_adapter, without_adapters
from minillm.models.transformer import LanguageModel
from minillm.stages import STAGES
from minillm.text.tokenizer import Tokenizer
from minillm.train.settings import LoraSettings, Settings

LORA_STAGE_RANK = 8  # of `minillm lora` where no rank is given


@dataclass(frozen=True)
class Start:
    """What a run begins with; at most one of `resumed` and `source` is there."""

    family: FamilyConfig
    folder: Path  # of the run, where the sizes are not the checkpoint's own
    resumed: dict[str, Any] | None = None  # a full checkpoint
    resumed_path: Path | None = None
    source: Path | None = None  # weights
    content: Any = None  # what is in `source`


def find_start(stage: str, settings: Settings) -> Start:
    """Find the checkpoint to go on from or the weights to begin with, and the family they decide.

    Raises:
        UserError: a checkpoint cannot be used, or is of another stage or architecture than asked for.
    """
    run, architecture = settings.run, settings.family.architecture
    sizes = build_model_config(settings.model, vocab_size=1, max_seq_len=0, causal=True)
    if not architecture:
        named = run.resume_from if run.resume_from not in ("", "auto") else run.pretrained_path
        architecture = _architecture_of(checkpoint_path(named)) if named else "ar"
    folder = Path(run.out_dir) / flat_name(stage, sizes.hidden_size, sizes.use_moe, architecture)
    found = find_resume(folder, run.resume_from)
    if found is not None:
        content, path = found
        if (content["stage"], content["architecture"]) != (stage, architecture):
            raise UserError(
                f"{path} is of stage {content['stage']} ({content['architecture']}), not {stage} ({architecture})"
            )
        saved = FamilyConfig.from_dict(family_of(content, path))
        return Start(settings.family.resolve(saved), folder, resumed=content, resumed_path=path)
    source = find_pretrained(stage, settings, sizes.hidden_size, architecture)
    if source is None:
        return Start(settings.family.resolve(FamilyConfig(architecture)), folder)
    content = read_checkpoint(source)
    saved = FamilyConfig.from_dict(family_of(content, source))
    if saved.architecture != architecture:
        raise UserError(
            f"{source} is a model of architecture {saved.architecture}, not {architecture}. An ar model becomes one of "
            f"another family with: minillm convert --checkpoint {source} --to {architecture} --output NEW.pt"
        )
    # The steps over which attention opened are behind it; flat weights, which do not say, come from a finished run.
    done = content.get("global_step", saved.anneal_steps) if isinstance(content, dict) else 0
    saved = replace(saved, anneal_steps=max(0, saved.anneal_steps - (done or 0)))
    return Start(settings.family.resolve(saved), folder, source=source, content=content)


def find_resume(folder: Path, resume_from: str) -> tuple[dict[str, Any], Path] | None:
    """The checkpoint to go on from: the one named, or with "auto" the newest good one of the run folder. The main
    process looks for it, and the others read what it found.

    Raises:
        UserError: a named checkpoint cannot be used, or every file of the folder is damaged.
    """
    if not resume_from:
        return None
    contents: list[dict[str, Any]] = []

    def look() -> Path | None:
        found = _find_resume(folder, resume_from)
        contents.extend([found[0]] if found else [])
        return found[1] if found else None

    path = processes.main_only(look)
    if path is None:
        return None
    return (contents[0] if contents else _read_again(path)), path


def _read_again(path: Path) -> dict[str, Any]:
    """What the main process has found to be right; where it can be, with the tensors left on disk."""
    if is_sharded(path):
        return read_sharded(path, verify=False)
    content: dict[str, Any] = read_tensors(path) if path.suffix in SUFFIXES else peek(path)
    return content


def _find_resume(folder: Path, resume_from: str) -> tuple[dict[str, Any], Path] | None:
    if resume_from != "auto":
        path = Path(resume_from)
        return _full_checkpoint(path), path
    existing = newest_first(folder)
    for path in existing:
        try:
            return _full_checkpoint(path), path
        except UserError as error:
            warn(f"{error}; trying an older checkpoint")
    if existing:
        raise UserError(f"no checkpoint in {folder} can be read; start anew without --resume_from")
    info(f"[run] --resume_from auto: no checkpoint in {folder} yet, starting from the beginning")
    return None


def newest_first(folder: Path) -> list[Path]:
    """What a run in this folder can go on from, in the order in which to try it."""
    numbered = sorted(folder.glob("step_*.pt"), key=lambda path: int(path.stem.split("_")[1]), reverse=True)
    files = [path for path in (folder / "last.pt", *numbered, folder / "best_model.pt") if path.exists()]
    shards = sharded_checkpoints(folder)
    newer = files and shards and _step_of(files[0]) >= step_of(shards[0])
    return [*files, *shards] if newer else [*shards, *files]


def _step_of(path: Path) -> int:
    """The step of a file; of one that cannot be read 0."""
    try:
        return int(peek(path)["global_step"])
    except (UserError, KeyError, TypeError, ValueError):
        return 0


def _full_checkpoint(path: Path) -> dict[str, Any]:
    content = read_sharded(path) if is_sharded(path) else read_tensors(path)
    check_full(content, path)
    weights = without_adapters(content["model_state_dict"]) if content.get("adapter") else content["model_state_dict"]
    for part in ("model_state_dict", "ema_state_dict", "optimizer_state_dict"):
        check_finite(tensors_in(content.get(part), part), path)
    check_fits(weights, config_of(content, path), path)
    return content


def find_pretrained(stage: str, settings: Settings, hidden_size: int, architecture: str) -> Path | None:
    """The weights a stage starts from. Pretraining starts from a checkpoint only if one is named."""
    start = STAGES[stage].starts_from
    if start is None:
        if settings.run.pretrained_path:
            CheckpointLoader.resolve_checkpoint_path(settings.run.pretrained_path)
            return checkpoint_path(settings.run.pretrained_path)
        return None
    found = CheckpointLoader.resolve_checkpoint_path(
        settings.run.pretrained_path or None,
        start,
        hidden_size,
        settings.model.use_moe,
        local_dir=None if settings.run.load_from_remote else settings.run.out_dir,
        architecture=architecture,
    )
    if found is None:
        warn("No pretrained checkpoint found: starting from random weights")
    return checkpoint_path(found) if found else None


def _architecture_of(path: Path) -> str:
    """The family a checkpoint is of."""
    return saved_architecture(path) or str(family_of(read_tensors(path), path)["architecture"])


def check_sizes(settings: ModelSettings, config: ModelConfig, source: Path) -> None:
    """The sizes given as flags must be those of the checkpoint. Raises UserError naming the first that is not."""
    wanted = asdict(settings)
    preset = wanted.pop("model_config")
    if preset:
        built = build_model_config(settings, vocab_size=config.vocab_size, max_seq_len=0, causal=config.causal)
        wanted |= {"hidden_size": built.hidden_size, "num_hidden_layers": built.num_hidden_layers}
    for name, value in wanted.items():
        if name in ("num_experts", "num_experts_per_tok") or not value:
            continue
        if getattr(config, name) != value:
            raise UserError(f"{source} has {name} {getattr(config, name)}, --{name} says {value}: leave the flag out")


def lora_config(stage: str, settings: LoraSettings) -> LoraConfig | None:
    """The adapter that is trained, or None: the weights are.

    Raises:
        UsageError: there is something said about an adapter, but not its rank.
    """
    rank = settings.lora_rank or (LORA_STAGE_RANK if stage == "lora" else 0)
    if not rank:
        if settings != LoraSettings():
            raise UsageError("--lora_alpha and --lora_targets say how an adapter is shaped: give --lora_rank, too")
        return None
    targets = LINEAR_LAYERS if "all" in settings.lora_targets else tuple(sorted(set(settings.lora_targets)))
    return LoraConfig(rank, settings.lora_alpha or 2.0 * rank, targets)


def _described(adapter: Mapping[str, Any] | None) -> str:
    if adapter is None:
        return "no adapter"
    return f"rank {adapter['rank']}, alpha {adapter['alpha']:g}, targets {' '.join(adapter['targets'])}"


def build_model(
    settings: Settings, start: Start, family: Family, tokenizer: Tokenizer, lora: LoraConfig | None
) -> tuple[LanguageModel, dict[str, Any] | None]:
    """The model with its starting weights and, if wanted, a new adapter; and what it started from (path, stage, step).

    Raises:
        UserError: the checkpoint does not fit the flags, or there is nothing that an adapter could lie on.
    """
    max_seq_len = settings.data.max_seq_len
    if start.resumed is not None:
        config = ModelConfig.from_dict(start.resumed["model_config"])
        check_sizes(settings.model, config, Path("the checkpoint to resume"))
        saved, asked = start.resumed.get("adapter"), lora.to_dict() if lora else None
        if saved != asked:
            raise UserError(
                f"the checkpoint to resume was trained with {_described(saved)}, the flags say {_described(asked)}: "
                "repeat the flags of the run"
            )
        model = LanguageModel(config)
        if lora is not None:
            add_adapter(model, lora, settings.run.seed)
        load_weights(model, start.resumed["model_state_dict"], "the checkpoint to resume", strict=True)
        return model, start.resumed["parent"]
    source, content = start.source, start.content
    if source is None:
        if lora is not None:
            raise UserError("an adapter needs a trained model to lie on, and none was found: give --pretrained_path")
        config = build_model_config(
            settings.model,
            vocab_size=tokenizer.vocab_size,
            max_seq_len=max_seq_len,
            causal=family.causal,
            denoiser=family.denoiser,
        )
        model = LanguageModel(config)
        model.init_weights(settings.run.seed)
        return model, None
    weights = extract_weights(content, source)
    check_finite(weights, source)
    config = config_of(content, source)
    check_fits(weights, config, source)
    check_sizes(settings.model, config, source)
    if config.denoiser != family.denoiser:
        raise UserError(f"{source} has the denoiser {config.denoiser!r}, --denoiser says {family.denoiser!r}")
    if max_seq_len > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_len {max_seq_len} is more than the {config.max_position_embeddings} positions of {source}"
        )
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{source} has a vocabulary of {config.vocab_size}, the tokenizer {tokenizer.vocab_size}")
    model = LanguageModel(config)
    load_weights(model, weights, str(source), strict=True)
    if lora is not None:
        add_adapter(model, lora, settings.run.seed)
    full = isinstance(content, dict) and "model_state_dict" in content
    parent = {
        "path": str(source), "sha256": sha256(source), "stage": content.get("stage") if full else None,
        "step": content.get("global_step") if full else None,
    }  # fmt: skip
    return model, parent


def open_tokenizer(settings: Settings, start: Start) -> Tokenizer:
    """That of the checkpoint, else the one the user names, else that of a prepared folder, else the shipped one. The
    chat template is a prepared folder's where there is one.

    Raises:
        UserError: a folder was prepared with another tokenizer than the checkpoint's, or than another folder.
    """
    if start.resumed is not None:
        return tokenizer_of(start.resumed, Path("."), "")
    found: Tokenizer | None = None
    named = start.source or Path(settings.data.tokenizer)
    if start.source is not None:
        found = tokenizer_of(start.content, start.source, settings.data.tokenizer)
    elif settings.data.tokenizer:
        found = Tokenizer.load(settings.data.tokenizer)
    template = ""  # of the prepared instructions so far
    for path, _ in settings.data.weighted_paths:
        folder = Path(path)
        texts = is_prepared_text(folder)
        if not (texts or is_prepared_instructions(folder)):
            continue
        prepared = Tokenizer.load(folder)
        if found is not None and prepared.json_text != found.json_text:
            raise UserError(
                f"{folder} was prepared with another tokenizer than that of {named}: prepare it with --tokenizer"
            )
        if not texts and template not in ("", prepared.chat_template):
            raise UserError(f"{folder} was prepared with another --template than the folders before it")
        if found is None or not texts:
            found, named, template = prepared, folder, "" if texts else prepared.chat_template
    return found or Tokenizer.load()
