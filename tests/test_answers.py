"""What an answer comes to, and whether it is right."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from minillm.text.answers import as_number, final_answer, is_right, marked_answer

THOUGHT = "<think>3 and 4 make 7, or 8?</think>"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>7</answer>", "7"),
        (THOUGHT + "<answer> 7 apples </answer> and 9 pears", "7 apples"),
        ("<answer>1</answer> no: <answer>2</answer>", "2"),  # the last word counts
        ("<answer>so #### 5</answer>", "5"),
        (r"<answer>\boxed{5}</answer> #### 6", "5"),  # the tag comes before the other marks
        ("3 + 4 = 7\n#### 7\nThat is 8.", "7"),
        (r"Thus \boxed{3} or \boxed{\frac{1}{2}} follows", r"\frac{1}{2}"),
        ("<answer>7", None),
        ("7</answer>", None),
        (r"\boxed{7", None),
        ("It is 7.", None),
    ],
)
def test_marks_in_their_order(text: str, answer: str | None) -> None:
    assert marked_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7. They have 7 apples.", "7"),
        ("It costs $1,200.50.", "1,200.50"),
        ("10-3", "3"),
        ("so x = -3", "-3"),
        (THOUGHT + "Nothing.", None),  # what was thought is no answer
        (THOUGHT + "It is 8.", "8"),
        ("<think>only 7", "7"),
        ("一共有１２个。", "12"),
        ("none", None),
        ("", None),
    ],
)
def test_without_a_mark_the_last_number_behind_the_thinking_counts(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", 18), ("-18", -18), ("+18", 18), ("\u221218", -18), ("18.", 18), ("18.00", 18), (".5", Fraction(1, 2)),
        ("1,200", 1200), ("1{,}200", 1200), ("$1,200,000.5", Fraction(2400001, 2)), (r"\$18", 18), ("**18**", 18),
        ("3/4", Fraction(3, 4)), (r"\frac{3}{4}", Fraction(3, 4)), (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        ("50%", 50), (r"50\%", 50), ("50 percent", 50), ("x = 18", 18), ("3 + 4 = 7", 7), ("18 apples", 18),
        (r"18\text{ apples}", 18), ("he has 18", 18), (r"90^\circ", 90), ("18个", 18), ("１８", 18), ("(5)", 5),
        ("5 or 6", None), ("5, 6", None), ("3,4", None), ("1,20", None), ("2^10", None), ("3x", None), ("x3", None),
        ("1e9", None), ("3 * 4", None), (r"\sqrt{5}", None), ("1/0", None), ("5:30", None), ("3 + 4", None),
        ("", None), ("seven", None), ("nan", None), ("inf", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_one_number_exactly_or_none(text: str, number: object) -> None:
    assert as_number(text) == number


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("#### 18", "18", True),
        ("<answer>$18.00</answer>", "18", True),
        ("It is 18 dollars.", "18", True),
        ("It is 18.5 dollars.", "18", False),
        ("<answer>17 or 18</answer>", "18", False),  # who names several says none
        ("18 apples. No: 17.", "18", False),
        ("1200", "1,200", True),
        ("The sum is 0.75", "3/4", True),
        ("0.333", "1/3", False),
        ("#### 18", "16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18", True),  # a worked reference
        ("<answer>Paris.</answer>", "paris", True),
        ("Paris", "Paris", True),
        ("It is Paris", "Paris", False),
        ("<answer>London</answer>", "Paris", False),
        ("<answer>x + 1</answer>", "x + 1", True),
        ("1", "x + 1", False),
        ("", "18", False),
        ("<answer></answer>", "18", False),
        ("<answer></answer>", "", False),
        ("", "", False),
        ("3", "3x", False),
    ],
)
def test_right_and_wrong(completion: str, answer: str, right: bool) -> None:
    assert is_right(completion, answer) is right


@pytest.mark.parametrize(
    "text",
    ["9" * 100_000, "1," * 50_000, "<answer>" * 20_000, "\\boxed{" * 20_000, "-" * 100_000, "1e999999999",
     ".1" * 50_000, "<answer>" + "1 " * 50_000 + "</answer>", "\\frac{1}{" * 20_000, "(" * 100_000 + "1",
     "a" * 100_000],
)  # fmt: skip
def test_no_text_takes_long(text: str) -> None:
    started = time.perf_counter()
    assert not is_right(text, "18")
    assert as_number(text) is None
    final_answer("<answer>" + text + "</answer>")
    as_number(text[:200])
    assert time.perf_counter() - started < 2.0
