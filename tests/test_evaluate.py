"""Checkpoints side by side: numbers by hand, kinds of likelihood kept apart, and the schema of what is written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import random_model, tiny_config

from minillm.checkpoint.files import save_tensors
from minillm.checkpoint.model import open_checkpoint
from minillm.cli import main
from minillm.data.batches import Batch, open_dataset
from minillm.eval import speed
from minillm.eval.charts import panels
from minillm.eval.comparison import OTHER_TOKENIZERS, by_kind, labels, tables
from minillm.eval.generation import Unjudged, choose_prompts, judge_texts
from minillm.eval.likelihood import accuracy_section, measure, perplexity_section, ratio
from minillm.eval.models import EvaluateSettings, evaluate, open_model
from minillm.families import saved_family
from minillm.families.settings import FamilyConfig
from minillm.log import UserError
from minillm.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = Tokenizer.load(None)
FAMILIES = {
    "ar": FamilyConfig(),
    "diffusion": FamilyConfig("diffusion"),
    "blocks": FamilyConfig("diffusion", diffusion_block=4),
    "sdd": FamilyConfig("sdd", k_schedule=(2,)),
    "swap": FamilyConfig("sdd", k_schedule=(2,), noise="swap"),
}


def checkpoint(folder: Path, name: str, *, stage: str = "pretrain", seed: int = 0) -> Path:
    """Random weights of a family, over the shipped tokenizer."""
    family = FAMILIES[name]
    denoiser = "aggregate" if family.architecture == "sdd" else ""
    config = tiny_config(
        vocab_size=TOKENIZER.vocab_size, num_hidden_layers=1, max_position_embeddings=160,
        causal=family.architecture == "ar", denoiser=denoiser,
    )  # fmt: skip
    path = folder / f"{name}_{stage}_{seed}.pt"
    content = {
        "model_state_dict": random_model(config, seed).state_dict(), "model_config": config.to_dict(),
        "family": family.to_dict(), "stage": stage, "global_step": 3,
    }  # fmt: skip
    save_tensors(path, content)
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"Story {i}: the miller went to the river and found {i} stones."} for i in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"What is {i} + 1?", "response": f"It is {i + 1}."} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


# Numbers by hand


def test_the_standard_error_is_that_of_a_ratio_over_rows() -> None:
    # r = 12 / 6 = 2; residuals 2 - 2, 6 - 4, 4 - 6: squares 0 + 4 + 4; sqrt(3 / 2 * 8) / 6
    assert ratio([2.0, 6.0, 4.0], [1, 2, 3]) == pytest.approx((2.0, math.sqrt(12.0) / 6))
    # rows of one length: the standard deviation of their means over the square root of their number
    assert ratio([4.0, 8.0, 12.0], [4, 4, 4])[1] == pytest.approx(np.std([1, 2, 3], ddof=1) / math.sqrt(3))
    assert ratio([3.0], [2]) == (1.5, None)
    assert ratio([3.0, 0.0], [2, 0]) == (1.5, None)  # a row without anything to count is no sample


class Rows:
    """A dataset of given rows [R, L], everything trained."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.tokens = np.array(rows, dtype=np.int64)

    def rows(self, indices: np.ndarray) -> Batch:
        tokens = self.tokens[indices]
        return Batch(tokens, np.ones_like(tokens, dtype=bool), None, None, indices)


