"""Finding a checkpoint and loading it into a model. Every path that is tried is told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillm.checkpoint import folders
from minillm.checkpoint.files import check_finite, extract_weights
from minillm.checkpoint.sharded import is_sharded
from minillm.log import UserError, info, warn
from minillm.models.config import ModelConfig
from minillm.models.transformer import LanguageModel
from minillm.stages import ALIASES, STAGES

REMOTE_DIR = "/openbayes/home/out"
LEAST_MATCH = 0.95


def flat_name(stage: str, hidden_size: int, use_moe: bool = False, architecture: str = "ar") -> str:
    """`[{family}_]{stage}_{hidden_size}[_moe]`: the name of a run's folder and, with .pth, of its flat weights."""
    family = "" if architecture == "ar" else f"{architecture}_"
    return f"{family}{ALIASES.get(stage, stage)}_{hidden_size}{'_moe' if use_moe else ''}"


ARCHITECTURES = ("ar", "diffusion", "sdd")
REST_KEY = "model.candidates.rest"  # only SDD has it


class CheckpointLoader:
    """Where checkpoints are by convention, which one to take, and putting it into a model."""

    @staticmethod
    def get_checkpoint_path(
        stage: str,
        hidden_size: int = 512,
        use_moe: bool = False,
        source: str = "local",
        remote_dir: str | None = None,
        local_dir: str = "out",
        architecture: str = "ar",
    ) -> tuple[str, bool]:
        """The conventional path of a stage's weights, and whether a file is there.

        Args:
            source: "local" looks in `local_dir`, "remote" in `remote_dir` (default /openbayes/home/out).
        """
        if source not in ("local", "remote"):
            raise UserError(f"source is {source!r}: it is 'local' or 'remote'")
        folder = Path(local_dir) if source == "local" else Path(remote_dir or REMOTE_DIR)
        path = folder / f"{flat_name(stage, hidden_size, use_moe, architecture)}.pth"
        return str(path), path.is_file()

    @staticmethod
    def resolve_checkpoint_path(
        explicit_path: str | None = None,
        stage: str = "pretrain",
        hidden_size: int = 512,
        use_moe: bool = False,
        env_var: str = "MINILLM_PRETRAINED_PATH",
        local_dir: str | None = "out",
        remote_dir: str | None = None,
        architecture: str = "ar",
    ) -> str | None:
        """The checkpoint to start from: explicit > environment variable > remote > local > None.

        A stage without a checkpoint of its own falls back to the stage before it. `local_dir=None` looks at the
        remote folder only.

        Raises:
            UserError: the explicit path does not exist.
        """
        if explicit_path:
            if not Path(explicit_path).exists():
                raise UserError(f"the checkpoint given does not exist: {explicit_path}")
            info(f"[checkpoint] using the given path: {explicit_path}")
            return explicit_path
        from_env = os.environ.get(env_var, "") if env_var else ""
        if from_env:
            if Path(from_env).exists():
                info(f"[checkpoint] using {env_var}: {from_env}")
                return from_env
            warn(f"{env_var} names a file that does not exist: {from_env}; looking further")
        current: str | None = ALIASES.get(stage, stage)
        while current:
            for source in ("remote", "local"):
                if source == "local" and local_dir is None:
                    continue
                path, exists = CheckpointLoader.get_checkpoint_path(
                    current, hidden_size, use_moe, source, remote_dir, local_dir or "", architecture
                )
                info(f"[checkpoint] {source}: {path} {'found' if exists else 'not found'}")
                if exists:
                    return path
            current = STAGES[current].starts_from if current in STAGES else None
        return None

    @staticmethod
    def load_checkpoint(
        model: nn.Module, checkpoint_path: str, device: str | torch.device = "cpu", strict: bool = False
    ) -> bool:
        """Load a bare state dict, a full checkpoint, a run folder's best one or a Hugging Face folder into `model` and
        move it to `device`.

        Missing, unexpected and mis-shaped keys are reported; `strict` makes any of them an error.

        Returns:
            True: the weights are in the model.

        Raises:
            UserError: the file is damaged or unsafe, a tensor is not finite, or less than 95 % of the model's
                parameters found a match.
        """
        path = folders.checkpoint_path(checkpoint_path)
        if path.is_dir() and not is_sharded(path):
            weights = folders.read_model(path)[2]
            if isinstance(model, LanguageModel):  # it may have rows for tokens that an import adds
                weights = folders.with_rows(weights, model.config.vocab_size)
        else:
            weights = extract_weights(folders.read_checkpoint(path), path)
            check_finite(weights, path)
        load_weights(model, weights, str(path), strict=strict)
        model.to(device)
        return True


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str, *, strict: bool = False) -> None:
    """Copy what matches, report what does not, refuse when too little matches (see load_checkpoint)."""
    own = model.state_dict()
    extra = set(weights) - set(own)
    if "lm_head.weight" in extra and "model.embed_tokens.weight" in weights:
        extra.discard("lm_head.weight")  # tied head, written out by other programs
    missing = [key for key in own if key not in weights]
    wrong = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    matched = [key for key in own if key in weights and key not in wrong]
    total = sum(value.numel() for value in own.values())
    share = sum(own[key].numel() for key in matched) / max(1, total)
    problems = [f"missing: {key}" for key in missing] + [f"unexpected: {key}" for key in sorted(extra)]
    problems += [f"shape of {key}: file {tuple(weights[key].shape)}, model {tuple(own[key].shape)}" for key in wrong]
    for line in problems[:10]:
        warn(f"{source}: {line}")
    if len(problems) > 10:
        warn(f"{source}: and {len(problems) - 10} more keys that do not match")
    if share < LEAST_MATCH or (strict and problems):
        raise UserError(
            f"{source} does not fit this model: {share:.1%} of the parameters matched"
            f" ({problems[0] if problems else 'nothing to load'}). Give the sizes it was trained with"
        )
    with torch.no_grad():
        for key in matched:
            own[key].copy_(weights[key])
    info(f"[checkpoint] loaded {source}: {share:.1%} of the parameters matched")


