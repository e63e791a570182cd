"""The command line: one table of commands. Nothing heavy is imported before a command is known and its flags are
right, so that help and mistakes answer at once."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from minillm import __version__, log
from minillm.config import UsageError, parse
from minillm.log import UserError


class Command(NamedTuple):
    help: str
    settings: tuple[str, ...]  # "module:Dataclass"
    run: str  # "module:function", called with one settings object per dataclass


TRAIN = (
    "minillm.models.config:ModelSettings",
    "minillm.train.settings:DataSettings",
    "minillm.train.settings:RunSettings",
    "minillm.train.settings:OptimSettings",
    "minillm.train.settings:TrackSettings",
    "minillm.families.settings:FamilySettings",
)

TUNE = (*TRAIN, "minillm.train.settings:LoraSettings")  # every stage after pretraining
POLICY = (*TUNE, "minillm.methods.settings:PolicySettings", "minillm.rollout.settings:RolloutSettings")

COMMANDS = {
    "pretrain": Command("train a model on text", TRAIN, "minillm.train.run:pretrain"),
    "estimate": Command(
        "memory, time and cost of a training run, before it runs",
        ("minillm.models.config:ModelSettings", "minillm.train.estimate:EstimateSettings"),
        "minillm.train.estimate:run",
    ),
    "sft": Command("fine-tune on conversations", TUNE, "minillm.train.run:sft"),
    "finetune": Command("another name of sft", TUNE, "minillm.train.run:sft"),
    "lora": Command(
        "fine-tune on conversations by a small adapter beside frozen weights", TUNE, "minillm.train.run:lora"
    ),
    "dpo": Command(
        "learn from preference pairs or labelled answers",
        (*TUNE, "minillm.methods.settings:PreferenceSettings"),
        "minillm.train.run:dpo",
    ),
    "reward": Command(
        "train a reward model from preference pairs",
        (*TUNE, "minillm.methods.settings:RewardModelSettings"),
        "minillm.train.run:reward",
    ),
    "ppo": Command(
        "reinforcement learning with a critic: proximal policy optimization",
        (*POLICY, "minillm.methods.settings:CriticSettings"),
        "minillm.train.run:ppo",
    ),
    "grpo": Command(
        "reinforcement learning from groups of answers: group relative policy optimization",
        (*POLICY, "minillm.methods.settings:GroupSettings"),
        "minillm.train.run:grpo",
    ),
    "spo": Command(
        "reinforcement learning, one answer a prompt: single-stream policy optimization (2509.13232, none of the other "
        "methods of that acronym)",
        (*POLICY, "minillm.methods.settings:TrackerSettings"),
        "minillm.train.run:spo",
    ),
    "distill": Command(
        "learn from a teacher's distributions",
        (*TUNE, "minillm.methods.settings:DistillationSettings"),
        "minillm.train.run:distill",
    ),
    "reason": Command(
        "fine-tune on reasoning traces",
        (*TUNE, "minillm.methods.settings:ReasoningSettings"),
        "minillm.train.run:reason",
    ),
    "evaluate": Command(
        "checkpoints side by side: perplexity, accuracy, what they write, speed",
        ("minillm.eval.models:EvaluateSettings",),
        "minillm.eval.models:run",
    ),
    "evaluate-instructions": Command(
        "how a checkpoint answers: quality, constraints kept, form",
        ("minillm.eval.instructions:InstructionSettings",),
        "minillm.eval.instructions:run",
    ),
    "compare": Command(
        "the arena: families trained on equal terms, one page of results",
        ("minillm.compare:CompareSettings",),
        "minillm.compare:run",
    ),
    "generate": Command(
        "write with a checkpoint", ("minillm.serve.generate:GenerateSettings",), "minillm.serve.generate:run"
    ),
    "chat": Command("talk with a checkpoint", ("minillm.serve.chat:ChatSettings",), "minillm.serve.chat:run"),
    "export": Command(
        "a folder that transformers loads, or a file that llama.cpp runs",
        ("minillm.convert.export:ExportSettings",),
        "minillm.convert.export:run",
    ),
    "convert": Command(
        "raw weights as a full checkpoint, or an ar checkpoint as the beginning of a diffusion or sdd model",
        (
            "minillm.convert.raw:RawSettings",
            "minillm.convert.family:ConvertSettings",
            "minillm.convert.command:SharedSettings",
        ),
        "minillm.convert.command:run",
    ),
    "import": Command(
        "a Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE or GPT-2 model as a checkpoint of ours",
        ("minillm.convert.importing:ImportSettings",),
        "minillm.convert.importing:run",
    ),
    "merge": Command(
        "a checkpoint and an adapter as one checkpoint",
        ("minillm.convert.merge:MergeSettings",),
        "minillm.convert.merge:run",
    ),
    "push": Command("send a model to the hub", ("minillm.convert.hub:PushSettings",), "minillm.convert.hub:push"),
    "pull": Command("fetch a model from the hub", ("minillm.convert.hub:PullSettings",), "minillm.convert.hub:pull"),
    "checkpoint list": Command(
        "the checkpoints under a folder", ("minillm.manage.listing:ListSettings",), "minillm.manage.listing:run_list"
    ),
    "checkpoint show": Command(
        "every field of one, and what it began with",
        ("minillm.manage.listing:ShowSettings",),
        "minillm.manage.listing:run_show",
    ),
    "checkpoint verify": Command(
        "hash, safety, finite numbers, shapes and tokenizer of files or a tree",
        ("minillm.manage.verify:VerifySettings",),
        "minillm.manage.verify:run",
    ),
    "checkpoint consolidate": Command(
        "one file of what several processes wrote",
        ("minillm.manage.consolidate:ConsolidateSettings",),
        "minillm.manage.consolidate:run",
    ),
    "checkpoint diff": Command(
        "how two differ: configuration, weights by layer, tokenizer",
        ("minillm.manage.diff:DiffSettings",),
        "minillm.manage.diff:run",
    ),
    "checkpoint average": Command(
        "the mean of several as one checkpoint",
        ("minillm.manage.average:AverageSettings",),
        "minillm.manage.average:run",
    ),
    "checkpoint prune": Command(
        "delete those of a run that nobody needs", ("minillm.manage.prune:PruneSettings",), "minillm.manage.prune:run"
    ),
    "checkpoint tag": Command(
        "a name that stays, such as out/v1", ("minillm.manage.tag:TagSettings",), "minillm.manage.tag:run"
    ),
    "checkpoint compress": Command(
        "cold ones in less room: zstd, or the difference from the parent",
        ("minillm.manage.compress:CompressSettings",),
        "minillm.manage.compress:run",
    ),
    "checkpoint restore": Command(
        "compressed ones as they were, bit for bit",
        ("minillm.manage.compress:RestoreSettings",),
        "minillm.manage.compress:restore",
    ),
    "data demo": Command(
        "generate the demo data: a small story world", ("minillm.data.demo:DemoSettings",), "minillm.data.demo:run"
    ),
    "data inspect": Command(
        "show a batch: what is seen, what is trained",
        ("minillm.data.inspect:InspectSettings",),
        "minillm.data.inspect:run",
    ),
    "data stats": Command(
        "what training would read, as JSON: lengths, truncation, packing, duplicates",
        ("minillm.data.stats:StatsSettings",),
        "minillm.data.stats:run",
    ),
    "data clean": Command(
        "drop unusable and repeated conversations",
        ("minillm.data.clean:CleanSettings", "minillm.data.executors:ExecutorSettings"),
        "minillm.data.clean:run",
    ),
    "data prepare-text": Command(
        "text of any size as a folder of tokens that pretrain reads",
        ("minillm.data.prepare_text:PrepareTextSettings", "minillm.data.executors:ExecutorSettings"),
        "minillm.data.prepare_text:run",
    ),
    "data prepare-instructions": Command(
        "instruction data of any form as one folder that sft reads",
        ("minillm.data.instructions:PrepareInstructionsSettings",),
        "minillm.data.instructions:run",
    ),
    "data prepare-preferences": Command(
        "pairs, labelled answers or prompts with answers of any form as one file",
        ("minillm.data.prepare_preferences:PreparePreferencesSettings",),
        "minillm.data.prepare_preferences:run",
    ),
    "data prepare-reasoning": Command(
        "reasoning traces from a model behind an OpenAI-compatible endpoint, checked",
        ("minillm.data.reasoning:PrepareReasoningSettings",),
        "minillm.data.reasoning:run",
    ),
    "data train-tokenizer": Command(
        "train a byte-level BPE tokenizer", ("minillm.text.train:TrainTokenizerSettings",), "minillm.text.train:run"
    ),
    "pipeline": Command(
        "pretrain, SFT, DPO, evaluation and report: what scripts/run.sh runs",
        ("minillm.pipeline:PipelineSettings",),
        "minillm.pipeline:run",
    ),
}


GROUPS = {name.split()[0] for name in COMMANDS if " " in name}  # data, checkpoint


def _load(reference: str) -> Any:
    module, attribute = reference.split(":")
    return getattr(import_module(module), attribute)


def overview(group: str = "") -> str:
    """What `minillm --help` prints; with a group (the first word of its commands) what `minillm GROUP --help` does."""
    listed = {name: command for name, command in COMMANDS.items() if name.startswith(f"{group} " if group else "")}
    width = max(map(len, listed)) + 2
    lines = "\n".join(f"  {name:<{width}}{command.help}" for name, command in listed.items())
    if group:
        return f"usage: minillm {group} COMMAND [--flag value ...]\n\n{lines}"
    return (
        f"MiniLLM {__version__}: train small language models end to end.\n\n"
        f"usage: minillm COMMAND [--flag value ...]\n\n{lines}\n\n"
        "minillm COMMAND --help lists a command's flags; --config FILE.yaml holds the same flags."
    )


def _find(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command's name and what follows it."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, list(argv[words:])
    wanted = " ".join(argv[:2]) if argv[0] in GROUPS else argv[0]
    near = difflib.get_close_matches(wanted, COMMANDS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    group = f" {argv[0]}" if argv[0] in GROUPS else ""
    raise UsageError(f"there is no command {wanted!r}.{hint}\nSee: minillm{group} --help")


def execute(argv: Sequence[str]) -> None:
    """Run one command. Raises UserError, or SystemExit after help."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if argv[0] in GROUPS and list(argv[1:]) in (["-h"], ["--help"]):
        print(overview(argv[0]))
        return
    if argv[0] in ("--version", "-V"):
        print(f"minillm {__version__}")
        return
    name, rest = _find(argv)
    command = COMMANDS[name]
    settings = parse(f"minillm {name}", command.help, [_load(each) for each in command.settings], rest)
    _load(command.run)(*settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 something the user can fix, 2 a wrong flag, 130 Ctrl-C, 143 SIGTERM."""
    try:
        execute(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun's other processes have the same flags
            log.error(str(error))
        return 2
    except UserError as error:
        log.error(str(error))
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        log.error(f"{where}{error.strerror}. Is there room, and may it be read and written?")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
