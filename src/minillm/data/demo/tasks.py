"""Instructions with answers that follow from the world, and a check that tells right from wrong."""

# ruff: noqa: E501 (a template reads best on one line)

from __future__ import annotations

from typing import Any

from minillm.data.demo import facts, sums
from minillm.data.demo.answers import Task, number_task, say
from minillm.data.demo.dice import Dice, fill, held_out
from minillm.data.demo.stories import Place, Report, tell
from minillm.data.demo.talk import SYSTEM, TOPICS
from minillm.data.demo.vocabulary import COLOURS, OBJECTS
from minillm.data.demo.word_tasks import category, letters, odd_one_out, translate
from minillm.data.demo.world import World, number_pair

WEIGHTS = {
    "story_question": 16, "fact": 12, "way": 5, "sum": 11, "problem": 9, "compare_ages": 5, "compare_numbers": 4,
    "order": 6, "letters": 9, "translate": 8, "odd_one_out": 4, "category": 3, "sequence": 3, "tell_story": 7,
    "unknown": 3, "talk": 9, "other_language": 2,
}  # fmt: skip


def task(world: World, dice: Dice, validation: bool, kind: str | None = None) -> Task:
    """One task of the wanted side of the split; `kind` is drawn by WEIGHTS when not given."""
    return MAKERS[kind or dice.weighted(WEIGHTS)](world, dice, validation)


def _story_question(world: World, dice: Dice, validation: bool) -> Task:
    report = Report(world, dice, validation, events=dice.number(1, 4))
    question = report.questions()[0]
    english = "[Read this:\n{t}\n{q}|{t}\n{q}|{t}\n\nQuestion: {q}|Here is a short text. {t}\n{q}|Answer the question about the text.\nText: {t}\nQuestion: {q}]"
    chinese = "[请读下面的话：\n{t}\n{q}|{t}\n{q}|{t}\n\n问题：{q}|根据短文回答问题。\n短文：{t}\n问题：{q}|下面是一段短文。{t}\n{q}]"
    prompt = say(world, dice, english, chinese, t=report.text(), q=question.text)
    key, answer = question.key, question.answer
    if key in world.places:
        key = Place(world.language, key).at
        rivals = [Place(world.language, place).at for place in world.places]
    elif key in world.by_name:
        rivals = [person.name for person in report.people if person.name not in answer]
        rivals = rivals or [person.name for person in world.people if person.name not in answer]
    else:
        rivals = world.words(COLOURS)
    rivals = [rival for rival in rivals if rival not in answer]
    return Task(prompt, answer, ("contains", question.key), key, rivals)


def _unknown(world: World, dice: Dice, validation: bool) -> Task:
    report = Report(world, dice, validation, events=dice.number(1, 2))
    stranger = world.others(dice, 1, *report.people)[0]
    english = "{t}\n[Where is {x} now?|In which place is {x}?|What is {x} doing?|What does {x} carry?]"
    chinese = "{t}\n[{x}现在在哪里？|{x}在什么地方？|{x}在做什么？|{x}手里拿着什么？]"
    prompt = say(world, dice, english, chinese, t=report.text(), x=stranger)
    answer = say(
        world, dice, "[The text does not say anything about {x}.|I do not know: the text does not mention {x}.]",
        "[短文里没有提到{x}。|不知道，短文里没有提到{x}。]", x=stranger,
    )  # fmt: skip
    place = report.places[0]
    invented = f"{stranger} is {place.at}." if world.language == "en" else f"{stranger}在{place}。"
    key = "does not" if world.language == "en" else "没有提到"
    made = Task(prompt, answer, ("contains", key), answer, [invented])
    return made


def _fact(world: World, dice: Dice, validation: bool) -> Task:
    while True:
        person = dice.pick(world.people)
        kind = dice.pick(facts.attributes(person))
        if held_out(person.name, kind) == validation:
            break
    question = facts.ask(dice, person, kind)
    rivals = [facts.FACTS[world.language][kind].key(other) for other in world.people if other.child == person.child]
    rivals = [rival for rival in rivals if rival not in question.answer.replace(question.key, "")]
    return Task(question.text, question.answer, ("contains", question.key), question.key, rivals)


