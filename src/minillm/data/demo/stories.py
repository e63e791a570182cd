"""Stories of the demo world: plots in which one thing leads to another, and short reports that can be questioned."""

# ruff: noqa: E501 (a template reads best on one line)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from minillm.data.demo import stories_en, stories_zh
from minillm.data.demo.dice import Dice, capitalise, fill
from minillm.data.demo.vocabulary import COUNTABLES, HIDING_PLACES, WILD_ANIMALS, article, number_word
from minillm.data.demo.world import Person, Thing, World, number_pair

BOOKS = {"en": stories_en, "zh": stories_zh}
FABLE_FOODS = (
    ("a pot of honey", "蜂蜜"), ("a heap of mushrooms", "蘑菇"), ("a pile of nuts", "坚果"),
    ("a tree full of pears", "梨"), ("a bush full of berries", "浆果"), ("a sack of corn", "玉米"),
)  # fmt: skip
PREPOSITIONS = {
    "forest": "in", "garden": "in", "park": "in", "lake": "by", "bridge": "on", "farm": "on", "harbour": "in",
}  # fmt: skip
BREAKABLE = set(
    str.split(
        "lantern cup watch mirror lamp bottle plate flute whistle clock vase flowerpot comb candlestick 灯笼 杯子 "
        "手表 镜子 台灯 瓶子 盘子 笛子 哨子 闹钟 花瓶 花盆 梳子 烛台"
    )
)
CHILD_PLOTS = {"rain", "share", "race", "trade"}  # the second person is a child too


@dataclass(frozen=True)
class Place:
    """`{p}` is the library, 图书馆; `{p.at}` at the library, 在图书馆."""

    language: str
    word: str

    def __str__(self) -> str:
        return f"the {self.word}" if self.language == "en" else self.word

    @property
    def at(self) -> str:
        if self.language == "zh":
            return f"在{self.word}"
        return f"{PREPOSITIONS.get(self.word, 'at')} the {self.word}"

    @property
    def At(self) -> str:
        return self.at.capitalize()


class Question(NamedTuple):
    """Something one can ask about a text: the answer as a sentence, and the word that must be in it."""

    text: str
    answer: str
    key: str
    kind: str = ""


def places(world: World, dice: Dice, count: int) -> list[Place]:
    return [Place(world.language, word) for word in dice.sample(list(world.places), count)]


def finish(language: str, sentences: list[str]) -> str:
    """Sentences as one paragraph, with the spaces and capitals of the language."""
    if language == "zh":
        return "".join(sentence.strip() for sentence in sentences)
    return capitalise(" ".join(sentence.strip() for sentence in sentences))


def tell(
    world: World,
    dice: Dice,
    validation: bool,
    *,
    plot: str | None = None,
    hero: tuple[Person, Thing] | None = None,
    length: int | None = None,
) -> str:
    """One story. Which person meets which object decides on which side of the split it may appear."""
    book = BOOKS[world.language]
    plot = plot or dice.pick(list(book.PLOTS))
    if plot == "truth" and hero and hero[1].noun not in BREAKABLE:
        plot = "lost"
    slots = _cast(world, dice, validation, plot, hero)
    lines = [] if plot == "fable" else [dice.pick(book.OPENINGS.splitlines())]
    for line in book.PLOTS[plot].splitlines():
        if line.startswith("?"):
            if dice.chance(0.5):
                continue
            line = line[1:]
        lines.append(line)
    if plot != "fable" and dice.chance(0.3):
        lines.append(dice.pick(book.ENDINGS.splitlines()))
    return finish(world.language, [fill(dice, line, **slots) for line in lines[:length]])


