"""minillm compare, the arena: families trained from scratch on the same rows for the same budget, evaluated side by
side, on one page."""

from __future__ import annotations

from dataclasses import dataclass, field

from minillm.config import UsageError
from minillm.families.settings import ARCHITECTURES


@dataclass(frozen=True)
class CompareSettings:
    """Train families on equal terms and compare them"""

    data_path: str = field(default="", metadata={"help": "training text (default: demo data, generated)"})
    validation_data: str = field(
        default="", metadata={"help": "held-out text (required with data_path; default: the demo data's)"}
    )
    architectures: str = field(
        default="ar,diffusion,sdd", metadata={"help": "families, separated by commas (default: all three)"}
    )
    budget: str = field(
        default="tokens:600k",
        metadata={"help": "what each may use: tokens:600k (default), flops:1e15 or steps:200"},
    )
    seeds: str = field(default="42", metadata={"help": "one run of each for every seed, as 1,2,3 (default 42)"})
    hidden_size: int = field(default=128, metadata={"help": "width of the models", "min": 8})
    num_hidden_layers: int = field(default=4, metadata={"help": "number of transformer layers", "min": 1})
    use_moe: bool = field(default=False, metadata={"help": "mixture of experts"})
    max_seq_len: int = field(default=128, metadata={"help": "tokens a row", "min": 16})
    batch_size: int = field(default=32, metadata={"help": "rows a step", "min": 1})
    tokenizer: str = field(default="", metadata={"help": "tokenizer.json or its folder (default: the shipped one)"})
    train_args: str = field(
        default="", metadata={"help": "further flags of minillm pretrain for all runs, in one pair of quotes"}
    )
    eval_samples: int = field(default=128, metadata={"help": "held-out rows read", "min": 1})
    num_samples: int = field(default=64, metadata={"help": "texts that each model writes", "min": 2})
    max_new_tokens: int = field(default=64, metadata={"help": "their longest, in tokens", "min": 1})
    out_dir: str = field(
        default="out/compare", metadata={"help": "where runs and the page go", "aliases": ("output_dir",)}
    )

    def __post_init__(self) -> None:
        from minillm.compare.budget import read_budget

        for name in self.families:
            if name not in ARCHITECTURES:
                raise UsageError(f"--architectures: {name!r} is not one of {', '.join(ARCHITECTURES)}")
        if not self.families or len(set(self.families)) < len(self.families):
            raise UsageError("--architectures: name each family once")
        try:
            seeds = self.run_seeds
        except ValueError:
            seeds = ()
        if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise UsageError(f"--seeds {self.seeds!r}: give different whole numbers, as 1,2,3")
        if bool(self.data_path) != bool(self.validation_data):
            raise UsageError("--data_path and --validation_data: give both, or neither for demo data")
        read_budget(self.budget)

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.architectures.split(",") if name.strip())

    @property
    def run_seeds(self) -> tuple[int, ...]:
        return tuple(int(seed) for seed in self.seeds.split(","))


def run(settings: CompareSettings) -> None:
    """Train, evaluate, and write compare.md, compare.json and compare.png into the output folder.

    Raises:
        UserError: data or settings cannot be used. SystemExit: a training run failed or was stopped.
    """
    from minillm.commands import display, say
    from minillm.compare.arena import Arm, compare

    page = compare(settings, [Arm(name, ("--architecture", name)) for name in settings.families])
    say(f"[compare] The page: {display(page)}")