def _way(world: World, dice: Dice, validation: bool) -> Task:
    while True:
        way = dice.pick(world.ways)
        if held_out(way[0], way[1]) == validation:
            break
    question = facts.ask_way(world, dice, way)
    if question.key.isdigit():
        rivals = [k for k in "123456" if k != question.key]
        unit = " kilometre" if world.language == "en" else "公里"
        return Task(
            question.text,
            question.answer,
            ("number", question.key),
            question.key + unit,
            [k + unit for k in rivals],
        )
    rivals = ["north", "south", "east", "west"] if world.language == "en" else list("北南东西")
    return Task(question.text, question.answer, ("contains", question.key), question.key, rivals)


def _sum(world: World, dice: Dice, validation: bool) -> Task:
    total = sums.draw_sum(dice, validation)
    sign = "x" if total.sign == "*" else total.sign
    word = sums.NAMES[world.language][total.sign]
    slots = {"a": total.first, "s": sign, "w": word, "b": total.second, "r": total.result}
    english = "[What is {a} {s} {b}?|Calculate {a} {s} {b}.|How much is {a} {w} {b}?|{a} {s} {b} = ?|Please work out {a} {w} {b}.|Can you tell me what {a} {w} {b} is?]"
    chinese = "[{a} {s} {b} 等于多少？|计算 {a} {s} {b}。|{a}{w}{b}是多少？|{a} {s} {b} = ？|请算一算{a}{w}{b}。|你能告诉我{a}{w}{b}等于几吗？]"
    answer = say(
        world,
        dice,
        "[{a} {s} {b} = {r}|{a} {w} {b} is {r}.|The answer is {r}.]",
        "[{a} {s} {b} = {r}|{a}{w}{b}等于{r}。|答案是{r}。]",
        **slots,
    )
    return number_task(dice, say(world, dice, english, chinese, **slots), answer, total.result)


def _problem(world: World, dice: Dice, validation: bool) -> Task:
    problem = sums.draw_problem(world, dice, validation)
    return number_task(dice, problem.text, problem.solution, problem.result)


def _compare_ages(world: World, dice: Dice, validation: bool) -> Task:
    while True:
        x, y = dice.sample(world.people, 2)
        if x.age != y.age and held_out(min(x.name, y.name), max(x.name, y.name)) == validation:
            break
    older_asked = dice.chance(0.5)
    winner, loser = (x, y) if (x.age > y.age) == older_asked else (y, x)
    word = ("older" if older_asked else "younger") if world.language == "en" else ("大" if older_asked else "小")
    prompt = say(
        world, dice, "[Who is {w}, {x} or {y}?|Which of the two is {w}: {x} or {y}?|Is {x} or {y} {w}?]",
        "[{x}和{y}谁的年龄更{w}？|{x}和{y}比，谁的年龄{w}一些？|谁的年龄更{w}，{x}还是{y}？]", x=x, y=y, w=word,
    )  # fmt: skip
    template = ("{x} is {x.age} and {y} is {y.age}, so ", "{x}{x.age}岁，{y}{y.age}岁，所以")
    end = ("{v} is {w}.", "{v}的年龄更{w}。")
    told = say(world, dice, *template, x=x, y=y)
    right, wrong = (say(world, dice, *end, v=who, w=word) for who in (winner, loser))
    return Task(prompt, told + right, ("contains", right[:-1]), right, [wrong])


