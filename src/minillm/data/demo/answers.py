"""What a task is: a question, its right answer, how to check it, and how to get it wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minillm.data.demo.dice import Dice, capitalise, fill
from minillm.data.demo.world import World


@dataclass
class Task:
    """A question with its right answer. `check` is (type, answer); `rivals` are wrong values of `key`."""

    prompt: str
    answer: str
    check: tuple[str, str] | None = None
    key: str = ""
    rivals: list[str] = field(default_factory=list)
    system: str = ""

    def wrong(self, dice: Dice) -> str:
        """The answer with its key replaced by a rival; the answer itself where there is none."""
        rivals = [rival for rival in self.rivals if rival and rival != self.key]
        return self.answer.replace(self.key, dice.pick(rivals)) if rivals else self.answer


def say(world: World, dice: Dice, english: str, chinese: str, **slots: Any) -> str:
    if world.language == "zh":
        return fill(dice, chinese, **slots)
    return capitalise(fill(dice, english, **slots))


def numbers_near(dice: Dice, number: int) -> list[str]:
    return [str(abs(number + step) if number + step else 3) for step in (1, -1, 2, 10, -10)]


def number_task(dice: Dice, prompt: str, answer: str, result: int) -> Task:
    """A task whose last number is the answer; wrong answers get that number wrong."""
    before, _, after = answer.rpartition(str(result))
    made = Task(prompt, answer, ("number", str(result)), answer)
    made.rivals = [before + near + after for near in numbers_near(dice, result) if near != str(result)]
    return made
