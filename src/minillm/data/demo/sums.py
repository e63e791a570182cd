"""Arithmetic of the demo world: plain sums and word problems, with the worked answer."""

# ruff: noqa: E501 (a template reads best on one line)

from __future__ import annotations

from typing import NamedTuple

from minillm.data.demo.dice import Dice, fill
from minillm.data.demo.stories import finish
from minillm.data.demo.vocabulary import COUNTABLES
from minillm.data.demo.world import World, number_pair

NAMES = {
    "en": {"+": "plus", "-": "minus", "*": "times"},
    "zh": {"+": "加", "-": "减", "*": "乘"},
}


class Sum(NamedTuple):
    first: int
    sign: str
    second: int
    result: int

    @property
    def formula(self) -> str:
        return f"{self.first} {self.sign} {self.second}"


class Problem(NamedTuple):
    """A word problem, its worked solution (a sentence each), and the number that is asked for."""

    text: str
    solution: str
    result: int


def draw_sum(dice: Dice, validation: bool, signs: str = "+-*") -> Sum:
    """A sum whose pair of numbers belongs to the wanted side of the split."""
    sign = dice.pick(signs)
    high = 12 if sign == "*" else dice.pick((20, 50, 99))
    a, b = number_pair(dice, 1, high, validation)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    return Sum(a, sign, b, {"+": a + b, "-": a - b, "*": a * b}[sign])


# Each problem: what is told, what is asked, how it is solved. n >= m.
PROBLEMS = {
    "en": {
        "+": (
            ("{x} has {n} {items}[.| in {x.his} basket.| in a bag.] {y} has {m}[ of them| {items}|].",
             "How many {items} do they have together?", "{n} + {m} = {r}. Together they have {r} {items}."),
            ("{x} [found|collected|picked] {n} {items} in the morning and {m}[ more|] in the afternoon.",
             "How many {items} did {x} [find|get] that day?", "{n} + {m} = {r}. {x} got {r} {items} that day."),
            ("There are {n} {items} on the table. {x} puts {m} more beside them.",
             "How many {items} are on the table now?", "{n} + {m} = {r}. There are {r} {items} on the table now."),
            ("The tree near the gate is {n} years old. The tree behind the house is {m} years older.",
             "How old is the tree behind the house?", "{n} + {m} = {r}. The tree behind the house is {r} years old."),
        ),
        "-": (
            ("{x} had {n} {items}. {x.He} gave {m} of them to {y}.",
             "How many {items} [are left|does {x} still have]?", "{n} - {m} = {r}. {x} has {r} {items} left."),
            ("There were {n} {items} in the basket. {x} [ate|took|sold] {m} of them.",
             "How many {items} [are still in the basket|remain]?", "{n} - {m} = {r}. There are {r} {items} left in the basket."),
            ("{x} has {n} coins. A ticket costs {m} coins, and {x} buys one.",
             "How many coins [are left|does {x} have afterwards]?", "{n} - {m} = {r}. {x} has {r} coins left."),
            ("{x} counted {n} {items} and {y} counted {m}.",
             "How many more did {x} count than {y}?", "{n} - {m} = {r}. {x} counted {r} more."),
        ),
        "*": (
            ("{x} has {n} bags. In each bag there are {m} {items}.",
             "How many {items} [are there in all|does {x} have]?", "{n} x {m} = {r}. There are {r} {items} in all."),
            ("One of the {items} costs {m} coins. {x} buys {n}[ of them|].",
             "How many coins does {x} pay?", "{n} x {m} = {r}. {x} pays {r} coins."),
            ("{x} walks {m} kilometres every day for {n} days.",
             "How many kilometres is that in all?", "{n} x {m} = {r}. {x} walks {r} kilometres in all."),
        ),
    },
    "zh": {
        "+": (
            ("{x}有{n}{mw}{items}，{y}有{m}{mw}[{items}|]。",
             "他们一共有多少{mw}{items}？", "{n} + {m} = {r}。他们一共有{r}{mw}{items}。"),
            ("{x}上午[得到|找到|数了]{n}{mw}{items}，下午又[得到|找到|数了]{m}{mw}。",
             "这一天一共是多少{mw}？", "{n} + {m} = {r}。这一天一共是{r}{mw}。"),
            ("桌子上有{n}{mw}{items}，{x}又放上了{m}{mw}。",
             "现在桌子上有多少{mw}{items}？", "{n} + {m} = {r}。现在桌子上有{r}{mw}{items}。"),
            ("门口的树有{n}岁，屋后的树比它大{m}岁。", "屋后的树有多少岁？", "{n} + {m} = {r}。屋后的树有{r}岁。"),
        ),
        "-": (
            ("{x}有{n}{mw}{items}，给了{y}{m}{mw}。",
             "{x}还剩下多少{mw}{items}？", "{n} - {m} = {r}。{x}还剩下{r}{mw}{items}。"),
            ("篮子里有{n}{mw}{items}，{x}[拿走了|卖掉了|用掉了]{m}{mw}。",
             "篮子里还有多少{mw}{items}？", "{n} - {m} = {r}。篮子里还有{r}{mw}{items}。"),
            ("{x}有{n}枚硬币，买一张票用了{m}枚。",
             "{x}还剩多少枚硬币？", "{n} - {m} = {r}。{x}还剩{r}枚硬币。"),
            ("{x}数到了{n}{mw}{items}，{y}数到了{m}{mw}。",
             "{x}比{y}多数了多少{mw}？", "{n} - {m} = {r}。{x}多数了{r}{mw}。"),
        ),
        "*": (
            ("{x}有{n}个袋子，每个袋子里有{m}{mw}{items}。",
             "一共有多少{mw}{items}？", "{n} x {m} = {r}。一共有{r}{mw}{items}。"),
            ("一{mw}{items}要{m}枚硬币，{x}买了{n}{mw}。",
             "{x}一共要付多少枚硬币？", "{n} x {m} = {r}。{x}一共要付{r}枚硬币。"),
            ("{x}每天走{m}公里，一连走了{n}天。",
             "一共走了多少公里？", "{n} x {m} = {r}。一共走了{r}公里。"),
        ),
    },
}  # fmt: skip


def draw_problem(world: World, dice: Dice, validation: bool) -> Problem:
    """A word problem about people of the world."""
    sign = dice.pick("++--*")
    total = draw_sum(dice, validation, sign)
    while min(total.first, total.second) < 2 or total.result < 2:
        total = draw_sum(dice, validation, sign)
    x, y = world.others(dice, 2)
    items = dice.pick(COUNTABLES)
    told, asked, solved = dice.pick(PROBLEMS[world.language][sign])
    slots = {
        "x": x, "y": y, "n": total.first, "m": total.second, "r": total.result,
        "items": items[1 + world.column], "mw": items[3],
    }  # fmt: skip
    told, asked, solved = (finish(world.language, [fill(dice, text, **slots)]) for text in (told, asked, solved))
    gap = " " if world.language == "en" else ""
    solved = solved.replace(f"= {total.result} ", f"= {total.result}")
    return Problem(told + gap + asked, solved, total.result)


def sum_line(dice: Dice, language: str, total: Sum) -> str:
    """A sum written down with its result, in signs or in words."""
    a, b, r = total.first, total.second, total.result
    sign = "x" if total.sign == "*" else total.sign
    word = NAMES[language][total.sign]
    in_words = f"{a} {word} {b} is {r}." if language == "en" else f"{a}{word}{b}等于{r}。"
    return f"{a} {sign} {b} = {r}" if dice.chance(0.7) else in_words