def _compare_numbers(world: World, dice: Dice, validation: bool) -> Task:
    a, b = number_pair(dice, 1, dice.pick((50, 100, 999)), validation)
    b += a == b
    larger_asked = dice.chance(0.5)
    right, wrong = (max(a, b), min(a, b)) if larger_asked else (min(a, b), max(a, b))
    words = ("larger", "大") if larger_asked else ("smaller", "小")
    slots = {"a": a, "b": b, "w": words[world.column]}
    prompt = say(
        world, dice, "[Which number is {w}, {a} or {b}?|Which is {w}: {a} or {b}?|Tell me the {w} of {a} and {b}.]",
        "[{a}和{b}哪个{w}？|哪个数更{w}，{a}还是{b}？|比一比{a}和{b}，哪个更{w}？]", **slots,
    )  # fmt: skip
    answers = [
        say(world, dice, "{v} is {w} than {u}.", "{v}比{u}{w}。", v=v, u=u, w=words[world.column])
        for v, u in ((right, wrong), (wrong, right))
    ]
    return Task(prompt, answers[0], ("contains", answers[0][:-1]), answers[0], answers[1:])


def _order(world: World, dice: Dice, validation: bool) -> Task:
    if dice.chance(0.35):
        people = dice.sample(world.people, 3)
        while not _rising([p.age for p in people]) or held_out(*sorted(p.name for p in people)) != validation:
            people = dice.sample(world.people, 3)
        names = [p.name for p in people]
        ordered = [p.name for p in sorted(people, key=lambda p: p.age)]
        instruction = (
            "[Sort these people from the youngest to the oldest|Put these people in order, the youngest first]: {l}",
            "[把这几个人按年龄从小到大排列|请按从小到大的年龄排一排]：{l}",
        )
    elif dice.chance(0.3) and world.language == "en":
        names = dice.sample(world.words(OBJECTS), 3)
        while names == sorted(names) or held_out(*sorted(names)) != validation:
            names = dice.sample(world.words(OBJECTS), 3)
        ordered, instruction = (
            sorted(names),
            ("[Put these words in alphabetical order|Sort by the alphabet]: {l}", ""),
        )
    else:
        falling = dice.chance(0.3)
        numbers = dice.sample(list(range(1, 100)), dice.number(3, 5))
        while numbers == sorted(numbers, reverse=falling) or held_out(*sorted(numbers)) != validation:
            numbers = dice.sample(list(range(1, 100)), dice.number(3, 5))
        names, ordered = [str(n) for n in numbers], [str(n) for n in sorted(numbers, reverse=falling)]
        instruction = (
            ("[Sort from large to small|Order these numbers, the largest first]: {l}" if falling
             else "[Sort from small to large|Put these numbers in order, the smallest first|Order these numbers]: {l}"),
            ("[从大到小排列|请把这些数从大到小排一排]：{l}" if falling else "[从小到大排列|请把这些数从小到大排一排]：{l}"),
        )  # fmt: skip
    comma = ", " if world.language == "en" else "、"
    prompt = say(world, dice, *instruction, l=comma.join(names))
    answer = comma.join(ordered)
    return Task(prompt, answer, ("exact", answer), answer, [comma.join(reversed(ordered)), comma.join(names)])


def _rising(numbers: list[int]) -> bool:
    """False for numbers that repeat or already stand in order: nothing would be left to sort."""
    return len(set(numbers)) == len(numbers) and numbers != sorted(numbers)


def _sequence(world: World, dice: Dice, validation: bool) -> Task:
    start, step = number_pair(dice, 1, 30, validation)
    step = step % 11 + 1
    shown = [start + step * i for i in range(4)]
    following = start + step * 4
    prompt = say(
        world, dice, "[What comes next|Continue the sequence|Which number follows]: {l}, ...?",
        "[下一个数是多少|接着往下写一个数|按规律填数]：{l}，……？", l=(", " if world.language == "en" else "，").join(map(str, shown)),
    )  # fmt: skip
    answer = say(
        world,
        dice,
        "The next number is {n}, because each step adds {s}.",
        "每次加{s}，所以下一个数是{n}。",
        n=following,
        s=step,
    )
    wrong = say(
        world,
        dice,
        "The next number is {n}, because each step adds {s}.",
        "每次加{s}，所以下一个数是{n}。",
        n=following + 1,
        s=step,
    )
    key = f"number is {following}" if world.language == "en" else f"数是{following}"
    return Task(prompt, answer, ("contains", key), answer, [wrong])