def _cast(world: World, dice: Dice, validation: bool, plot: str, hero: tuple[Person, Thing] | None) -> dict[str, Any]:
    x, o = hero or world.owner_and_thing(dice, world.children, validation)
    while plot == "truth" and o.noun not in BREAKABLE:
        x, o = world.owner_and_thing(dice, world.children, validation)
    grown_up = False if plot == "work" else True if plot in CHILD_PLOTS else dice.pick((True, None))
    y = world.others(dice, 1, x, children=grown_up)[0]
    o2 = world.thing(dice)
    while o2.noun == o.noun:
        o2 = world.thing(dice)
    small, large = sorted(number_pair(dice, 2, 20, validation))
    while large - small < 2:  # "one coins" are never left
        small, large = sorted(number_pair(dice, 2, 20, validation))
    f, g = dice.sample(WILD_ANIMALS, 2)
    items = dice.pick(COUNTABLES)
    p, q = places(world, dice, 2)
    column, food = world.column, dice.pick(FABLE_FOODS)
    more_first = plot in ("birthday", "share", "work")  # n is the larger number
    n, m = (large, small) if more_first else (small, large)
    return {
        "x": x, "y": y, "o": o, "o2": o2, "p": p, "q": q, "pet": x.pet, "skill": y.skill, "food": y.food,
        "home": Place(world.language, x.home), "hide": dice.pick(HIDING_PLACES)[column],
        "items": items[1 + column], "count_measure": items[3],
        "n": number_word(n, world.language), "m": number_word(m, world.language),
        "left": number_word(large - small, world.language),
        "f": f[column], "g": g[column], "f_measure": f[2], "g_measure": g[2],
        "a_food": food[0], "a_f": article(f[0]),
    } | ({"food": food[1]} if plot == "fable" else {})  # fmt: skip


REPORT = {
    "en": {
        "first": "[{x} was {p.at}.|In the morning {x} went to {p}.|{x} started the day {p.at}.|At first, {x} was {p.at}.]",
        "move": "[Then|After that|Later|A little later|Next], {x} [went|walked|moved on] to {p}.",
        "take": "[{x} picked up {o.a} there.|There {x} found {o.a} and took it along.|{x} took {o.a} from a table.]",
        "drop": "{x} [put down|left] the {o.noun} {p.at}.",
        "give": "{x} [gave|handed] the {o.noun} to {y}, who was [also there|there too].",
    },
    "zh": {
        "first": "[{x}在{p}。|早上，{x}去了{p}。|一开始，{x}在{p}。]",
        "move": "[然后|后来|接着|过了一会儿]，{x}[去了|来到|走到]{p}。",
        "take": "{x}[在那里捡到了{o.a}，把它带在身上|拿起了{o.a}|从桌上拿走了{o.a}]。",
        "drop": "{x}把{o.noun}[放在|留在]了{p}。",
        "give": "{x}把{o.noun}[交给了|给了]也在那里的{y}。",
    },
}
ASK = {
    "en": {
        "person": ("[Where is {x} now?|Where is {x} at the end?|In which place is {x} now?]", "{x} is {p.at}."),
        "before": ("[Where was {x} before {x.he} went to {q}?|Where had {x} been before {q}?]",
                   "Before {q}, {x} was {p.at}."),
        "holder": ("[Who has the {o.noun} now?|Who is carrying the {o.noun} at the end?]", "{x} has the {o.noun}."),
        "thing": ("[Where is the {o.noun} now?|Where can the {o.noun} be found?]", "The {o.noun} is {p.at}."),
        "colour": ("[What colour is the {o.noun}?|Which colour does the {o.noun} have?]", "The {o.noun} is {o.colour}."),
        "giver": ("[Who gave the {o.noun} to {y}?|From whom did {y} get the {o.noun}?]", "{x} gave it to {y}."),
    },
    "zh": {
        "person": ("[{x}现在在哪里？|最后{x}在哪里？]", "{x}在{p}。"),
        "before": ("[去{q}之前，{x}在哪里？|{x}到{q}以前在什么地方？]", "去{q}之前，{x}在{p}。"),
        "holder": ("[{o.noun}现在在谁手里？|最后谁拿着{o.noun}？]", "{o.noun}在{x}手里。"),
        "thing": ("[{o.noun}现在在哪里？|在哪里能找到{o.noun}？]", "{o.noun}在{p}。"),
        "colour": ("[{o.noun}是什么颜色的？|那{o.measure}{o.noun}是什么颜色？]", "{o.noun}是{o.colour}的。"),
        "giver": ("[是谁把{o.noun}给了{y}？|{y}的{o.noun}是谁给的？]", "是{x}给{y}的。"),
    },
}  # fmt: skip