def bigram(probabilities: list[float]) -> Any:
    """A stand-in for a model: every next token has these probabilities, whatever came before."""
    head = torch.tensor(probabilities).log()[:, None]

    class Model:
        head_weight = head

        def __call__(self, inputs: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(hidden=torch.ones(*inputs.shape, 1))

    tokenizer = SimpleNamespace(byte_lengths=[1, 2, 0])
    return SimpleNamespace(model=Model(), tokenizer=tokenizer, family=FamilyConfig().to_dict())


def test_known_probabilities_give_the_loss_perplexity_bits_and_accuracy_by_hand() -> None:
    opened = bigram([0.5, 0.25, 0.25])
    data = Rows([[2, 0, 0, 0], [0, 0, 1, 2]])
    found = measure(
        opened, saved_family(opened.family, _ids()), data, np.arange(2), seed=0, batch_size=1, draws=1  # type: ignore[arg-type]
    )  # fmt: skip
    ln2 = math.log(2)
    assert found.nats == pytest.approx([3 * ln2, 5 * ln2])  # the first token of a row is not predicted
    assert (found.tokens, found.text_bytes) == ([3, 3], [3, 3])
    section = perplexity_section(found, "exact", 1)
    assert section["loss"] == pytest.approx(8 / 6 * ln2)
    assert section["perplexity"] == pytest.approx(2 ** (8 / 6))
    assert section["bits_per_byte"] == pytest.approx(8 / 6)
    # residuals -1 and 1 bit: sqrt(2 / 1 * 2) / 6
    assert section["bits_per_byte_standard_error"] == pytest.approx(2 / 6)
    assert section["loss_standard_error"] == pytest.approx(2 / 6 * ln2)
    assert section["perplexity_standard_error"] == pytest.approx(2 ** (8 / 6) * 2 / 6 * ln2)
    assert (section["noise_samples"], section["rows"], section["tokens"]) == (0, 2, 6)
    accuracy = accuracy_section(found, True)
    # the most probable token is 0: three of three and one of three
    assert (accuracy["accuracy"], accuracy["predicted"], accuracy["by_level"]) == (pytest.approx(4 / 6), 6, [])


def _ids() -> Any:
    return SimpleNamespace(vocab_size=3, mask_id=2, ignore_id=2, pad_id=2, start_of_turn_id=2)


def test_a_loss_that_is_no_likelihood_has_neither_perplexity_nor_bits() -> None:
    from minillm.eval.likelihood import Measured

    found = Measured([2.0, 4.0], [2, 2], [2, 2], [1, 1], [2, 2])
    section = perplexity_section(found, "none", 4)
    assert section["loss"] == 1.5
    assert section["perplexity"] is section["bits_per_byte"] is section["bits_per_byte_standard_error"] is None
    huge = perplexity_section(replace(found, nats=[2e3, 2e3]), "upper_bound", 4)
    assert huge["perplexity"] is None and huge["bits_per_byte"] > 0  # JSON holds no infinity


@pytest.mark.parametrize("name", ["diffusion", "blocks", "sdd", "swap"])
def test_every_hidden_token_belongs_to_one_level_and_batches_change_nothing(
    name: str, tmp_path: Path, texts: Path
) -> None:
    opened, family = open_model(str(checkpoint(tmp_path, name)), settings(tmp_path, texts))
    data = open_dataset("pretrain", texts, opened.tokenizer, max_seq_len=32, hide_padding=True)
    one, two = (
        measure(opened, family, data, np.arange(8), seed=1, batch_size=size, draws=3)  # type: ignore[arg-type]
        for size in (8, 3)
    )
    assert one.hits == two.hits and one.nats == pytest.approx(two.nats, rel=1e-4)
    assert sum(one.level_predicted) == sum(one.predicted) and sum(one.level_hits) == sum(one.hits)
    assert one.tokens == [32] * 8  # hidden or not
    assert min(one.level_predicted) > 0
    if name in ("diffusion", "sdd"):  # at 24 even levels the ranges hold about so many hidden tokens of 32
        shares = [count / sum(one.predicted) for count in one.level_predicted]
        assert shares == pytest.approx([0.04, 0.12, 0.2, 0.28, 0.36], abs=0.06)


def test_more_draws_estimate_the_same_bound_more_closely(tmp_path: Path, texts: Path) -> None:
    opened, family = open_model(str(checkpoint(tmp_path, "diffusion")), settings(tmp_path, texts))
    data = open_dataset("pretrain", texts, opened.tokenizer, max_seq_len=32, hide_padding=True)
    few, many = (
        perplexity_section(
            measure(opened, family, data, np.arange(12), seed=3, batch_size=12, draws=draws),  # type: ignore[arg-type]
            family.likelihood,
            draws,
        )
        for draws in (1, 16)
    )
    assert many["loss_standard_error"] < few["loss_standard_error"]
    assert abs(few["loss"] - many["loss"]) < 4 * (few["loss_standard_error"] + many["loss_standard_error"])
    assert (few["noise_samples"], many["noise_samples"]) == (1, 16)


# Comparing


def entry(path: str, kind: str, bits: float | None, tokenizer: str = "t") -> dict[str, Any]:
    found = {
        "likelihood": kind, "loss": 1.0, "loss_standard_error": 0.1, "perplexity": 2.7,
        "perplexity_standard_error": 0.1, "bits_per_byte": bits, "bits_per_byte_standard_error": 0.01,
        "noise_samples": 0 if kind == "exact" else 4, "rows": 2, "tokens": 9, "bytes": 30,
    }  # fmt: skip
    return {
        "checkpoint": {"path": path, "tokenizer": tokenizer},
        "perplexity": found,
        "accuracy": None,
        "generation": None,
        "speed": None,
    }


MIXED = [
    entry("b/bound1.pt", "upper_bound", 1.5),
    entry("a/exact1.pt", "exact", 2.0),
    entry("a/swap.pt", "none", None),
    entry("b/bound2.pt", "upper_bound", 1.4),
    entry("a/exact2.pt", "exact", 1.9),
]


def test_exact_values_and_bounds_are_never_in_one_ranking() -> None:
    assert by_kind(MIXED) == {"exact": [4, 1], "upper_bound": [3, 0], "none": [2]}
    page = tables({"models": MIXED})
    places = [
        page.index(word) for word in ("`exact`", "exact2", "exact1", "`upper_bound`", "bound2", "bound1", "`none`")
    ]
    assert places == sorted(places) and page.index("| swap |") > places[-1]
    assert "no order between the tables" in page
    assert "no order between the tables" not in tables({"models": MIXED[1:2]})
    drawn = {panel.title: [bar.label for bar in panel.bars] for panel in panels({"models": MIXED})}
    assert drawn == {
        "Bits per byte, exact": ["exact2", "exact1"],
        "Bits per byte, upper bounds": ["bound2", "bound1"],
    }


def test_other_tokenizers_are_said() -> None:
    assert OTHER_TOKENIZERS in tables({"models": [entry("a.pt", "exact", 1.0), entry("b.pt", "exact", 1.0, "u")]})
    assert OTHER_TOKENIZERS not in tables({"models": MIXED})


def test_models_of_one_name_are_told_apart_by_their_paths() -> None:
    assert labels(MIXED[:2]) == ["bound1", "exact1"]
    assert labels([entry("a/x.pt", "exact", 1.0), entry("b/x.pt", "exact", 1.0)]) == ["a/x.pt", "b/x.pt"]


# Prompts and judge


def settings(folder: Path, data: Path, **changes: Any) -> EvaluateSettings:
    values: dict[str, Any] = {"checkpoint": (), "data_path": str(data), "max_seq_len": 32, "max_new_tokens": 4}
    return EvaluateSettings(**{**values, **changes})


def test_prompts_are_beginnings_of_texts_and_users_turns_of_chats(tmp_path: Path, texts: Path, chats: Path) -> None:
    opened = open_checkpoint(str(checkpoint(tmp_path, "ar")))
    data = open_dataset("pretrain", texts, opened.tokenizer, max_seq_len=40)
    prompts, skipped = choose_prompts(opened, data, np.array([1, 0]), 5, 8)  # type: ignore[arg-type]
    row = data.rows(np.array([1])).tokens[0].tolist()
    assert (len(prompts), skipped) == (2, 0)
    assert prompts[0].tokens == row[:16] and prompts[0].held_out == row[16:24][: len(prompts[0].held_out)]

    data = open_dataset("sft", chats, opened.tokenizer, max_seq_len=64)
    prompts, _ = choose_prompts(opened, data, np.arange(len(data)), 4, 99)  # type: ignore[arg-type]
    assert len(prompts) == 4
    for prompt in prompts:
        text, answer = (
            opened.tokenizer.decode(prompt.tokens, skip_special=False),
            opened.tokenizer.decode(prompt.held_out),
        )
        assert text.startswith("<|im_start|>user\nWhat is ") and text.endswith("<|im_start|>assistant\n")
        assert answer.startswith("It is ") and answer.endswith(".")
    with pytest.raises(UserError, match="lower --max_new_tokens"):
        choose_prompts(opened, data, np.arange(len(data)), 4, 150)  # type: ignore[arg-type]


def test_the_judges_number_is_the_likelihood_of_the_written_tokens_alone(tmp_path: Path) -> None:
    judge = open_checkpoint(str(checkpoint(tmp_path, "ar")))
    prompt, written = TOKENIZER.encode("The miller went"), TOKENIZER.encode(" to the river")
    section: dict[str, Any] = {}
    texts = [(prompt, written), (prompt, []), (prompt, written * 200)]
    judge_texts(judge, saved_family(judge.family, TOKENIZER), [Unjudged(section, TOKENIZER, texts[:2])], 0, 2)
    with torch.no_grad():
        logits = judge.model.logits(judge.model(torch.tensor([prompt + written])).hidden)[0].log_softmax(-1)
    wanted = [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(written)]
    assert section["judge"]["nats_per_token"] == pytest.approx(-sum(wanted) / len(wanted), rel=1e-4)
    assert section["judge"] == {**section["judge"], "tokens": len(written), "cut": 0, "standard_error": None}
    judge_texts(judge, saved_family(judge.family, TOKENIZER), [Unjudged(section, TOKENIZER, texts[2:])], 0, 2)
    assert section["judge"]["cut"] == 1 and section["judge"]["tokens"] == 160 - len(prompt)


# The command


def keys(value: Any) -> Any:
    """The shape of a result: keys, without values; of a list its first item."""
    if isinstance(value, dict):
        return {key: keys(item) for key, item in value.items()}
    if isinstance(value, list):
        return [keys(value[0])] if value else []
    return None


JUDGED = {"nats_per_token": None, "standard_error": None, "tokens": None, "cut": None}
NUMBERS = {
    "distinct_1": None, "distinct_2": None, "distinct_3": None, "repetition": None, "unigram_entropy": None,
    "lengths": {"mean": None, "median": None, "shortest": None, "longest": None},
}  # fmt: skip
RATE = {"batch": None, "tokens_per_second": None, "peak_memory_mb": None}
IDENTITY = dict.fromkeys(("path", "sha256", "architecture", "stage", "step", "parameters", "tokenizer"))
LEVEL = {"hidden_from": None, "hidden_to": None, "accuracy": None, "predicted": None}
SCHEMA = {
    "checkpoint": IDENTITY,
    "data": {"stage": None, "rows": None},
    "perplexity": dict.fromkeys(
        (
            "likelihood",
            "loss",
            "loss_standard_error",
            "perplexity",
            "perplexity_standard_error",
            "bits_per_byte",
            "bits_per_byte_standard_error",
            "noise_samples",
            "rows",
            "tokens",
            "bytes",
        )  # fmt: skip
    ),
    "accuracy": {
        "predicts": None,
        "accuracy": None,
        "standard_error": None,
        "predicted": None,
        "mean_over_levels": None,
        "by_level": [LEVEL],
    },  # fmt: skip
    "generation": {
        "samples": None,
        "skipped_too_long": None,
        "ended": None,
        "self_bleu": None,
        **NUMBERS,
        "judge": JUDGED,
        "held_out": {"self_bleu": None, **NUMBERS, "judge": JUDGED},
        "texts": [{"prompt": None, "text": None, "tokens": None, "ended": None}],
    },  # fmt: skip
    "speed": {
        "device": None,
        "threads": None,
        "new_tokens": None,
        "steps": None,
        "first_token_seconds": None,
        "batch_1": RATE,
        "saturated": RATE,
        "batches": [RATE],
        "quality_by_steps": [{"steps": None, "unigram_entropy": None, "texts_per_second": None, "judge": JUDGED}],
    },  # fmt: skip
}


def test_three_families_side_by_side_with_every_metric(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "LARGEST_BATCH", 2)
    paths = [str(checkpoint(tmp_path, name)) for name in ("ar", "diffusion", "sdd")]
    judge = str(checkpoint(tmp_path, "ar", seed=1))
    output = tmp_path / "deep" / "results.json"
    flags = ["--checkpoint", *paths, "--data_dir", str(texts), "--metrics", "perplexity,accuracy,generation,speed"]
    flags += ["--max_seq_len", "32", "--eval_samples", "4", "--num_samples", "3", "--max_new_tokens", "8"]
    assert main(["evaluate", *flags, "--judge", judge, "--output", str(output)]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert (result["schema_version"], result["command"]) == (1, "evaluate")
    assert list(result) == ["schema_version", "command", "settings", "judge", "models"]
    assert keys(result["judge"]) == IDENTITY and result["settings"]["num_samples"] == 3
    ar, diffusion, sdd = result["models"]
    assert keys(diffusion) == keys(sdd) == SCHEMA
    plain = {**SCHEMA, "accuracy": {**SCHEMA["accuracy"], "by_level": []}}  # type: ignore[dict-item]
    assert keys(ar) == {**plain, "speed": {**SCHEMA["speed"], "quality_by_steps": []}}  # type: ignore[dict-item]

    assert [m["perplexity"]["likelihood"] for m in result["models"]] == ["exact", "upper_bound", "upper_bound"]
    assert [m["perplexity"]["noise_samples"] for m in result["models"]] == [0, 4, 4]
    assert [m["accuracy"]["predicts"] for m in result["models"]] == ["next", "hidden", "hidden"]
    for model in result["models"]:
        assert model["perplexity"]["loss_standard_error"] > 0
        assert model["generation"]["samples"] == len(model["generation"]["texts"]) == 3
        # random weights: the judge finds no text likely
        assert model["generation"]["judge"]["nats_per_token"] > 1.0
        assert model["speed"]["steps"] == model["speed"]["new_tokens"] == 8
        assert [rate["batch"] for rate in model["speed"]["batches"]] == [1, 2]
        assert model["speed"]["first_token_seconds"] > 0 and model["speed"]["saturated"] in model["speed"]["batches"]
    # the same held-out text, the same judge
    assert ar["generation"]["held_out"] == diffusion["generation"]["held_out"] == sdd["generation"]["held_out"]
    assert [point["steps"] for point in sdd["speed"]["quality_by_steps"]] == [8]

    page = output.with_suffix(".md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page
    assert "![charts](results.png)" in page and "## Texts of sdd_pretrain_0" in page
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {each.name for each in output.parent.iterdir()} == {"results.json", "results.md", "results.png"}


@pytest.mark.parametrize("name", ["ar", "blocks", "swap"])
def test_chat_checkpoints_read_conversations_and_unasked_metrics_stay_empty(
    name: str, tmp_path: Path, chats: Path
) -> None:
    path = checkpoint(tmp_path, name, stage="full_sft")
    result = evaluate(settings(tmp_path, chats, checkpoint=(str(path),), max_seq_len=64, noise_samples=2))
    (model,) = result["models"]
    assert model["data"]["stage"] == "sft" and model["generation"] is model["speed"] is result["judge"] is None
    assert (model["perplexity"]["perplexity"] is None) == (name == "swap")
    only = settings(tmp_path, chats, checkpoint=(str(path),), max_seq_len=64, metrics="generation", num_samples=2)
    (model,) = evaluate(only)["models"]
    assert model["perplexity"] is model["accuracy"] is None and model["generation"]["judge"] is None


def test_a_named_architecture_wins_over_the_file(tmp_path: Path, texts: Path) -> None:
    path = str(checkpoint(tmp_path, "ar"))
    opened, family = open_model(path, settings(tmp_path, texts, architecture="diffusion"))
    assert (opened.architecture, family.name, opened.model.config.causal) == ("diffusion", "diffusion", False)
    tokens = torch.randint(6400, (1, 8))
    with torch.no_grad():
        causal = open_checkpoint(path).model(tokens).hidden
        assert not torch.allclose(opened.model(tokens).hidden, causal)
    with pytest.raises(UserError, match="is no sdd model: it lacks the embedding"):
        open_model(path, settings(tmp_path, texts, architecture="sdd"))
    with pytest.raises(UserError, match="is no ar model: it has the embedding"):
        open_model(str(checkpoint(tmp_path, "sdd")), settings(tmp_path, texts, architecture="ar"))


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--metrics", "perplexity,fluency"], 2, "'fluency' is not one of perplexity, accuracy"),
        (["--metrics", ","], 2, "give some of perplexity"),
        (["--judge", "diffusion", "--metrics", "generation"], 1, "is a diffusion model"),
        (["--judge", "diffusion"], 1, "needs --metrics with generation or speed"),
        (["--output", "results.md"], 1, "give the JSON file"),
        (["--max_seq_len", "161"], 1, "has 160 positions"),
        (["--max_new_tokens", "150", "--metrics", "generation", "--max_seq_len", "32"], 1, "lower --max_new_tokens"),
    ],
)
def test_what_cannot_be_is_explained(
    flags: list[str], code: int, message: str, tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(checkpoint(tmp_path, "diffusion")) if word == "diffusion" else word for word in flags]
    assert (
        main(["evaluate", "--checkpoint", str(checkpoint(tmp_path, "ar")), "--data_path", str(texts), *words]) == code
    )
    assert message in capsys.readouterr().err


def test_without_matplotlib_there_is_a_warning_and_no_picture(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ["--checkpoint", str(checkpoint(tmp_path, "ar")), "--data_path", str(texts), "--max_seq_len", "32"]
    assert main(["evaluate", *flags, "--output", str(tmp_path / "r.json")]) == 0
    assert "charts need matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "r.png").exists() and "![" not in (tmp_path / "r.md").read_text()


def test_the_script_is_the_command(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "evaluate_models.py")]
    done = subprocess.run([*script, "--judges", "x"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "Did you mean --judge?" in done.stderr and "minillm evaluate --help" in done.stderr