def _tell_story(world: World, dice: Dice, validation: bool) -> Task:
    x, o = world.owner_and_thing(dice, world.children, validation)
    prompt = say(
        world, dice,
        "[Tell me a short story about {x} and {o.a}.|Write a little story with {x} and {o.a}.|Please tell a story. {x} and {o.a} should be in it.|I want to hear a story about {x} and {o.a}.]",
        "[请讲一个关于{x}和{o.a}的小故事。|写一个小故事，里面要有{x}和{o.a}。|给我讲个故事吧，讲讲{x}和{o.a}。|我想听{x}和{o.a}的故事。]",
        x=x, o=o,
    )  # fmt: skip
    plot = dice.pick(("lost", "race", "trade", "lost"))
    return Task(prompt, tell(world, dice, validation, plot=plot, hero=(x, o)), ("contains", o.noun))


def _talk(world: World, dice: Dice, validation: bool) -> Task:
    while True:
        topic = dice.pick(TOPICS[world.language])
        question = fill(dice, topic.question)
        if held_out(question) == validation:
            break
    check = ("contains", topic.key) if topic.key and "|" not in topic.key else None
    return Task(question, fill(dice, topic.answer), check)


def _other_language(world: World, dice: Dice, validation: bool) -> Task:
    total = sums.draw_sum(dice, validation)
    a, b, r = total.first, total.second, total.result
    made = Task(
        say(world, dice, "[How much is|What is] {a} {w} {b}?", "{a}{w}{b}[等于多少|是多少]？", a=a, b=b, w=sums.NAMES[world.language][total.sign]),
        f"{a}{sums.NAMES['zh'][total.sign]}{b}等于{r}。" if world.language == "en" else f"{a} {sums.NAMES['en'][total.sign]} {b} is {r}.",
        ("number", str(r)),
    )  # fmt: skip
    made.system = fill(
        dice,
        "[Always answer in Chinese.|Answer every question in Chinese.]"
        if world.language == "en"
        else "[请总是用英语回答。|不管用什么语言提问，都用英语回答。]",
    )
    return made


MAKERS = {
    "story_question": _story_question, "fact": _fact, "way": _way, "sum": _sum, "problem": _problem,
    "compare_ages": _compare_ages, "compare_numbers": _compare_numbers, "order": _order, "letters": letters,
    "translate": translate, "odd_one_out": odd_one_out, "category": category, "sequence": _sequence,
    "tell_story": _tell_story, "unknown": _unknown, "talk": _talk, "other_language": _other_language,
}  # fmt: skip


def conversation(world: World, dice: Dice, validation: bool) -> dict[str, Any]:
    """One row for SFT: one to three turns, now and then with a system turn; kind and check are the last turn's."""
    kind = dice.weighted(WEIGHTS)
    first = task(world, dice, validation, kind)
    tasks, kinds = [first], [kind]
    long = kind in ("tell_story", "story_question", "unknown")
    if not first.system and dice.chance(0.15 if long else 0.45):
        short = ("sum", "fact", "letters", "translate", "talk", "compare_numbers", "category", "order")
        kinds += [dice.pick(short) for _ in range(dice.number(1, 2))]
        tasks += [task(world, dice, validation, each) for each in kinds[1:]]
    system = first.system
    if not system and dice.chance(0.15):
        system = fill(dice, SYSTEM[world.language])
    turns = [{"role": "system", "content": system}] if system else []
    for each in tasks:
        turns.append({"role": "user", "content": each.prompt})
        turns.append({"role": "assistant", "content": each.answer})
    row: dict[str, Any] = {"conversations": turns, "language": world.language, "kind": kinds[-1]}
    if tasks[-1].check:
        row["check"] = {"type": tasks[-1].check[0], "answer": tasks[-1].check[1]}
    return row
