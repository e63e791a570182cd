"""Rewards judge as documented, and whatever one of them does, the run goes on."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from minillm.log import UserError
from minillm.rollout.rewards import RewardFunctions, RewardSpec, length_reward, parse_reward
from minillm.rollout.worker import Failure, Worker
from minillm.text.tokenizer import Tokenizer

MODULE = """
import os, time

def words(prompt, completion, answer):
    return len(completion.split())

def odd(prompt, completion, answer):
    print("a function may print")
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "hang":
        time.sleep(60)
    if completion == "exit":
        raise SystemExit(3)
    if completion == "die":
        os._exit(3)
    if completion == "text":
        return "0.5"
    if completion == "nan":
        return float("nan")
    if completion == "none":
        return None
    return True

def reads(prompt, completion, answer):
    return float(input())

value = 3
"""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "judges_of_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return "judges_of_test"


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(timeout=2.0)
    yield worker
    worker.close()


def judged(texts: list[str], completions: list[str], answer: str, tokenizer: Tokenizer) -> list[float]:
    """The total of each completion."""
    rewards = RewardFunctions(texts, tokenizer)
    try:
        count = len(completions)
        return rewards(["What?"] * count, completions, [answer] * count).total.tolist()
    finally:
        rewards.close()


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("math", ("math", "", 1.0)),
        ("format=0.2", ("format", "", 0.2)),
        ("length:0-256=-0.1", ("length", "0-256", -0.1)),
        ("my.judges:score", ("my.judges", "score", 1.0)),
        ("judges:score=2", ("judges", "score", 2.0)),
        ("model:out/a=b/reward_512.pth=0.5", ("model", "out/a=b/reward_512.pth", 0.5)),
    ],
)
def test_the_grammar(text: str, spec: tuple[str, str, float]) -> None:
    assert parse_reward(text) == RewardSpec(*spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maths", "Did you mean math"),
        ("math:0.5", "math takes no argument; a weight is written math=0.5"),
        ("math=much", "not a number other than 0"),
        ("math=nan", "not a number other than 0"),
        ("math=0", "not a number other than 0"),
        ("length", "needs a range of tokens"),
        ("model", "needs a checkpoint"),
        ("judges:", "give NAME"),
        ("", "give NAME"),
        (":score", "give NAME"),
    ],
)
def test_what_the_grammar_refuses(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_reward(text)


@pytest.mark.parametrize("text", ["length:a", "length:5-2", "length:0", "length:-3", "length:1-2-3"])
def test_lengths_that_are_no_range(text: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="--reward length"):
        RewardFunctions([text], tokenizer)


def test_the_same_twice_and_none_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="format is there twice"):
        RewardFunctions(["format", "format=2"], tokenizer)
    with pytest.raises(UserError, match="no reward"):
        RewardFunctions([], tokenizer)


def test_number_and_format(tokenizer: Tokenizer) -> None:
    good = "<think>3 + 4</think>\n<answer>7</answer>"
    texts = [good, "<answer>7</answer>", "It is 7.", "8", good + "!", "<answer>7</answer><think>3</think>", ""]
    assert judged(["number"], texts, "7", tokenizer) == [1, 1, 1, 0, 1, 1, 0]
    assert judged(["format"], texts, "7", tokenizer) == [1, 0, 0, 0, 0, 0, 0]
    twice = good.replace("</think>", "</think></think>")
    empty = "<think></think><answer>7</answer>"
    assert judged(["format"], [twice, empty, f" {good}\n"], "7", tokenizer) == [0, 0, 1]
    assert judged(["number"], ["Paris"], "Paris", tokenizer) == [0]  # that is no number


def test_length_rises_to_the_range_and_falls_behind_it() -> None:
    assert [length_reward(n, 10, 20) for n in (0, 5, 10, 20, 30, 40, 99)] == [0, 0.5, 1, 1, 0.5, 0, 0]
    assert [length_reward(n, 0, 4) for n in (0, 4, 6, 8)] == [1, 1, 0.5, 0]


def test_length_counts_tokens_and_repetition_is_a_penalty(tokenizer: Tokenizer) -> None:
    text = "one two three four"
    count = len(tokenizer.encode(text))
    assert judged([f"length:{count}"], [text], "", tokenizer) == [1]
    assert judged([f"length:{2 * count}"], [text], "", tokenizer) == [0.5]
    once, often = judged(["repetition"], ["The cat sat on the mat.", "no " * 50], "", tokenizer)
    assert once == 0.0 and often < -0.8


def test_weights_and_parts(tokenizer: Tokenizer) -> None:
    rewards = RewardFunctions(["number=2", "format=0.5", "length:1-9999=-1"], tokenizer)
    result = rewards(["q"] * 2, ["<think>a</think><answer>7</answer>", "7"], ["7", "7"])
    assert {name: part.tolist() for name, part in result.parts.items()} == {
        "number": [1, 1], "format": [1, 0], "length": [1, 1],
    }  # fmt: skip
    assert result.total.tolist() == [1.5, 1.0] and result.total.dtype == np.float32
    assert result.failed.tolist() == [False, False]


@pytest.fixture(scope="module")
def math_verify(tokenizer: Tokenizer) -> Iterator[RewardFunctions]:
    pytest.importorskip("math_verify")
    rewards = RewardFunctions(["math"], tokenizer)
    yield rewards
    rewards.close()


def test_math_reads_formulas_and_settles_numbers_itself(
    math_verify: RewardFunctions, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    call = math_verify.worker.call
    monkeypatch.setattr(math_verify.worker, "call", lambda *a: asked.append(a) or call(*a))
    texts = [r"\boxed{\frac{x+1}{2}}", r"<answer>$\frac{1}{2}(x + 1)$</answer>", r"\boxed{x}", "7", "none"]
    result = math_verify([""] * 5, texts, [r"\frac{x+1}{2}"] * 5)
    assert result.parts["math"].tolist() == [1, 1, 0, 0, 0]
    assert len(asked) == 4  # the first is the very same text
    asked.clear()
    numbers = math_verify([""] * 4, ["#### 7", "#### 8", "It is 7.", "None."], ["7"] * 4)
    assert numbers.parts["math"].tolist() == [1, 0, 1, 0] and not asked
    several = ("5 or 6", "5, 6", "$5$ $6$", "1 2 3 4 5 6 7", r"\{5, 6\}", r"6 \text{ or } 5")
    hedged = math_verify([""] * 7, [f"<answer>{text}</answer>" for text in (*several, "2 \\cdot 3")], ["6"] * 7)
    assert hedged.total.tolist() == [*[0] * 6, 1]  # who names several says none
    assert not result.failed.any() and not numbers.failed.any()


def test_math_verify_gets_no_further_than_its_worker(math_verify: RewardFunctions) -> None:
    texts = ["\\boxed{", "\\frac{}{}", "\x00", "\u221a\u221a", "((((", "1+x"]
    result = math_verify([""] * 6, [f"<answer>{text}</answer>" for text in texts], ["x+1"] * 6)
    assert result.total.tolist() == [0, 0, 0, 0, 0, 1]
    math_verify.worker.timeout = 1.0  # a tower of powers, which sympy computes
    tower = math_verify([""], ["<answer>9^{9^{9^9}}</answer>"], ["x+1"])
    assert tower.total.tolist() == [0]


def test_math_without_math_verify_is_exact(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert judged(["math"], ["#### 7.0", "#### 8", r"\boxed{7}"], "7", tokenizer) == [1, 0, 1]


def test_a_function_of_the_user(tokenizer: Tokenizer, module: str) -> None:
    assert judged([f"{module}:words=0.5"], ["a b c", ""], "", tokenizer) == [1.5, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("judges_of_test:missing", "AttributeError"),
        ("no_such_module:f", "ModuleNotFoundError"),
        ("judges_of_test:value", "is no function"),
    ],
)
def test_functions_that_cannot_be_imported_are_said_at_once(
    tokenizer: Tokenizer, module: str, name: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        RewardFunctions([name], tokenizer)


def test_what_raises_hangs_or_talks_nonsense_is_a_failed_sample_and_told_once(
    tokenizer: Tokenizer, module: str, capfd: pytest.CaptureFixture[str]
) -> None:
    rewards = RewardFunctions([f"{module}:odd", "length:1-99=0.5"], tokenizer, timeout=1.0)
    texts = ["fine", "raise", "hang", "exit", "die", "text", "nan", "none", "raise", "fine"]
    started = time.perf_counter()
    try:
        result = rewards([""] * 10, texts, [""] * 10)
    finally:
        rewards.close()
    assert time.perf_counter() - started < 20
    assert result.failed.tolist() == [False, *[True] * 8, False]
    assert result.total.tolist() == [1.5, *[0.0] * 8, 1.5]
    assert np.isnan(result.parts["odd"]).tolist() == result.failed.tolist()
    assert not np.isnan(result.parts["length"]).any()
    said = capfd.readouterr().err
    for kind in ("KeyError", "time-out", "SystemExit", "ended", "TypeError", "ValueError"):
        assert said.count(f"failed ({kind}") == 1
    assert "The completion was: 'hang'" in said


def test_a_function_cannot_read_the_protocol(tokenizer: Tokenizer, module: str) -> None:
    rewards = RewardFunctions([f"{module}:reads"], tokenizer, timeout=5.0)
    try:
        assert rewards(["q"], ["c"], ["a"]).failed.tolist() == [True]
    finally:
        rewards.close()


def test_a_worker_starts_again_after_it_was_ended(worker: Worker, module: str) -> None:
    assert worker.process is None  # nothing runs before it is needed
    worker.timeout = 1.0
    assert worker.call(f"{module}:odd", "", "hang", "") == Failure("time-out", "no reward after 1 seconds")
    assert worker.call(f"{module}:odd", "", "fine", "") == 1.0
    assert worker.call(f"{module}:words", "", "x " * 200_000, "") == 200_000  # longer than a pipe holds


def test_a_hanging_function_dies_even_when_its_parent_was_killed(module: str) -> None:
    program = (
        "import sys, threading, time, os\nfrom minillm.rollout.worker import Worker\nworker = Worker(1.0)\n"
        f"worker.open('{module}:odd')\nprint(worker.process.pid, flush=True)\n"
        f"threading.Thread(target=worker.call, args=('{module}:odd', '', 'hang', '')).start()\n"
        "time.sleep(0.3)\nos._exit(1)\n"
    )
    path = os.pathsep.join(each for each in sys.path if each)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _alive(pid):
        time.sleep(0.1)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_reward_model_reads_tokens(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Model:
        tokenizer = Tokenizer.load()

        def __call__(self, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
            if completions and completions[0] == [0]:
                raise ValueError("too long")
            return torch.tensor([math.inf if each == [9] else float(sum(each)) for each in completions])

    monkeypatch.setattr("minillm.checkpoint.reward.open_reward_model", lambda path, device: Model())
    rewards = RewardFunctions(["model:out/reward.pth=2"], tokenizer)
    result = rewards(["q"] * 3, ["a"] * 3, [""] * 3, tokens=([[1]] * 3, [[1, 2], [9], [4]]))
    assert result.total.tolist() == [6, 0, 8] and result.failed.tolist() == [False, True, False]
    assert rewards(["q"], ["a"], [""], tokens=([[1]], [[0]])).failed.tolist() == [True]
    text = rewards(["q"], ["one two"], [""])
    assert text.parts["model"].tolist() == [sum(tokenizer.encode("one two"))]
