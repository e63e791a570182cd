"""Can pretraining be skipped, and which checkpoint does SFT start from then? Every decision is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minillm.commands import display, say
from minillm.log import UserError
from minillm.pipeline.environment import Environment, flag_values


def find_pretrained(environment: Environment, *, skip: bool, force: bool) -> Path | None:
    """The valid pretrain checkpoint that makes pretraining unnecessary, or None when it has to run.

    It is looked for only with --skip-pretrain, and never with --force-pretrain. The first file that exists
    counts: when that one is damaged, pretraining runs.
    """
    if force:
        say("[stage] --force-pretrain: training from scratch, existing checkpoints are not looked at")
        return None
    if not skip:
        return None
    say("[stage] Looking for a pretrain checkpoint:")
    for origin, path in candidates(environment):
        if path is None:
            say(f"[stage]   {origin}: not set")
        elif not path.is_file():
            say(f"[stage]   {origin}: {display(path)} is not there")
        else:
            say(f"[stage]   {origin}: {display(path)}")
            return path if _is_valid(path, environment) else None
    say("[stage] No pretrain checkpoint found, will train from scratch")
    return None


def candidates(environment: Environment) -> list[tuple[str, Path | None]]:
    """(where it comes from, path) in the order in which they are tried."""
    from minillm.checkpoint.loader import CheckpointLoader

    folders = {"remote": environment.cloud_home / "out", "local": environment.out_dir}
    tried: list[tuple[str, Path | None]] = [("MINILLM_PRETRAINED_PATH", environment.pretrained_path)]
    for source, folder in folders.items():
        path, _ = CheckpointLoader.get_checkpoint_path(
            "pretrain",
            environment.hidden_size,
            environment.use_moe,
            source,
            str(folder),
            str(folder),
            environment.architecture,
        )
        tried.append((source, Path(path)))
    return tried


def _is_valid(path: Path, environment: Environment) -> bool:
    say(f"[stage] Found existing pretrain checkpoint: {display(path)}")
    say("[stage] Checking checkpoint quality…")
    from minillm.checkpoint.files import validate_weights

    try:
        validate_weights(path, model_config(environment))
    except UserError as problem:
        say(f"[stage] {problem}")
        say("[stage] Checkpoint appears corrupted or too small, will retrain")
        return False
    say(f"[stage] Checkpoint looks valid (size: {path.stat().st_size // 1024}KB)")
    say("[stage] Skipping pretrain stage, will use existing checkpoint for SFT")
    return True


def model_config(environment: Environment, stage: str = "full_sft") -> Any:
    """The ModelConfig that `stage` will build, from the same variables and flags. Raises UserError."""
    from minillm.models.config import ModelSettings, build_model_config
    from minillm.text.tokenizer import Tokenizer

    flags = flag_values(environment.arguments[stage])
    shape = (
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "num_experts",
        "num_experts_per_tok",
    )
    sizes: dict[str, Any] = {name: int(flags[name]) for name in shape if flags.get(name, "").isdigit()}
    settings = ModelSettings(
        hidden_size=environment.hidden_size,
        num_hidden_layers=environment.num_layers,
        use_moe=environment.use_moe,
        **sizes,
    )
    tokenizer = Tokenizer.load(flags.get("tokenizer") or None)
    return build_model_config(
        settings,
        vocab_size=tokenizer.vocab_size,
        max_seq_len=0,
        causal=environment.architecture == "ar",
        denoiser=(flags.get("denoiser") or "aggregate") if environment.architecture == "sdd" else "",
    )
