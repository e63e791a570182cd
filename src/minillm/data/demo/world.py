"""The small world the demo data tells about: who lives in it, what there is, where things lie.

English and Chinese share the vocabulary of things, so words can be translated, and each language has its own
people with their own lives. A world is a function of its seed and language.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from minillm.data.demo.dice import Dice, held_out
from minillm.data.demo.vocabulary import (
    ANIMALS,
    BOYS,
    CHILDREN_PER_LIST,
    COLOURS,
    DIRECTIONS,
    FOODS,
    GIRLS,
    JOBS,
    MATERIALS,
    OBJECTS,
    PET_NAMES,
    PLACES,
    SKILLS,
    article,
)


@dataclass(frozen=True)
class Animal:
    kind: str
    measure: str
    name: str


@dataclass(frozen=True)
class Thing:
    """An object with a colour: `red kite`, 红色的风筝."""

    language: str
    noun: str
    colour: str
    material: str
    measure: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.noun}" if self.language == "en" else f"{self.colour}的{self.noun}"

    @property
    def a(self) -> str:
        """With the indefinite article or 一 and its measure word."""
        return article(self.name) if self.language == "en" else f"一{self.measure}{self.name}"

    @property
    def this(self) -> str:
        return f"this {self.noun}" if self.language == "en" else f"这{self.measure}{self.noun}"

    @property
    def that(self) -> str:
        return f"the {self.noun}" if self.language == "en" else f"那{self.measure}{self.noun}"


@dataclass
class Person:
    language: str
    name: str
    female: bool
    age: int
    child: bool
    job: str
    pet: Animal
    food: str
    colour: str
    home: str
    treasure: Thing
    friend: str = ""
    skill: str = ""

    @property
    def he(self) -> str:
        if self.language == "zh":
            return "她" if self.female else "他"
        return "she" if self.female else "he"

    @property
    def him(self) -> str:
        return self.he if self.language == "zh" else ("her" if self.female else "him")

    @property
    def his(self) -> str:
        return self.he + "的" if self.language == "zh" else ("her" if self.female else "his")

    @property
    def He(self) -> str:
        return self.he.capitalize()

    @property
    def His(self) -> str:
        return self.his.capitalize()

    @property
    def child_word(self) -> str:
        if self.language == "zh":
            return "女孩" if self.female else "男孩"
        return "girl" if self.female else "boy"

    def __str__(self) -> str:
        return self.name


@dataclass
class World:
    """People and places of one language."""

    seed: int
    language: str
    people: list[Person] = field(default_factory=list)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dice = Dice(self.seed, "world", self.language)
        corners = [(x, y) for x in range(4) for y in range(4)]
        self.places = dict(zip(self.words(PLACES), dice.sample(corners, len(PLACES))))
        girls, boys = GIRLS[self.language].split(), BOYS[self.language].split()
        pets = PET_NAMES[self.language].split()
        for index in range(len(girls)):
            for names, female in ((girls, True), (boys, False)):
                child = index < CHILDREN_PER_LIST
                pet = dice.pick(ANIMALS)
                self.people.append(
                    Person(
                        language=self.language,
                        name=names[index],
                        female=female,
                        age=dice.number(6, 12) if child else dice.number(21, 68),
                        child=child,
                        job="" if child else self.word(dice.pick(JOBS)),
                        pet=Animal(self.word(pet), pet[2], dice.pick(pets)),
                        food=self.word(dice.pick(FOODS)),
                        colour=self.word(dice.pick(COLOURS)),
                        home=dice.pick(list(self.places)),
                        treasure=self.thing(dice),
                        skill=self.word(dice.pick(SKILLS)),
                    )
                )
        for person in self.people:
            others = [other for other in self.people if other is not person and other.child == person.child]
            person.friend = dice.pick(others).name

    @property
    def column(self) -> int:
        return 0 if self.language == "en" else 1

    def word(self, entry: tuple[str, ...]) -> str:
        """This language's word of a bilingual entry."""
        return entry[self.column]

    def words(self, entries: tuple[tuple[str, ...], ...]) -> list[str]:
        return [entry[self.column] for entry in entries]

    @cached_property
    def by_name(self) -> dict[str, Person]:
        return {person.name: person for person in self.people}

    @cached_property
    def children(self) -> list[Person]:
        return [person for person in self.people if person.child]

    @cached_property
    def adults(self) -> list[Person]:
        return [person for person in self.people if not person.child]

    def thing(self, dice: Dice) -> Thing:
        english, _, chinese, measure, materials = dice.pick(OBJECTS)
        material = dice.pick(materials.split())
        return Thing(
            self.language,
            noun=(english, chinese)[self.column],
            colour=self.word(dice.pick(COLOURS)),
            material=(material, MATERIALS[material])[self.column],
            measure=measure,
        )

    def owner_and_thing(self, dice: Dice, people: list[Person], validation: bool) -> tuple[Person, Thing]:
        """A person and an object whose combination belongs to the wanted side of the split."""
        while True:
            person, thing = dice.pick(people), self.thing(dice)
            if held_out(person.name, thing.noun) == validation:
                return person, thing

    def others(self, dice: Dice, count: int, *taken: Person, children: bool | None = None) -> list[Person]:
        """`count` people who are not among `taken`."""
        names = {person.name for person in taken}
        pool = [
            person
            for person in self.people
            if person.name not in names and (children is None or person.child == children)
        ]
        return dice.sample(pool, count)

    def way(self, start: str, end: str) -> tuple[str, int] | None:
        """Direction and kilometres from one place to another if they lie on one line, else None."""
        (x0, y0), (x1, y1) = self.places[start], self.places[end]
        dx, dy = x1 - x0, y1 - y0
        if (dx == 0) == (dy == 0):
            return None
        step = ((dx > 0) - (dx < 0), (dy > 0) - (dy < 0))
        return self.word(DIRECTIONS[step]), abs(dx) + abs(dy)

    @cached_property
    def ways(self) -> list[tuple[str, str, str, int]]:
        """All (start, end, direction, kilometres) that lie on one line."""
        return [
            (start, end, *way)
            for start in self.places
            for end in self.places
            if start != end and (way := self.way(start, end))
        ]


def number_pair(dice: Dice, low: int, high: int, validation: bool) -> tuple[int, int]:
    """Two numbers whose pair (in either order) belongs to the wanted side of the split."""
    while True:
        a, b = dice.number(low, high), dice.number(low, high)
        if held_out(min(a, b), max(a, b)) == validation:
            return a, b
