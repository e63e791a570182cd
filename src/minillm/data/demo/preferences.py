"""Preference pairs: one question, a better and a worse answer, and one thing that makes it worse."""

from __future__ import annotations

from typing import Any

from minillm.data.demo.dice import Dice, fill, held_out
from minillm.data.demo.sums import NAMES, draw_sum
from minillm.data.demo.talk import FILLER, FRIENDLY, RUDE, SYSTEM, TOPICS
from minillm.data.demo.tasks import Task, task
from minillm.data.demo.world import World

WEIGHTS = {"wrong": 45, "rude": 18, "rambling": 17, "language": 14, "invented": 6}
CHECKED = (
    "story_question", "fact", "way", "sum", "problem", "compare_ages", "compare_numbers", "order", "letters",
    "translate", "odd_one_out", "category", "sequence",
)  # fmt: skip


def pair(world: World, dice: Dice, validation: bool) -> dict[str, Any]:
    """One row for DPO: chosen and rejected share everything but the last answer."""
    kind = dice.weighted(WEIGHTS)
    made, better, worse = _answers(world, dice, validation, kind)
    shared = [{"role": "user", "content": made.prompt}]
    if dice.chance(0.15):
        shared.insert(0, {"role": "system", "content": fill(dice, SYSTEM[world.language])})
    return {
        "chosen": [*shared, {"role": "assistant", "content": better}],
        "rejected": [*shared, {"role": "assistant", "content": worse}],
        "language": world.language,
        "kind": kind,
    }


def _answers(world: World, dice: Dice, validation: bool, kind: str) -> tuple[Task, str, str]:
    if kind == "language":
        return _languages(world, dice, validation)
    if kind == "invented":
        made = task(world, dice, validation, "unknown")
        return made, made.answer, made.wrong(dice)
    if kind == "wrong":
        made = task(world, dice, validation, dice.pick(CHECKED))
        while (worse := made.wrong(dice)) == made.answer:
            made = task(world, dice, validation, dice.pick(CHECKED))
        return made, made.answer, worse
    made = task(
        world,
        dice,
        validation,
        dice.pick(("fact", "sum", "problem", "way", "category", "compare_ages", "talk")),
    )
    gap = " " if world.language == "en" else ""
    if kind == "rude":
        rude = fill(dice, RUDE[world.language])
        worse = rude + gap + made.answer if dice.chance(0.5) else rude
        better = fill(dice, FRIENDLY[world.language]) + gap + made.answer if dice.chance(0.4) else made.answer
        return made, better, worse
    opening, middle, again = (
        fill(
            dice,
            part,
        )
        for part in FILLER[world.language]
    )
    second = fill(dice, FILLER[world.language][1])
    parts = [opening, middle, made.answer, *([second] if second != middle else []), again + gap + made.answer]
    return made, made.answer, gap.join(parts)


def _languages(world: World, dice: Dice, validation: bool) -> tuple[Task, str, str]:
    """The same answer in the language of the question and in the other one."""
    other = "zh" if world.language == "en" else "en"
    if dice.chance(0.5):
        total = draw_sum(dice, validation)
        a, b, r = total.first, total.second, total.result
        questions = {"en": "[What is|How much is] {a} {w} {b}?", "zh": "{a}{w}{b}[是多少|等于几]？"}
        prompt = fill(dice, questions[world.language], a=a, b=b, w=NAMES[world.language][total.sign])
        answers = {
            "en": f"{a} {NAMES['en'][total.sign]} {b} is {r}.",
            "zh": f"{a}{NAMES['zh'][total.sign]}{b}等于{r}。",
        }
        return Task(prompt, answers[world.language]), answers[world.language], answers[other]
    while True:
        number = dice.number(0, len(TOPICS["en"]) - 1)
        question = fill(dice, TOPICS[world.language][number].question)
        if held_out(question) == validation:
            break
    better, worse = (fill(dice, TOPICS[which][number].answer) for which in (world.language, other))
    return Task(question, better), better, worse