def infer_model_config(weights: dict[str, Tensor], *, causal: bool = True) -> ModelConfig:
    """The sizes that a state dict with our key names was made with. What shapes cannot tell (rotary base,
    experts per token, position limit) takes the defaults.

    Raises:
        UserError: the keys are not ours.
    """
    try:
        vocabulary, hidden = weights["model.embed_tokens.weight"].shape
        layers = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("model.layers."))
        first = "model.layers.0."
        head_dim = weights[first + "self_attn.q_norm.weight"].shape[0]
        experts = sum(key.startswith(first + "mlp.experts.") and "gate_proj" in key for key in weights)
        width_key = first + ("mlp.experts.0.gate_proj.weight" if experts else "mlp.gate_proj.weight")
        width = weights[width_key].shape[0]
        denoiser = ""
        if REST_KEY in weights:
            denoiser = "bilateral" if "model.candidates.readout.weight" in weights else "aggregate"
        values: dict[str, Any] = {"moe_intermediate_size": width, "num_experts": experts} if experts else {}
        return ModelConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=weights[first + "self_attn.q_proj.weight"].shape[0] // head_dim,
            num_key_value_heads=weights[first + "self_attn.k_proj.weight"].shape[0] // head_dim,
            head_dim=head_dim,
            intermediate_size=width * 2 if experts else width,
            tie_word_embeddings="lm_head.weight" not in weights,
            causal=causal and not denoiser,
            denoiser=denoiser,
            value_head="score.weight" in weights,
            use_moe=bool(experts),
            **values,
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"these weights do not have the key names of a MiniLLM model ({error}); `minillm convert` reads other ones"
        ) from None


def config_of(content: Any, path: Path) -> ModelConfig:
    """The model's configuration from a full checkpoint, from config.json in the run folder beside flat weights,
    or from the shapes."""
    given = isinstance(content, dict) and "model_config" in content
    values = content["model_config"] if given else config_beside(path, "minillm")
    try:
        if given or values:
            return ModelConfig.from_dict(dictionary(values, "model_config"))
        weights = extract_weights(content, path)
        config = infer_model_config(weights, causal=family_of(content, path)["architecture"] == "ar")
        experts = f", {config.num_experts_per_tok} experts a token" if config.use_moe else ""
        warn(
            f"{path} stands alone: no config.json tells what shapes do not. Assumed are a rotary base of "
            f"{config.rope_theta:g}, norms with an epsilon of {config.rms_norm_eps:g}, "
            f"{config.max_position_embeddings} positions{experts}, as MiniLLM has them. If another program wrote it, "
            "take `minillm convert --input_dir`"
        )
        return config
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def family_of(content: Any, path: Path) -> dict[str, Any]:
    """The family's configuration (at least its architecture), looked for in the same places; where nothing tells,
    by the keys (SDD has an embedding of its own) and by the file's name."""
    if isinstance(content, dict) and content.get("family") is not None:
        return _known(dictionary(content["family"], f"family in {path}"), path)
    if isinstance(content, dict) and "architecture" in content:
        return _known({"architecture": content["architecture"]}, path)
    values = config_beside(path, "minillm_family")
    if values:
        return _known(values, path)
    weights = extract_weights(content, path)
    if REST_KEY in weights:
        return {"architecture": "sdd", "denoiser": infer_model_config(weights).denoiser}
    return {"architecture": "diffusion" if path.name.startswith("diffusion_") else "ar"}


def _known(family: dict[str, Any], path: Path) -> dict[str, Any]:
    if family.get("architecture") not in ARCHITECTURES:
        raise UserError(
            f"{path}: its architecture is {family.get('architecture')!r}; there are {', '.join(ARCHITECTURES)}"
        )
    return family


def dictionary(value: Any, name: str) -> dict[str, Any]:
    """The value; raises UserError where it is none with text for keys."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{name} is a {type(value).__name__}, expected a dictionary")
    return value


def config_beside(path: Path, key: str) -> dict[str, Any] | None:
    """A section of config.json in the run folder beside flat weights."""
    for beside in (path.with_suffix("") / "config.json", path.parent / "config.json"):
        if beside.is_file():
            try:
                values = json.loads(beside.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{beside} is not valid JSON ({error})") from None
            section = dictionary(values, str(beside)).get(key)
            if section:
                return dictionary(section, f"{key} in {beside}")
    return None
