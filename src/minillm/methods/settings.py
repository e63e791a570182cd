"""The flags of single methods. No torch here: help must be quick."""

from __future__ import annotations

from dataclasses import dataclass, field

PREFERENCE_LOSSES = ("sigmoid", "ipo", "simpo", "orpo", "kto")


@dataclass(frozen=True)
class PreferenceSettings:
    """Preference learning"""

    loss: str = field(
        default="sigmoid",
        metadata={
            "help": "sigmoid is DPO; simpo and orpo keep no reference; kto reads labelled answers instead of pairs",
            "choices": PREFERENCE_LOSSES,
            "aliases": ("loss_type",),
        },
    )
    beta: float = field(
        default=0.0,
        metadata={
            "help": "strength of the pull towards the reference; simpo: scale of its rewards; orpo: weight of the odds "
            "ratio, lambda in the paper (default 0: 0.1, for simpo 2)",
            "min": 0.0,
        },
    )
    simpo_gamma: float = field(
        default=1.0, metadata={"help": "simpo: the margin by which the chosen answer's reward is to win", "min": 0.0}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "sigmoid and simpo: share of pairs that are the wrong way round", "min": 0.0, "max": 0.5},
    )
    desirable_weight: float = field(default=1.0, metadata={"help": "kto: weight of wanted answers", "min": 0.0})
    undesirable_weight: float = field(default=1.0, metadata={"help": "kto: weight of unwanted answers", "min": 0.0})
    precompute_reference: str = field(
        default="auto",
        metadata={
            "help": "ask the reference once for every row, before training (default auto: with two epochs or more)",
            "choices": ("auto", "on", "off"),
            "bare": "on",
        },
    )

    @property
    def strength(self) -> float:
        """beta, or its default for the loss."""
        return self.beta or (2.0 if self.loss == "simpo" else 0.1)

    @property
    def needs_reference(self) -> bool:
        return self.loss not in ("simpo", "orpo")


@dataclass(frozen=True)
class RewardModelSettings:
    """Reward model"""

    center_rewards_coefficient: float = field(
        default=0.01, metadata={"help": "pull of the mean reward towards 0 (0: none)", "min": 0.0}
    )


@dataclass(frozen=True)
class DistillationSettings:
    """Distillation"""

    teacher: str = field(
        metadata={"help": "a checkpoint of the same family and tokenizer, or (ar) a folder that transformers loads"}
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "of the student from the teacher: forward_kl covers all that it says, reverse_kl seeks what it "
            "says most, jsd stands between",
            "choices": ("forward_kl", "reverse_kl", "jsd"),
        },
    )
    beta: float = field(
        default=0.5, metadata={"help": "jsd: the teacher's share of the mixture, below 1", "above": 0.0, "max": 0.999}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "softens both distributions; the loss is scaled by its square", "above": 0.0}
    )
    ce_weight: float = field(
        default=0.5,
        metadata={
            "help": "share of cross-entropy with the data in the loss", "aliases": ("alpha",), "min": 0.0, "max": 1.0
        },
    )  # fmt: skip
    on_policy_share: float = field(
        default=0.0,
        metadata={"help": "share of the rows in which the student writes the answers itself", "min": 0.0, "max": 1.0},
    )
    cache_teacher: int = field(
        default=0,
        metadata={
            "help": "ar: ask the teacher once for each row and keep its so many most probable tokens on disk (default "
            "0: no cache)",
            "min": 0,
        },
    )


@dataclass(frozen=True)
class ReasoningSettings:
    """Reasoning"""

    tag_weight: float = field(
        default=10.0,
        metadata={"help": "what <think>, </think>, <answer> and </answer> weigh, of 1 for other tokens", "above": 0.0},
    )


@dataclass(frozen=True)
class PolicySettings:
    """Reinforcement learning"""

    reward: tuple[str, ...] = field(
        default=("math",),
        metadata={
            "help": "what an answer is worth, NAME[:ARGUMENT][=WEIGHT], several add up: math, number, format, length, "
            "repetition, module:function of yours, model:CHECKPOINT"
        },
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "longest answer in tokens", "aliases": ("max_gen_len",), "min": 1}
    )
    temperature: float = field(default=1.0, metadata={"help": "of the answers that are learned from", "above": 0.0})
    denoising_steps: int = field(
        default=0, metadata={"help": "diffusion, sdd: steps for an answer (default 0: one a token)", "min": 0}
    )
    num_iterations: int = field(
        default=1,
        metadata={
            "help": "passes over the answers of a rollout",
            "aliases": ("num_ppo_epochs", "ppo_update_iters"),
            "min": 1,
        },
    )
    steps_per_generation: int = field(
        default=1, metadata={"help": "optimizer steps of a pass, each over its own answers", "min": 1}
    )
    beta: float = field(
        default=0.0,
        metadata={
            "help": "weight of the KL to the model as it began (default 0: no reference is kept)",
            "aliases": ("kl_coef",),
            "min": 0.0,
        },
    )
    epsilon: float = field(
        default=0.2,
        metadata={
            "help": "ratios count up to 1 - epsilon and 1 + epsilon", "aliases": ("clip_epsilon", "cliprange"),
            "above": 0.0,
        },
    )  # fmt: skip
    epsilon_high: float = field(
        default=0.0, metadata={"help": "another upper bound (default 0: epsilon; DAPO: 0.28)", "min": 0.0}
    )
    loss_type: str = field(
        default="dapo",
        metadata={
            "help": "dapo: the mean of the step's tokens; grpo: of each answer's tokens, then of the answers; dr_grpo: "
            "the sum over max_completion_length; cispo: as dapo, with ratios that are clipped and have no gradient",
            "choices": ("dapo", "grpo", "dr_grpo", "cispo"),
        },
    )
    log_completions: int = field(
        default=50, metadata={"help": "steps between answers written to samples.jsonl (0: never)", "min": 0}
    )


@dataclass(frozen=True)
class GroupSettings:
    """Groups"""

    num_generations: int = field(default=8, metadata={"help": "answers to a prompt", "min": 2})
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "what advantages are divided by: the deviation of their group, of the batch, or nothing (Dr. GRPO)",
            "choices": ("group", "batch", "none"),
        },
    )


@dataclass(frozen=True)
class CriticSettings:
    """Critic"""

    critic_path: str = field(
        default="", metadata={"help": "critic or reward model to begin with (default: the policy, values 0)"}
    )
    critic_learning_rate: float = field(
        default=0.0, metadata={"help": "peak learning rate of the critic (default 0: the policy's)", "min": 0.0}
    )
    gamma: float = field(default=1.0, metadata={"help": "discount of a token", "above": 0.0, "max": 1.0})
    lam: float = field(default=0.95, metadata={"help": "lambda of the generalised advantages", "min": 0.0, "max": 1.0})
    cliprange_value: float = field(default=0.2, metadata={"help": "how far a value moves in a rollout", "above": 0.0})


@dataclass(frozen=True)
class TrackerSettings:
    """Value tracker"""

    d_half: float = field(
        default=0.06, metadata={"help": "KL (nats a token) at which an old reward counts half", "above": 0.0}
    )
    rho_min: float = field(default=0.875, metadata={"help": "least share of old evidence", "min": 0.0, "max": 1.0})
    rho_max: float = field(default=0.96, metadata={"help": "largest share of old evidence", "min": 0.0, "max": 1.0})
    uniform_prompts: bool = field(
        default=False, metadata={"help": "take prompts in turn, not those first from which more is to be learned"}
    )
