"""Raw weights as a full checkpoint: a folder (or file) with a bare state dict of ours or of another program becomes a
folder that every command takes. What nobody knows any more is said to be unknown.

L length, V vocabulary.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.atomic import put_in_place
from minillm.log import UserError, info, warn

if TYPE_CHECKING:
    from torch import Tensor

    from minillm.convert.source import Source
    from minillm.models.config import ModelConfig
    from minillm.models.transformer import LanguageModel
    from minillm.text.tokenizer import Tokenizer

# Keys of a full checkpoint about which a state dict says nothing.
UNKNOWN: dict[str, Any] = {
    "optimizer_state_dict": {}, "scheduler_state_dict": {}, "scaler_state_dict": {}, "train_config": {},
    "training_config": {}, "training_stats": {}, "data_state": {}, "method_state": {}, "rng_state": {},
    "training_log": [], "validation_log": [], "epoch": None, "best_loss": None, "best_val_loss": None,
    "best_validation_loss": None,
}  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROBE_LENGTH = 64  # tokens of each of the two rows whose logits are compared
TOLERANCE = 1e-4  # how far logits may be apart, as a share of the largest; float32 in another order differs by 1e-6


@dataclass(frozen=True, kw_only=True)
class RawSettings:
    """Raw weights as a full checkpoint"""

    input_dir: str = field(
        default="",
        metadata={"help": "folder or file with bare weights (.safetensors, .bin, .pth, .pt); nothing in it is changed"},
    )
    output_dir: str = field(
        default="", metadata={"help": "folder to write: best_model.pt, its tokenizer, its configurations, a card"}
    )
    training_steps: int = field(
        default=0, metadata={"help": "how many steps the weights were trained for, where you know", "min": 0}
    )
    num_attention_heads: int = field(
        default=0, metadata={"help": "where neither a configuration nor the shapes tell", "min": 0}
    )
    num_experts_per_tok: int = field(default=0, metadata={"help": "experts that a token visits, likewise", "min": 0})
    rope_theta: float = field(default=0.0, metadata={"help": "base of the rotary embedding, likewise", "min": 0.0})
    rms_norm_eps: float = field(default=0.0, metadata={"help": "epsilon of the norms, likewise", "min": 0.0})

    @property
    def given(self) -> dict[str, Any]:
        """The flags about the model that were given."""
        names = ("num_attention_heads", "num_experts_per_tok", "rope_theta", "rms_norm_eps")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


@dataclass
class Understood:
    """Weights as we have them, and as Hugging Face has them."""

    style: str  # for people
    config: ModelConfig
    family: dict[str, Any]
    weights: dict[str, Tensor]  # under our names
    facts: dict[str, tuple[Any, str]]  # value, and where it comes from
    own_tokens: bool  # token ids may mean what they mean in the shipped tokenizer
    hugging_face: tuple[dict[str, Any], dict[str, Tensor]] | None  # config.json and weights, where transformers has it

    def lines(self, source: Source) -> list[str]:
        """A line for each origin of facts, for people."""
        names = {"configuration": f"by {source.config_name}", "shapes": "by the shapes", "weights": "by the weights"}
        lines: dict[str, list[str]] = {}
        for name, (value, origin) in self.facts.items():
            lines.setdefault(names.get(origin, origin), []).append(f"{name} {value}")
        return [f"{origin.replace('--', 'by --')}: {', '.join(values)}" for origin, values in lines.items()]


def convert_raw(settings: RawSettings, tokenizer: str) -> None:
    """Write the output folder beside, verify it, and rename it.

    Args:
        tokenizer: what --tokenizer says, or "".

    Raises:
        UserError: the input cannot be understood, the output exists and is no earlier conversion, or the reloaded
            checkpoint computes something else.
    """
    import torch

    from minillm.checkpoint.files import save_tensors
    from minillm.checkpoint.loader import load_weights
    from minillm.checkpoint.model import open_checkpoint
    from minillm.convert.source import read_source
    from minillm.models.transformer import LanguageModel

    output = Path(settings.output_dir)
    check_output(output, Path(settings.input_dir))
    source = read_source(Path(settings.input_dir))
    understood = understand(source, settings.given)
    _tell_input(source, understood)
    text, said, place = find_tokenizer(source, understood, tokenizer)
    for line in said:
        info(f"[convert] tokenizer: {line}")
    model = LanguageModel(understood.config).eval()
    load_weights(model, understood.weights, str(source.files[0]), strict=True)
    steps = settings.training_steps or source.step
    beside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    beside.mkdir(parents=True)
    try:
        file = beside / "best_model.pt"
        save_tensors(file, _content(source, understood, model, text, steps))
        with torch.inference_mode():
            verified = _verify(open_checkpoint(str(file)).model, model, understood)
        info(f"[convert] verified: {verified}")
        values = sum(value.numel() for value in model.state_dict().values())
        info(f"[convert] after:  {output / file.name}, {_megabytes(file)}, {values:,} values in float32")
        _write_files(beside, output, source, understood, text, settings, verified)
        if place is not None and (place / "tokenizer.model").is_file():  # for programs that read nothing else
            shutil.copyfile(place / "tokenizer.model", beside / "tokenizer.model")
        put_in_place(beside, output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    unknown = f"{'' if steps else 'the number of steps, '}optimizer state, losses and settings of the training"
    info(f"[convert] unknown: {unknown}. A run starts from it with --pretrained_path; it cannot be resumed")


def check_output(output: Path, source: Path) -> None:
    """Raises UserError where the output would change the input, or is somebody else's."""
    if not source.exists():
        raise UserError(f"there is no folder or file {source}")
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"--output_dir {output} holds the input, which is never changed: choose another folder")
    if source.is_dir() and source.resolve() in output.resolve().parents:
        raise UserError(f"--output_dir {output} is inside the input, which is never changed: choose another folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        earlier = "converted_from" in json.loads((output / "training_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        earlier = False
    if not earlier:
        raise UserError(f"{output} exists and is no earlier conversion: choose another --output_dir")


def understand(source: Source, given: dict[str, Any]) -> Understood:
    """Which model it is.

    Args:
        given: values of flags by name.

    Raises:
        UserError: as `recognise`.
    """
    from minillm.checkpoint.loader import ARCHITECTURES, REST_KEY, dictionary, infer_model_config
    from minillm.convert.recognise import recognise
    from minillm.models.config import ModelConfig
    from minillm.models.dialects import config_from, config_to, weights_from, weights_to

    values = source.config or {}
    if "minillm" not in values and REST_KEY not in source.weights:
        found = recognise(source.weights, source.config, given, str(source.files[0]))
        config = config_from(found.config)
        weights = weights_from(found.weights, found.config["model_type"], config)
        facts = {name: (found.config[name], origin) for name, origin in found.origins.items()}
        there = (found.config, found.weights)
        return Understood(found.style, config, {"architecture": "ar"}, weights, facts, found.own_tokens, there)
    if "minillm" in values:
        config, origin = ModelConfig.from_dict(dictionary(values["minillm"], "minillm in config.json")), "configuration"
        family = dictionary(values.get("minillm_family") or {"architecture": "ar"}, "minillm_family in config.json")
        if family.get("architecture") not in ARCHITECTURES:
            raise UserError(f"config.json: minillm_family names none of the families {', '.join(ARCHITECTURES)}")
    else:
        config, origin = infer_model_config(source.weights), "assumed: what MiniLLM has"
        family = {"architecture": "sdd", "denoiser": config.denoiser}
    for name, value in given.items():
        if getattr(config, name) != value:
            told = getattr(config, name)
            raise UserError(f"{source.files[0]}: {name} is {told}, --{name} says {value}: leave the flag out")
    weights = weights_from(source.weights, str(values.get("model_type", "")), config)
    facts = {name: (getattr(config, name), origin) for name in ("hidden_size", "num_hidden_layers", "rope_theta")}
    known = family["architecture"] == "ar" and not config.value_head
    there_too = (config_to(config), weights_to(weights, config)) if known else None
    return Understood("MiniLLM", config, family, weights, facts, True, there_too)


def find_tokenizer(
    source: Source, understood: Understood, given: str
) -> tuple[Tokenizer, tuple[str, ...], Path | None]:
    """The tokenizer named by the user, else the input's own, else the shipped one where it may be that; what was done
    for it, for people; and the folder it was in. Tokens that our stages need and it lacks get rows in the weights.

    Raises:
        UserError: there is none, or it is of another vocabulary.
    """
    from minillm.checkpoint.folders import with_rows
    from minillm.text.imported import import_tokenizer
    from minillm.text.tokenizer import CONTROL_TOKENS, Tokenizer

    size = understood.config.vocab_size
    places = (Path(given),) if given else source.folders
    if given and not (places[0].is_dir() or (places[0].is_file() and places[0].name in TOKENIZER_FILES)):
        raise UserError(
            f"--tokenizer {given}: name a folder with {' or '.join(TOKENIZER_FILES)}, or one of these files"
        )
    place = next((each for each in places if any((each / name).is_file() for name in TOKENIZER_FILES)), places[-1])
    place = place.parent if place.is_file() else place
    found = import_tokenizer(place, size, source.config or {})
    if found is None:
        if given or not understood.own_tokens or Tokenizer.load().vocab_size != size:
            where = f"in {given}" if given else f"beside {source.files[0]}"
            raise UserError(
                f"there is no tokenizer {where}, and the shipped one is not known to be that of these weights "
                f"({understood.style}, a vocabulary of {size}): name theirs with --tokenizer"
            )
        warn(f"there is no tokenizer beside {source.files[0]}: the shipped one, with as many entries, is assumed")
        return Tokenizer.load(), (), None
    entries = len(found.tokenizer.byte_lengths)
    if found.rows > size + (len(CONTROL_TOKENS) if found.said else 0) or found.tokenizer.vocab_size < size:
        raise UserError(
            f"the tokenizer in {place} has {entries} entries with its control tokens, the weights have a vocabulary of "
            f"{size}: name the one they were trained with (--tokenizer)"
        )
    understood.weights = with_rows(understood.weights, found.rows)
    understood.config = replace(understood.config, vocab_size=found.rows)
    return found.tokenizer, found.said, place


def _content(
    source: Source, understood: Understood, model: LanguageModel, text: Tokenizer, steps: int | None
) -> dict[str, Any]:
    """A full checkpoint in which what is unknown is empty, and named."""
    from minillm.checkpoint.files import sha256
    from minillm.checkpoint.format import build_checkpoint
    from minillm.models.transformer import count_parameters

    parent = source.files[0] if len(source.files) == 1 else source.path
    nothing: dict[str, Any] = {
        "step": 0, "epoch": 0.0, "best_value": None, "best_is_validation": False, "training_log": [],
        "validation_log": [], "elapsed": 0.0, "no_improvement_count": 0, "tokens_seen": 0, "skipped_steps": 0,
    }  # fmt: skip
    content = build_checkpoint(
        architecture=understood.family["architecture"],
        stage=_stage(source, understood),
        model_state=model.state_dict(),
        model_config=understood.config,
        optimizer_state={},
        scheduler_state={},
        scaler_state={},
        train_config={},
        progress=nothing,
        model_name=source.name,
        parameters=count_parameters(model),
        parent={"path": str(parent), "sha256": sha256(parent), "stage": None, "step": None},
        tokenizer=text.to_dict(),
        data_state={},
        method_state={},
        family=understood.family,
        ema_state=None,
        adapter=None,
    )
    del content["progress"]  # a run is resumed from it
    unknown = [*UNKNOWN, *([] if steps else ["global_step", "step"])]
    return {**content, **UNKNOWN, "global_step": steps, "step": steps, "unknown": unknown}


def _stage(source: Source, understood: Understood) -> str:
    """The stage in the file's name; else that of an imported model, or for our own weights "": unknown."""
    from minillm.checkpoint.folders import IMPORTED
    from minillm.stages import stage_in_name

    return stage_in_name(source.name) or ("" if understood.style == "MiniLLM" else IMPORTED)


# --- verifying ---


def _verify(reloaded: LanguageModel, built: LanguageModel, understood: Understood) -> str:
    """Compare logits [2, L, V] of the written checkpoint with those of the input weights in transformers, where it is
    installed and knows the model, else with those of the model before it was written.

    Raises:
        UserError: they are not the same.
    """
    import torch

    length = min(PROBE_LENGTH, built.config.max_position_embeddings)
    size = built.config.vocab_size if understood.hugging_face is None else understood.hugging_face[0]["vocab_size"]
    tokens = torch.randint(size, (2, length), generator=torch.Generator().manual_seed(0))
    theirs, runtime = _in_transformers(tokens, understood)
    expected = built.logits(built(tokens).hidden) if theirs is None else theirs
    logits = reloaded.logits(reloaded(tokens).hidden)[..., : expected.shape[-1]]  # without rows that were added
    apart, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    if not apart <= TOLERANCE * max(1.0, largest):  # also where one is NaN
        raise UserError(
            f"the checkpoint computes other logits than {runtime}: up to {apart:.2e} apart (the largest is "
            f"{largest:.3g}), so nothing was written. A value that was assumed or given (see above) may be wrong"
        )
    return f"its logits, reloaded, are those of {runtime} (2 x {length} tokens, at most {apart:.1e} apart)"


def _in_transformers(tokens: Tensor, understood: Understood) -> tuple[Tensor | None, str]:
    """Logits [2, L, V] of the input weights in transformers, and which model of it; else None and what is compared."""
    from importlib.util import find_spec

    ours = "the model in memory, before it was written"
    if understood.hugging_face is None:
        return None, f"{ours} (transformers has no such model)"
    if find_spec("transformers") is None:
        return None, f"{ours} (transformers is not installed)"
    from minillm.convert.reference import logits_of

    config, weights = understood.hugging_face
    return logits_of(config, weights, tokens)


# --- what is written and said ---


def _megabytes(*files: Path) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.2f} MB"


