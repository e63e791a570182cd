"""What is true in the demo world: how it is stated, how it is asked, and how one answers."""

# ruff: noqa: E501 (a template reads best on one line)

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from minillm.data.demo.dice import Dice, fill
from minillm.data.demo.stories import Place, Question, finish
from minillm.data.demo.vocabulary import article
from minillm.data.demo.world import Person, World


class Fact(NamedTuple):
    """Templates for stating, asking and answering; `key` is the word a right answer must contain."""

    statement: str
    question: str
    answer: str
    key: Callable[[Person], str]


FACTS: dict[str, dict[str, Fact]] = {
    "en": {
        "age": Fact(
            "[{x} is {x.age} years old.|{x} is {x.age}.|{x} turned {x.age} this year.]",
            "[How old is {x}?|What is the age of {x}?|Can you tell me how old {x} is?|Tell me the age of {x}.]",
            "[{x} is {x.age} years old.|{x} is {x.age}.]",
            lambda x: str(x.age),
        ),
        "home": Fact(
            "[{x} lives near {home}.|{x}'s house is close to {home}.|The home of {x} is near {home}.]",
            "[Where does {x} live?|Near which place is the home of {x}?|Tell me where {x} lives.]",
            "[{x} lives near {home}.|{x.His} home is near {home}.]",
            lambda x: x.home,
        ),
        "job": Fact(
            "[{x} works as {a_job}.|{x} is {a_job}.|By profession, {x} is {a_job}.]",
            "[What does {x} do for a living?|What is {x}'s job?|Which job does {x} have?|What work does {x} do?]",
            "[{x} is {a_job}.|{x} works as {a_job}.]",
            lambda x: x.job,
        ),
        "pet": Fact(
            "[{x} has a {pet.kind} called {pet.name}.|{x} keeps a {pet.kind}; its name is {pet.name}."
            "|At home, {x} has a {pet.kind} named {pet.name}.]",
            "[What pet does {x} have?|Which animal does {x} keep?|Does {x} have a pet?|What kind of pet has {x} got?]",
            "[{x} has a {pet.kind} called {pet.name}.|{x} keeps a {pet.kind}. Its name is {pet.name}.]",
            lambda x: x.pet.kind,
        ),
        "pet name": Fact(
            "[The {pet.kind} of {x} is called {pet.name}.|{pet.name} is the {pet.kind} of {x}.]",
            "[What is the name of {x}'s {pet.kind}?|What is {x}'s {pet.kind} called?]",
            "[{x}'s {pet.kind} is called {pet.name}.|Its name is {pet.name}.]",
            lambda x: x.pet.name,
        ),
        "food": Fact(
            "[{x} likes {food} best of all.|{x}'s favourite food is {food}.|{x} could eat {food} every day.]",
            "[What does {x} like to eat?|What is {x}'s favourite food?|Which food does {x} like best?]",
            "[{x} likes {food} best.|{x}'s favourite food is {food}.]",
            lambda x: x.food,
        ),
        "colour": Fact(
            "[{x}'s favourite colour is {x.colour}.|{x} loves everything that is {x.colour}.|Of all colours, {x} likes {x.colour} best.]",
            "[What is {x}'s favourite colour?|Which colour does {x} like best?|What colour does {x} love?]",
            "[{x}'s favourite colour is {x.colour}.|{x} likes {x.colour} best.]",
            lambda x: x.colour,
        ),
        "friend": Fact(
            "[{x}'s best friend is {x.friend}.|{x} is often together with {x.friend}.|{x} tells {x.friend} every secret.]",
            "[Who is {x}'s best friend?|Who is the best friend of {x}?]",
            "[{x}'s best friend is {x.friend}.|It is {x.friend}.]",
            lambda x: x.friend,
        ),
        "treasure": Fact(
            "[{x} owns {o.a} made of {o.material}.|On {x}'s shelf lies {o.a}, made of {o.material}.|{x} is proud of {x.his} {o.name}, which is made of {o.material}.]",
            "[What is {x}'s {o.noun} made of?|Of which material is the {o.noun} of {x}?]",
            "[{x}'s {o.noun} is made of {o.material}.|It is made of {o.material}.]",
            lambda x: x.treasure.material,
        ),
        "skill": Fact(
            "[{x} can {x.skill} very well.|{x} knows how to {x.skill}.|{x} learned to {x.skill} years ago.]",
            "[What can {x} do well?|What is {x} good at?|Which skill does {x} have?]",
            "[{x} can {x.skill} very well.|{x} knows how to {x.skill}.]",
            lambda x: x.skill,
        ),
    },
    "zh": {
        "age": Fact(
            "[{x}今年{x.age}岁。|{x}{x.age}岁了。|今年{x}刚满{x.age}岁。]",
            "[{x}多大了？|{x}今年几岁？|请问{x}的年龄是多少？|你知道{x}多少岁吗？]",
            "[{x}今年{x.age}岁。|{x}{x.age}岁。]",
            lambda x: str(x.age),
        ),
        "home": Fact(
            "[{x}住在{home}附近。|{x}的家在{home}附近。|从{x}家走几步就是{home}。]",
            "[{x}住在哪里？|{x}的家在哪儿附近？|请告诉我{x}住在什么地方。]",
            "[{x}住在{home}附近。|{x}的家在{home}附近。]",
            lambda x: x.home,
        ),
        "job": Fact(
            "[{x}是一位{x.job}。|{x}的职业是{x.job}。|{x}当{x.job}已经很多年了。]",
            "[{x}是做什么工作的？|{x}的职业是什么？|请问{x}做什么工作？]",
            "[{x}是一位{x.job}。|{x}的职业是{x.job}。]",
            lambda x: x.job,
        ),
        "pet": Fact(
            "[{x}养了一{pet.measure}{pet.kind}，名叫{pet.name}。|{x}家有一{pet.measure}{pet.kind}，叫{pet.name}。]",
            "[{x}养了什么宠物？|{x}家养的是什么动物？|{x}有宠物吗？]",
            "[{x}养了一{pet.measure}{pet.kind}，名叫{pet.name}。|{x}有一{pet.measure}{pet.kind}，叫{pet.name}。]",
            lambda x: x.pet.kind,
        ),
        "pet name": Fact(
            "[{x}的{pet.kind}名叫{pet.name}。|{pet.name}是{x}养的{pet.kind}。]",
            "[{x}的{pet.kind}叫什么名字？|{x}给{pet.kind}取了什么名字？]",
            "[{x}的{pet.kind}叫{pet.name}。|它的名字叫{pet.name}。]",
            lambda x: x.pet.name,
        ),
        "food": Fact(
            "[{x}最爱吃{food}。|{x}最喜欢的食物是{food}。|{food}，{x}天天吃也不会腻。]",
            "[{x}最爱吃什么？|{x}最喜欢的食物是什么？|什么东西{x}最爱吃？]",
            "[{x}最爱吃{food}。|{x}最喜欢的食物是{food}。]",
            lambda x: x.food,
        ),
        "colour": Fact(
            "[{x}最喜欢{x.colour}。|在所有颜色里，{x}最喜欢{x.colour}。|{x}喜欢一切{x.colour}的东西。]",
            "[{x}最喜欢什么颜色？|{x}喜欢哪种颜色？]",
            "[{x}最喜欢{x.colour}。|{x}喜欢{x.colour}。]",
            lambda x: x.colour,
        ),
        "friend": Fact(
            "[{x}最好的朋友是{x.friend}。|{x}常常和{x.friend}在一起。|{x}有什么心事都会告诉{x.friend}。]",
            "[{x}最好的朋友是谁？|谁是{x}最好的朋友？]",
            "[{x}最好的朋友是{x.friend}。|是{x.friend}。]",
            lambda x: x.friend,
        ),
        "treasure": Fact(
            "[{x}有{o.a}，是用{o.material}做的。|{x}很珍惜自己那{o.measure}用{o.material}做的{o.noun}，它是{o.colour}的。]",
            "[{x}的{o.noun}是用什么做的？|{x}那{o.measure}{o.noun}是什么材料做的？]",
            "[{x}的{o.noun}是用{o.material}做的。|是用{o.material}做的。]",
            lambda x: x.treasure.material,
        ),
        "skill": Fact(
            "[{x}很会{x.skill}。|{x}早就学会了{x.skill}。|说到{x.skill}，{x}最在行。]",
            "[{x}会做什么？|{x}擅长什么？|{x}有什么本领？]",
            "[{x}很会{x.skill}。|{x}擅长{x.skill}。]",
            lambda x: x.skill,
        ),
    },
}