class Report:
    """A few people move about and carry things; the text says how, the questions ask where it ended."""

    def __init__(self, world: World, dice: Dice, validation: bool, events: int) -> None:
        self.world, self.dice, self.language = world, dice, world.language
        owner, thing = world.owner_and_thing(dice, world.people, validation)
        self.people = [owner, *world.others(dice, dice.number(1, 2), owner)]
        self.places = places(world, dice, 3)
        self.thing = thing
        self.sentences: list[str] = []
        self.trace: dict[str, list[Place]] = {}
        self.holder: Person | None = None
        self.giver: tuple[Person, Person] | None = None
        self.lying: Place | None = None
        for person in self.people:
            self._go(person, dice.pick(self.places), "first")
        self._take(owner)
        last = owner
        for _ in range(events):
            last = self._happen(last)

    def text(self) -> str:
        return finish(self.language, self.sentences)

    def questions(self) -> list[Question]:
        """What can be asked, in random order."""
        asked: list[Question] = [self._ask("colour", self.thing.colour)]
        for person in self.people:
            asked.append(self._ask("person", self._at(person).word, x=person, p=self._at(person)))
            if len(self.trace[person.name]) > 1:
                before, now = self.trace[person.name][-2:]
                asked.append(self._ask("before", before.word, x=person, p=before, q=now))
        if self.holder:
            asked.append(self._ask("holder", self.holder.name, x=self.holder))
            asked.append(self._ask("thing", self._at(self.holder).word, p=self._at(self.holder)))
        elif self.lying:
            asked.append(self._ask("thing", self.lying.word, p=self.lying))
        if self.giver:
            asked.append(self._ask("giver", self.giver[0].name, x=self.giver[0], y=self.giver[1]))
        return self.dice.sample(asked, len(asked))

    def _ask(self, kind: str, key: str, **slots: Any) -> Question:
        question, answer = ASK[self.language][kind]
        slots["o"] = self.thing
        texts = [finish(self.language, [fill(self.dice, template, **slots)]) for template in (question, answer)]
        return Question(texts[0], texts[1], key, kind)

    def _happen(self, last: Person) -> Person:
        """One more event; returns who did it, so that the next is somebody else's turn more often than not."""
        dice = self.dice
        if self.holder and dice.chance(0.5):
            here = self._at(self.holder)
            near = [p for p in self.people if p is not self.holder and self._at(p) == here]
            if near and self.giver is None:
                other = dice.pick(near)
                self._say("give", x=self.holder, y=other)
                self.giver = (self.holder, other)
                self.holder = other
                return other
            if dice.chance(0.3):
                who = self.holder
                self._say("drop", x=who, p=here)
                self.holder, self.lying = None, here
                return who
        choices = [p for p in self.people if p is not last] if dice.chance(0.6) else self.people
        person = dice.pick(choices)
        self._go(person, dice.pick([place for place in self.places if place != self._at(person)]), "move")
        return person

    def _at(self, person: Person) -> Place:
        return self.trace[person.name][-1]

    def _go(self, person: Person, place: Place, kind: str) -> None:
        self.trace.setdefault(person.name, []).append(place)
        self._say(kind, x=person, p=place)

    def _take(self, person: Person) -> None:
        self.holder = person
        # told right after the owner's own arrival, so that "there" is clear
        self.sentences.insert(1, fill(self.dice, REPORT[self.language]["take"], x=person, o=self.thing))

    def _say(self, kind: str, **slots: Any) -> None:
        self.sentences.append(fill(self.dice, REPORT[self.language][kind], o=self.thing, **slots))