def _tell_input(source: Source, understood: Understood) -> None:
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in source.weights.values()})
    values = sum(value.numel() for value in source.weights.values())
    files = str(source.files[0]) if len(source.files) == 1 else f"{source.files[0].parent} ({len(source.files)} files)"
    info(f"[convert] before: {files}, {_megabytes(*source.files)}, {values:,} values in {', '.join(kinds)}")
    prefixes = f" behind {' '.join(source.prefixes)}" if source.prefixes else ""
    info(f"[convert] these are the key names of {understood.style}{prefixes}")
    if understood.config.tie_word_embeddings and {"lm_head.weight", "output.weight"} & set(source.weights):
        info("[convert]   its head is the embedding, which is written once from here on")
    for line in understood.lines(source):
        info(f"[convert]   {line}")


def _write_files(
    folder: Path,
    output: Path,
    source: Source,
    understood: Understood,
    text: Tokenizer,
    settings: RawSettings,
    verified: str,
) -> None:
    """Everything beside best_model.pt."""
    from minillm.checkpoint.files import sha256
    from minillm.convert.huggingface import generation_config, hf_config

    steps = settings.training_steps or source.step
    note = f"unknown: converted from raw weights ({source.name}), which say nothing about the training"
    log = [{"step": steps, "loss": None, "perplexity": None, "learning_rate": None, "note": note}]
    training = {
        "run_name": source.name,
        "stage": _stage(source, understood) or None,
        "architecture": understood.family["architecture"],
        "total_steps": steps,
        "converted_from": {
            "path": str(source.path),
            "sha256": {file.name: sha256(file) for file in source.files},
            "key_names": understood.style,
            "facts": {name: {"value": value, "from": origin} for name, (value, origin) in understood.facts.items()},
            "steps_from": "--training_steps" if settings.training_steps else ("the file" if steps else None),
        },
        "unknown": "every setting of the training",
    }
    for name, content in (
        ("config.json", hf_config(understood.config, text, understood.family)),
        ("generation_config.json", generation_config(text)),
        ("training_config.json", training),
        ("training_log.json", log),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text.save(folder)
    (folder / "README.md").write_text(_card(output, source, understood, steps, verified), encoding="utf-8")


def _card(output: Path, source: Source, understood: Understood, steps: int | None, verified: str) -> str:
    """README.md of the output."""
    from minillm.convert.card import table

    config = understood.config
    rows = [
        ("made from", f"{source.path} (key names of {understood.style})"),
        ("family", understood.family["architecture"]),
        ("model", f"width {config.hidden_size}, {config.num_hidden_layers} layers, vocabulary {config.vocab_size}"),
        ("steps trained", f"{steps:,}, as told" if steps else "unknown"),
        ("losses, data, settings and optimizer state", "unknown: weights say nothing about them"),
        ("verified", verified),
    ]
    facts = "\n".join(f"- {line}" for line in understood.lines(source))
    checkpoint = output / "best_model.pt"
    return (
        f"# {source.name}\n\n{table(rows)}\n\nWhat was found out about the model:\n\n{facts}\n\n"
        f'Converted by MiniLLM. `minillm generate --checkpoint {checkpoint} --prompt "..."` writes with it, and '
        f"`minillm sft --pretrained_path {checkpoint}` trains on.\n"
    )
