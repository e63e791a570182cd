"""What a model is: sizes, presets, and their translation to and from Hugging Face's configuration. No torch here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from minillm.log import UserError

# name: (hidden_size, num_hidden_layers, num_attention_heads, intermediate_size)
PRESETS = {
    "small": (384, 6, 6, 1536),
    "medium": (512, 8, 8, 2048),
    "large": (768, 12, 12, 3072),
    "xl": (1024, 24, 16, 4096),
}
NUM_EXPERTS, NUM_EXPERTS_PER_TOK = 8, 2
LARGEST = 2**31 - 1  # of any size in a configuration
MOST_POSITIONS = 2**22  # the rotary tables of so many take gigabytes
MAY_BE_ZERO = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "sliding_window", "max_window_layers"}
MODEL_TYPES = ("", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gpt2")
# The linear layers inside the layers, by their last names: all but the router of experts.
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one backbone, with Hugging Face's names (Qwen3, and Qwen3-MoE when `use_moe`)."""

    vocab_size: int
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 64
    intermediate_size: int = 2048
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    causal: bool = True
    denoiser: str = ""  # "aggregate" or "bilateral": positions hold candidates (SDD)
    value_head: bool = False  # a head that gives one number, `score`: reward models and critics
    use_moe: bool = False
    num_experts: int = NUM_EXPERTS
    num_experts_per_tok: int = NUM_EXPERTS_PER_TOK
    moe_intermediate_size: int = 1024
    router_aux_loss_coef: float = 0.01
    # What imported models have and ours do not.
    model_type: str = ""  # Hugging Face's name for what it was imported as; "": Qwen3's arithmetic
    qk_norm: bool = True  # queries and keys are normalised
    qkv_bias: bool = False  # of queries, keys and values (GPT-2 has biases everywhere)
    rope_scaling: dict[str, Any] | None = None  # as in Hugging Face's configurations; models/rotary.py has the kinds
    sliding_window: int = 0  # a token sees so many tokens, itself included; 0: all before it
    max_window_layers: int = 0  # the first layers that see everything all the same
    norm_topk_prob: bool = True  # the chosen experts' probabilities are made to sum to one
    dense_layers: tuple[int, ...] = ()  # of a mixture of experts: layers without experts
    exact_gelu: bool = False  # GPT-2's layers with GELU itself (nanoGPT), not its tanh form

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_value(each.name, str(each.type), getattr(self, each.name))
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))  # JSON has lists
        if self.denoiser not in ("", "aggregate", "bilateral"):
            raise UserError(f"denoiser is {self.denoiser!r}: there are 'aggregate' and 'bilateral'")
        if self.max_position_embeddings > MOST_POSITIONS:
            raise UserError(f"max_position_embeddings is {self.max_position_embeddings}: at most {MOST_POSITIONS:,}")
        if self.sliding_window and not self.causal:
            raise UserError("sliding_window: a model that looks both ways cannot have one")
        if self.model_type not in MODEL_TYPES:
            raise UserError(f"model_type is {self.model_type!r}: known are {', '.join(filter(None, MODEL_TYPES))}")
        shared = self.num_key_value_heads != self.num_attention_heads
        if self.model_type == "gpt2" and (self.use_moe or shared or self.denoiser == "bilateral"):
            raise UserError("a GPT-2 model can have neither experts, shared key/value heads nor the bilateral denoiser")
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}: rotary embedding needs an even number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"num_experts_per_tok is {self.num_experts_per_tok}: give 1 to num_experts ({self.num_experts})"
            )

    @property
    def learned_positions(self) -> bool:
        """Positions are embeddings (GPT-2), not rotations."""
        return self.model_type == "gpt2"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from a checkpoint's `model_config`; names this version does not know are an error, and so are a size
        that is missing or impossible."""
        if "vocab_size" not in values:
            raise UserError("model_config has no vocab_size")
        unknown = sorted(set(map(str, values)) - {f.name for f in fields(cls)})
        if unknown:
            raise UserError(f"model_config has fields this version does not know: {', '.join(unknown)}")
        return cls(**values)


def _check_value(name: str, kind: str, value: Any) -> None:
    """A configuration may come from any file. Raises UserError where a value is of another kind or no possible size."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    least = 0 if name in MAY_BE_ZERO else 1
    if kind == "int" and not (number and isinstance(value, int) and least <= value <= LARGEST):
        raise UserError(f"{name} is {value!r}: it must be a whole number from {least} to {LARGEST:,}")
    if kind == "float" and not (number and 0 <= value < math.inf):
        raise UserError(f"{name} is {value!r}: it must be a finite number that is not negative")
    if kind in ("bool", "str") and type(value).__name__ != kind:
        raise UserError(f"{name} is {value!r}: it must be {'true or false' if kind == 'bool' else 'text'}")
    if kind.startswith("dict") and not (value is None or isinstance(value, dict)):
        raise UserError(f"{name} is {value!r}: it must be a dictionary or nothing")
    if kind.startswith("tuple") and not (
        isinstance(value, list | tuple) and all(isinstance(item, int) for item in value)
    ):
        raise UserError(f"{name} is {value!r}: it must be a list of whole numbers")