WAYS = {
    "en": (
        "[{q} lies {d} of {p}, {k} {km} away.|From {p} to {q} one walks {k} {km} to the {d}.|If you go {k} {km} {d} from {p}, you come to {q}.]",
        "[In which direction is {q} from {p}?|Which way must I walk from {p} to get to {q}?]",
        "[{q} is {d} of {p}.|{q} lies {d} of {p}.]",
        "[How far is it from {p} to {q}?|How many kilometres are there between {p} and {q}?]",
        "[It is {k} {km} from {p} to {q}.|From {p} to {q} it is {k} {km}.]",
    ),
    "zh": (
        "[{q}在{p}的{d}边，相距{k}公里。|从{p}往{d}走{k}公里，就到了{q}。|{p}往{d}{k}公里是{q}。]",
        "[{q}在{p}的哪个方向？|从{p}去{q}要往哪边走？]",
        "[{q}在{p}的{d}边。|{q}在{p}的{d}面。]",
        "[从{p}到{q}有多远？|{p}和{q}相距多少公里？]",
        "[从{p}到{q}有{k}公里。|{p}和{q}相距{k}公里。]",
    ),
}


def attributes(person: Person) -> list[str]:
    """The kinds of fact that hold for a person."""
    return [kind for kind in FACTS[person.language] if kind != "job" or not person.child]


