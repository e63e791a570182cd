"""Evaluating answers: every metric by hand, every constraint on both sides of its border, every family end to end."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import random_model, tiny_config

from minillm.checkpoint.files import save_tensors
from minillm.checkpoint.model import open_checkpoint
from minillm.cli import main
from minillm.eval import instructions, text_metrics
from minillm.eval.answers import Answer, Reference, form_of, last_run, score_references, write_answers
from minillm.eval.constraints import CHECKS, check_known, is_met, shipped_prompts
from minillm.eval.instruction_report import markdown
from minillm.eval.instructions import InstructionSettings, evaluate
from minillm.eval.text_metrics import (
    Lengths,
    chrf,
    distinct_n,
    has_loop,
    length_statistics,
    longest_common_subsequence,
    rouge_l,
    self_bleu,
    unigram_entropy,
    words,
)
from minillm.families import saved_family
from minillm.families.base import Progress, Sampling
from minillm.families.settings import FamilyConfig
from minillm.log import UserError, format_rate
from minillm.text.chat import encode_chat
from minillm.text.ngrams import repetition
from minillm.text.tokenizer import CONTROL_TOKENS, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = Tokenizer.load(None)
FAMILIES = {
    "ar": FamilyConfig(),
    "diffusion": FamilyConfig("diffusion"),
    "blocks": FamilyConfig("diffusion", diffusion_block=4),
    "sdd": FamilyConfig("sdd", k_schedule=(2,)),
    "swap": FamilyConfig("sdd", k_schedule=(2,), noise="swap"),
}


# Numbers about texts


def test_words_are_lower_case_and_a_chinese_character_is_one() -> None:
    assert words("Don't STOP, it's 3 o’clock!") == ["don't", "stop", "it's", "3", "o’clock"]
    assert words("我有2只cat。") == ["我", "有", "2", "只", "cat"]
    assert words(" ?! ") == []


def test_chrf_is_f2_over_character_ngrams() -> None:
    # "abcd" against "abce": n = 1..4 match 3/4, 2/3, 1/2 and 0/1 on both sides, so precision = recall = F
    wanted = 100 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4
    found = chrf(["abcd", "same"], ["abce", "same"])
    assert found.each == pytest.approx([wanted, 100.0])
    assert wanted < found.corpus < 100.0
    assert "nc:6" in found.signature
    # one of two characters: unigrams alone exist on both sides; precision 1, recall 1/2, F2 = 5 p r / (4 p + r)
    assert chrf(["a"], ["ab"]).each == pytest.approx([100 * 5 * 0.5 / 4.5])
    assert chrf([""], ["ab"]).corpus == 0.0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # common: "the cat on mat", 4 of 5 and of 6 words
    assert rouge_l("The cat sat on mat.", "the cat is on the mat") == pytest.approx(2 * 4 / 11)
    assert rouge_l("我爱北京", "我在北京") == pytest.approx(2 * 3 / 8)
    assert rouge_l("Yes!", "yes") == 1.0
    assert rouge_l("", "yes") == rouge_l("no", "yes") == rouge_l("...", "...") == 0.0


def test_the_common_subsequence_is_that_of_the_table() -> None:
    def by_table(one: list[int], two: list[int]) -> int:
        table = [[0] * (len(two) + 1) for _ in range(len(one) + 1)]
        for i, a in enumerate(one):
            for j, b in enumerate(two):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        return table[-1][-1]

    dice = random.Random(1)
    for _ in range(200):
        one, two = ([dice.randrange(4) for _ in range(dice.randrange(12))] for _ in range(2))
        assert longest_common_subsequence(one, two) == by_table(one, two)


def test_self_bleu_is_the_mean_bleu_against_the_others() -> None:
    # each of the two against the other: precisions 4/5, 3/4, 2/3, 1/2, whose product is 1/5
    assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx(100 * 0.2**0.25)
    assert self_bleu(["我爱北京天", "我爱北京地"]) == pytest.approx(100 * 0.2**0.25)
    assert self_bleu(["one two three four"] * 3) == pytest.approx(100.0)
    assert self_bleu(["one two", "three four"]) == 0.0
    with pytest.raises(ValueError, match="there is 1"):
        self_bleu(["alone"])


def test_self_bleu_holds_a_text_against_so_many_others_that_follow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a b c d", "a b c d", "w x y z"]
    monkeypatch.setattr(text_metrics, "SELF_BLEU_REFERENCES", 1)  # 1 sees 2, 2 sees 3, 3 sees 1
    assert self_bleu(texts) == pytest.approx(100 / 3)
    monkeypatch.setattr(text_metrics, "SELF_BLEU_REFERENCES", 2)
    assert self_bleu(texts) == pytest.approx(200 / 3)


def test_variety_by_hand() -> None:
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 2) == pytest.approx(2 / 4)  # 12 21 12 | 12
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 1) == pytest.approx(2 / 6)
    assert distinct_n([[1]], 2) == distinct_n([], 1) == 0.0
    assert unigram_entropy([[1, 1], [2, 3]]) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))
    assert unigram_entropy([[5, 5, 5]]) == unigram_entropy([]) == 0.0
    assert length_statistics([[1], [1, 2], [1] * 6]) == Lengths(3.0, 2.0, 1, 6)
    assert length_statistics([]) == Lengths(0.0, 0.0, 0, 0)


def test_repetition_is_the_share_of_4_grams_seen_before() -> None:
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 8) == pytest.approx(4 / 5)
    assert repetition([1, 2, 3, 4, 5]) == repetition([1, 1, 1]) == repetition([]) == 0.0


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        ([7] * 12, True),
        ([7] * 11, False),  # fewer than 12 tokens
        ([1, 2] * 6, True),
        ([1, 2] * 5 + [1], False),
        ([1, 2, 3] * 4, True),
        ([9, *[1, 2, 3, 4] * 4, 9], True),
        ([1, 2, 3, 4] * 3 + [1, 2, 3], False),  # not four times
        ([*range(32)] * 4, True),
        ([*range(33)] * 4, False),  # longer than 32
        ([1, 2, 3, 9] + [1, 2, 3, 8] + [1, 2, 3, 7] + [1, 2, 3, 6], False),  # not in a row
        ([], False),
    ],
)
def test_a_loop_is_four_times_the_same_in_a_row_over_twelve_tokens(tokens: list[int], loop: bool) -> None:
    assert has_loop(tokens) is loop


def test_a_missing_sacrebleu_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    for ask in (lambda: chrf(["a"], ["a"]), lambda: self_bleu(["a", "b"])):
        with pytest.raises(UserError, match=r"minillm-trainer\[eval\]"):
            ask()


# Constraints


@pytest.mark.parametrize(
    ("constraint", "met", "broken"),
    [
        ({"kind": "words", "max": 3}, "One, two, three!", "one two three four"),
        ({"kind": "words", "min": 2}, "don't stop", "don't"),
        ({"kind": "sentences", "min": 2, "max": 2}, 'It is 3.5 m. He said "no."', "One. Two. Three."),
        ({"kind": "sentences", "min": 2, "max": 2}, "你好！我来了。", "你好，我来了。"),
        ({"kind": "characters", "max": 4}, "我 爱你。", "我很爱你。"),
        ({"kind": "paragraphs", "min": 2, "max": 2}, "One.\n\n\nTwo.", "One.\nTwo."),
        ({"kind": "list", "count": 2}, "Here:\n- one\n  * two", "- one\n- two\n- three"),
        ({"kind": "list", "count": 2}, "1. one\n2) two", "one-two\n-\n1.5 m"),
        ({"kind": "keywords", "words": ["cat", "猫"]}, "A Cat是猫", "cats 猫"),
        ({"kind": "keywords", "words": ["tree"], "min": 2}, "tree, tree", "tree"),
        ({"kind": "keywords", "words": ["tree"], "max": 1}, "one tree", "tree, Tree"),
        ({"kind": "forbidden", "words": [",", "cat"]}, "concatenate", "a CAT"),
        ({"kind": "language", "name": "en"}, "A cat called 猫 sits here.", "猫猫猫 cat"),
        ({"kind": "language", "name": "zh"}, "我叫安娜 Ann。", "12 3!"),
        ({"kind": "json", "keys": ["a", "b"]}, '{"b": 1, "a": 2}', '{"a": 1}'),
        ({"kind": "json", "keys": ["a"]}, '```json\n{"a": [1]}\n```', 'Here: {"a": 1}'),
        ({"kind": "json", "keys": []}, "{}", "[1]"),
        ({"kind": "starts_with", "text": "Once"}, " Once upon", "once upon"),
        ({"kind": "ends_with", "text": "night!"}, "Good night!\n", "Good night! Bye"),
        ({"kind": "lowercase"}, "all small, 3 是", "Not small"),
        ({"kind": "uppercase"}, "LOUD!", "123"),
        ({"kind": "one_of", "answers": ["yes", "no"]}, "Yes.", "yes it is"),
    ],
)
def test_a_constraint_is_met_or_not(constraint: dict[str, Any], met: str, broken: str) -> None:
    check_known(constraint)
    assert is_met(constraint, met)
    assert not is_met(constraint, broken)
    assert not is_met(constraint, " \n")  # an empty answer keeps to nothing


@pytest.mark.parametrize(
    ("constraint", "message"),
    [({"kind": "rhyme"}, "does not exist"), ({"kind": "words", "most": 3}, "most"), ({"kind": "list"}, "count")],
)
def test_a_constraint_that_cannot_be_checked_is_an_error(constraint: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_known(constraint)


def test_shipped_prompts_can_be_met_and_are_not_met_by_chance() -> None:
    prompts = shipped_prompts()
    assert min(sum(prompt.language == name for prompt in prompts) for name in ("en", "zh")) >= 20
    assert len({prompt.prompt for prompt in prompts}) == len({prompt.name for prompt in prompts}) == len(prompts)
    assert {constraint["kind"] for prompt in prompts for constraint in prompt.constraints} == {*CHECKS}
    for prompt in prompts:
        assert [each for each in prompt.constraints if not is_met(each, prompt.example)] == [], prompt.name
        for thoughtless in ("1", "Sure, here you are", "好的，请看"):
            assert not all(is_met(each, thoughtless) for each in prompt.constraints), (prompt.name, thoughtless)


# Answers


class Scripted:
    """A family that writes these tokens; `watch` hears of `canvas`."""

    def __init__(self, tokens: list[int], canvas: list[int]) -> None:
        self.tokens, self.canvas, self.seeds = tokens, canvas, []  # type: ignore[var-annotated]

    def generate(self, model: Any, prompts: Any, sampling: Sampling, watch: Any) -> list[list[int]]:
        self.seeds.append((sampling.seed, len(prompts)))
        watch(Progress([[1, 2] for _ in prompts]))
        watch(Progress([self.canvas for _ in prompts]))
        return [self.tokens for _ in prompts]


@pytest.mark.parametrize(
    ("tokens", "canvas", "ended"),
    [
        ([5, 6], [5, 6], True),  # AR: stopped before its limit
        ([5, 6, 7, 8], [5, 6, 7, 8], False),  # cut
        ([5, 6], [5, 6, TOKENIZER.end_of_turn_id, 9], True),  # a canvas is always full
        ([5, 6, 7], [5, TOKENIZER.ignore_id, 6, 7], False),  # ignore tokens are left out, but nothing has ended
    ],
)
def test_an_answer_has_ended_where_a_stop_token_was_written(tokens: list[int], canvas: list[int], ended: bool) -> None:
    opened: Any = SimpleNamespace(tokenizer=TOKENIZER, model=None)
    family: Any = Scripted(tokens, canvas)
    answers = write_answers(opened, family, [[1]] * 3, Sampling(max_new_tokens=4, seed=7), batch_size=2)
    assert answers == [Answer(TOKENIZER.decode(tokens), tokens, ended)] * 3
    assert family.seeds == [(7, 2), (9, 1)]  # a row's seed is that of its place, whatever the batch


def test_the_form_of_an_answer() -> None:
    good = form_of(Answer("hello", TOKENIZER.encode("hello"), True), TOKENIZER)
    assert all(good[check] for check in ("ended", "clean", "non_empty", "loop_free"))
    assert not form_of(Answer("hello", [TOKENIZER.mask_id], True), TOKENIZER)["clean"]
    for name in CONTROL_TOKENS:
        for text in (f"a{name}", f"a{name[:-2]} {name[-2:]}"):  # as the template writes it inside a message
            assert not form_of(Answer(text, TOKENIZER.encode(text), True), TOKENIZER)["clean"]
    assert form_of(Answer("a | b <mask>", [9], True), TOKENIZER)["clean"]
    assert not form_of(Answer(" \n", [9], True), TOKENIZER)["non_empty"]
    assert not form_of(Answer("x", [9] * 12, True), TOKENIZER)["loop_free"]


def test_the_last_run_is_the_last_answer() -> None:
    assert last_run([True, True, False, True, True, False]) == [False, False, False, True, True, False]
    assert last_run([True, True]) == [True, True]
    assert last_run([False, False]) == [False, False]


# Whole runs


def checkpoint(folder: Path, name: str, seed: int = 0) -> Path:
    """A random model of a family over the shipped tokenizer."""
    family = FAMILIES[name]
    config = tiny_config(
        vocab_size=TOKENIZER.vocab_size,
        max_position_embeddings=160,
        causal=family.architecture == "ar",
        denoiser=family.denoiser if family.architecture == "sdd" else "",
    )
    path = folder / f"{name}.pt"
    content = {
        "model_state_dict": random_model(config, seed).state_dict(),
        "model_config": config.to_dict(),
        "family": family.to_dict(),
        "stage": "full_sft",
        "global_step": 3,
    }
    save_tensors(path, content)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Every conversation form, two turns, and a row that cannot be used."""
    rows: list[dict[str, Any]] = [
        {"prompt": "What is 2 + 3?", "response": "2 + 3 = 5."},
        {"instruction": "天空是什么颜色？", "output": "天空是蓝色的。"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "Who are you?"},
                {"role": "assistant", "content": "A model."},
            ]
        },
        {"nothing": 1},
    ]
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Every sixth of the shipped prompts; how many that are."""
    few = shipped_prompts()[::6]
    monkeypatch.setattr(instructions, "shipped_prompts", lambda: few)
    return len(few)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_evaluated_and_a_seed_gives_the_same_files(
    name: str, data: Path, tmp_path: Path, few_prompts: int
) -> None:
    path = checkpoint(tmp_path, name)
    common = ["--checkpoint", str(path), "--data_path", str(data), "--max_new_tokens", "4", "--temperature", "1"]
    for folder, flags in (("one", []), ("two", []), ("three", ["--seed", "1"])):
        assert main(["evaluate-instructions", *common, *flags, "--output", str(tmp_path / folder / "r.json")]) == 0
    pages = [[(tmp_path / folder / file).read_bytes() for file in ("r.json", "r.md")] for folder in ("one", "two")]
    assert pages[0] == pages[1]
    result, other = (json.loads((tmp_path / folder / "r.json").read_bytes()) for folder in ("one", "three"))
    answers = [[case["answer"] for case in each["cases"]["instructions"]] for each in (result, other)]
    assert answers[0] != answers[1]

    assert (result["schema_version"], result["command"]) == (1, "evaluate-instructions")
    assert result["checkpoint"]["architecture"] == FAMILIES[name].architecture
    quality, constraints = result["quality"], result["instructions"]
    assert quality["samples"] == quality["form"]["answers"] == len(result["cases"]["quality"]) == 4
    assert constraints["prompts"] == len(result["cases"]["instructions"]) == few_prompts
    assert constraints["constraints"] == sum(kind["constraints"] for kind in constraints["by_kind"].values())
    assert all(case["tokens"] <= 4 for cases in result["cases"].values() for case in cases)
    if name == "swap":
        assert (quality["likelihood"], quality["reference_nats_per_token"]) == ("none", None)
    else:
        assert quality["likelihood"] == ("exact" if name == "ar" else "upper_bound")
        assert 3.0 < quality["reference_nats_per_token"] < 40.0  # log 6400 is 8.8; random weights are worse
    assert pages[0][1].decode() == markdown(result)


def test_the_likelihood_is_that_of_the_last_answer_and_its_end(data: Path, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "ar")
    result = evaluate(InstructionSettings(str(path), str(data), max_new_tokens=4, batch_size=3))
    model = open_checkpoint(str(path)).model
    total, count = 0.0, 0
    for case in result["cases"]["quality"]:
        prompt = encode_chat(TOKENIZER, case["prompt"], add_generation_prompt=True)[0]
        answer = [*TOKENIZER.encode(case["reference"]), TOKENIZER.end_of_turn_id]
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([prompt + answer])).hidden)[0].log_softmax(-1)
        nats = -sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
        assert case["reference_nats_per_token"] == pytest.approx(nats / len(answer), rel=1e-4)
        total, count = total + nats, count + len(answer)
    assert result["quality"]["reference_nats_per_token"] == pytest.approx(total / count, rel=1e-4)
    assert result["quality"]["reference_tokens"] == count
    assert (
        result["cases"]["quality"][3]["reference"] == "A model." and len(result["cases"]["quality"][3]["prompt"]) == 3
    )


@pytest.mark.parametrize("name", ["ar", "diffusion", "sdd"])
def test_a_score_does_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    opened = open_checkpoint(str(checkpoint(tmp_path, name)))
    family = saved_family(opened.family, opened.tokenizer)
    rows = [Reference(i, [*range(20, 26 + 3 * i)], [False] * 3 + [True] * (3 + 3 * i)) for i in range(3)]
    together = score_references(opened, family, rows, 5, 3)
    alone = score_references(opened, family, rows, 5, 1)
    assert [count for _, count in together] == [count for _, count in alone] == [3, 6, 9]
    assert [total for total, _ in together] == pytest.approx([total for total, _ in alone], rel=1e-4)


@pytest.mark.usefixtures("few_prompts")
def test_final_answers_are_judged_as_the_reward_does(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # math-verify takes seconds to start
    prompts = tmp_path / "gsm.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": f"Count on.\n#### {n + 1}"} for n in range(4)]
    rows.append({"question": "word " * 300, "answer": "#### 1"})
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["<think>1</think><answer>1</answer>", "It is 2.", "It is 4.", ""]

    def answer(*arguments: Any) -> list[Answer]:
        assert len(arguments[2]) == 4
        return [Answer(text, TOKENIZER.encode(text), True) for text in texts]

    settings = InstructionSettings(str(checkpoint(tmp_path, "ar")), answers_path=str(prompts), max_new_tokens=2)
    written = instructions._answer
    monkeypatch.setattr(instructions, "_answer", lambda *a: answer(*a) if len(a[2]) == 4 else written(*a))
    result = evaluate(settings)
    final = result["final_answers"]
    assert (final["samples"], final["skipped_too_long"], final["unchecked"]) == (4, 1, 0)
    assert (final["accuracy"], final["format"], final["standard_error"]) == (0.5, 0.25, 0.25)
    cases = result["cases"]["final_answers"]
    assert [(case["expected"], case["found"], case["right"]) for case in cases] == [
        ("1", "1", True), ("2", "2", True), ("3", "4", False), ("4", None, False),
    ]  # fmt: skip
    page = markdown(result)
    assert "| right | 50.0 % ± 25.0 |" in page
    assert page.index("## Final answers: the worst") < page.index("- wrong: 4") < page.index("- wrong: no answer")


@pytest.mark.usefixtures("few_prompts")
def test_samples_are_taken_by_the_seed_in_the_order_of_the_data(data: Path, tmp_path: Path) -> None:
    settings = InstructionSettings(str(checkpoint(tmp_path, "ar")), str(data), num_samples=2, max_new_tokens=2)
    taken = set()
    for seed in range(6):
        cases = evaluate(replace(settings, seed=seed))["cases"]["quality"]
        lines = [case["line"] for case in cases]
        assert lines == sorted(lines) and len(lines) == 2
        taken.add(tuple(lines))
    assert len(taken) > 1


def test_without_data_only_the_shipped_prompts_run_and_sacrebleu_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    flags = ["evaluate-instructions", "--checkpoint", str(checkpoint(tmp_path, "ar")), "--max_new_tokens", "2"]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert "## Following instructions" in printed and "Against references" not in printed
    assert main([*flags, "--data_path", str(data)]) == 1
    assert "pip install 'minillm-trainer[eval]'" in capsys.readouterr().err


def test_the_page_shows_the_worst_and_the_best(data: Path, tmp_path: Path) -> None:
    settings = InstructionSettings(str(checkpoint(tmp_path, "ar")), str(data), max_new_tokens=2)
    result = evaluate(settings)
    for place, (score, case) in enumerate(zip((30.0, 10.0, 20.0, 40.0), result["cases"]["quality"])):
        case.update(chrf=score, answer=f"# answer {place}\nof two lines")
    for case in result["cases"]["instructions"][1:]:
        case.update(all_met=False, constraints=[{**each, "met": False} for each in case["constraints"]])
    kept = result["cases"]["instructions"][0]
    kept.update(all_met=True, constraints=[{**each, "met": True} for each in kept["constraints"]])
    page = markdown(result)
    worst, best, failed, met = (
        page.index(f"## {title}")
        for title in (
            "Against references: the worst",
            "Against references: the best",
            "Following instructions: the worst",
            "Following instructions: the best",
        )
    )
    shown = [page.index(f"    # answer {place}\n    of two lines") for place in (1, 2, 0, 3)]
    assert worst < shown[0] < shown[1] < shown[2] < best < shown[3] < failed < met
    assert "2 tokens; form: fails ended" in page
    assert page.index("NOT met") > failed and "met: words (max 30)" in page[met:]
    assert kept["prompt"][0]["content"] in page[met:]


def test_what_does_not_fit_is_left_out_and_said(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(tmp_path, "ar")
    with data.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "word " * 300, "response": "no"}) + "\n")
    result = evaluate(InstructionSettings(str(path), str(data), max_new_tokens=2))
    assert (result["quality"]["samples"], result["quality"]["skipped_too_long"]) == (4, 1)
    assert "1 of 5 conversations do not fit" in capsys.readouterr().err
    data.write_text(json.dumps({"prompt": "word " * 300, "response": "no"}), encoding="utf-8")
    with pytest.raises(UserError, match="160 positions; no conversation and 2 new tokens fit"):
        evaluate(InstructionSettings(str(path), str(data), max_new_tokens=2))
    with pytest.raises(UserError, match="lower --max_new_tokens"):
        evaluate(InstructionSettings(str(path), max_new_tokens=150))


def test_an_output_that_cannot_be_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for output, message in (
        (tmp_path / "r.md", "give the JSON file"),
        (tmp_path / "file" / "r.json", "cannot be made"),
    ):
        assert main(["evaluate-instructions", "--checkpoint", "missing.pt", "--output", str(output)]) == 1
        assert message in capsys.readouterr().err


def test_the_script_is_the_command(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "evaluate_instruction.py")]
    done = subprocess.run([*script, "--num_sample", "1"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "Did you mean --num_samples?" in done.stderr and "minillm evaluate-instructions --help" in done.stderr


def test_slow_work_shows_its_rate_too() -> None:
    assert [format_rate(rate) for rate in (0.42, 9.96, 1234.5)] == ["0.4/s", "10.0/s", "1,234/s"]