@dataclass(frozen=True)
class ModelSettings:
    """Model (what is not given is derived and printed)"""

    model_config: str = field(
        default="",
        metadata={
            "help": "size preset; the single flags below override it",
            "choices": ("", *PRESETS),
            "aliases": ("model_size",),
        },
    )
    hidden_size: int = field(default=0, metadata={"help": "width of the model (default 512)", "min": 0})
    num_hidden_layers: int = field(default=0, metadata={"help": "number of transformer layers (default 8)", "min": 0})
    num_attention_heads: int = field(
        default=0, metadata={"help": "attention heads (default hidden_size / 64)", "min": 0}
    )
    num_key_value_heads: int = field(default=0, metadata={"help": "key/value heads (default half the heads)", "min": 0})
    intermediate_size: int = field(
        default=0, metadata={"help": "width of the feed-forward part (default 4 x hidden_size)", "min": 0}
    )
    use_moe: bool = field(default=False, metadata={"help": "mixture of experts instead of one feed-forward part"})
    num_experts: int = field(default=NUM_EXPERTS, metadata={"help": "experts a layer (with use_moe)", "min": 1})
    num_experts_per_tok: int = field(
        default=NUM_EXPERTS_PER_TOK, metadata={"help": "experts that each token visits", "min": 1}
    )


def build_model_config(
    settings: ModelSettings, *, vocab_size: int, max_seq_len: int, causal: bool, denoiser: str = ""
) -> ModelConfig:
    """Preset, then single flags, then derivation: heads of 64, half as many key/value heads, experts whose
    active width equals the dense one."""
    preset = PRESETS[settings.model_config or "medium"]
    hidden = settings.hidden_size or preset[0]
    same_width = hidden == preset[0]
    layers = settings.num_hidden_layers or preset[1]
    heads = settings.num_attention_heads or (preset[2] if same_width else max(1, hidden // 64))
    intermediate = settings.intermediate_size or (preset[3] if same_width else 4 * hidden)
    if hidden % heads:
        raise UserError(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    key_value_heads = settings.num_key_value_heads or (heads // 2 if heads % 2 == 0 else heads)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        max_position_embeddings=max(2048, max_seq_len),
        causal=causal,
        denoiser=denoiser,
        use_moe=settings.use_moe,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.num_experts_per_tok,
        moe_intermediate_size=max(8, intermediate // settings.num_experts_per_tok),
    )


def size_name(config: ModelConfig) -> str:
    """The preset's name where the sizes are a preset's, else the width: used in run names."""
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    name = next((name for name, preset in PRESETS.items() if preset == sizes), str(config.hidden_size))
    return name + ("-moe" if config.use_moe else "")