def _slots(person: Person) -> dict[str, Any]:
    return {
        "x": person, "home": Place(person.language, person.home), "pet": person.pet, "food": person.food,
        "o": person.treasure, "a_job": article(person.job) if person.job else "",
    }  # fmt: skip


def state(dice: Dice, person: Person, kind: str) -> str:
    """The fact as a sentence."""
    return fill(dice, FACTS[person.language][kind].statement, **_slots(person))


def ask(dice: Dice, person: Person, kind: str) -> Question:
    """The fact as a question with its answer."""
    fact, slots, language = FACTS[person.language][kind], _slots(person), person.language
    question, answer = (fill(dice, text, **slots) for text in (fact.question, fact.answer))
    return Question(finish(language, [question]), finish(language, [answer]), fact.key(person))


def _way_slots(world: World, way: tuple[str, str, str, int]) -> dict[str, Any]:
    start, end, direction, distance = way
    unit = "kilometre" if distance == 1 else "kilometres"
    language = world.language
    return {"p": Place(language, start), "q": Place(language, end), "d": direction, "k": distance, "km": unit}


def state_way(world: World, dice: Dice, way: tuple[str, str, str, int]) -> str:
    """How one place lies from another, as a sentence."""
    return fill(dice, WAYS[world.language][0], **_way_slots(world, way))


def ask_way(world: World, dice: Dice, way: tuple[str, str, str, int]) -> Question:
    """The direction or the distance from one place to another, as a question with its answer."""
    _, *templates = WAYS[world.language]
    slots = _way_slots(world, way)
    about_direction = dice.chance(0.5)
    pair = templates[:2] if about_direction else templates[2:]
    question, answer = (finish(world.language, [fill(dice, text, **slots)]) for text in pair)
    return Question(question, answer, way[2] if about_direction else str(way[3]))
