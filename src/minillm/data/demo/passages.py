"""Pretraining documents of the demo world: stories, reports, portraits, places, talk, sums, lists."""

# ruff: noqa: E501 (a template reads best on one line)

from __future__ import annotations

from minillm.data.demo import facts, sums
from minillm.data.demo.dice import Dice, capitalise, fill
from minillm.data.demo.stories import Place, Report, finish, places, tell
from minillm.data.demo.vocabulary import (
    ANIMALS,
    COLOURS,
    FOODS,
    FRUITS,
    JOBS,
    OBJECTS,
    WEATHER,
    article,
    plural,
)
from minillm.data.demo.world import Person, World

WEIGHTS = {
    "story": 46, "report": 8, "portrait": 13, "place": 7, "conversation": 12, "problem": 7, "sums": 4, "words": 3,
}  # fmt: skip

WEATHER_LINES = {
    "en": "[Today it is {w} {p.at}.|The weather {p.at} is {w} today.|It was {w} {p.at} this morning.|When it is {w}, few people are {p.at}.|On {w} days, {x} likes to be {p.at}.]",
    "zh": "[今天{p}是{w}。|早上{p}还是{w}，后来天气变了。|每到{w}，{p}的人就不多。|每到{w}，{x}总喜欢去{p}。]",
}
PLACE_LINES = {
    "en": "[Many people come here on {day}.|It is open every day except {day}.|{x}'s home is not far from here.|You can often meet {x} here.|Inside it is quiet in the morning.|There is an old clock above the door.|A narrow path leads to it.|Children like to play in front of it.]",
    "zh": "[到了{day}，这里人很多。|除了{day}，这里每天都开放。|{x}的家离这里不远。|在这里常常能遇到{x}。|早上这里很安静。|门口挂着一口旧钟。|一条小路通到这里。|孩子们喜欢在前面的空地上玩。]",
}
DAYS = {
    "en": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "zh": ["星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期天"],
}

TALKS = {
    "en": {
        "open": (
            '"[Good morning|Hello|Hi|Good evening], {x}!" said {y}.',
            '"[Good morning|Hello|Hi], {y}. [How are you|How are you today]?" asked {x}. "[Very well, thank you|I am fine, thanks|A little tired, but well]," said {y}.',
            '{x} and {y} met {q.at}.',
        ),
        "plan": (
            '"[Where are you going|Where are you off to]?" "To {p}. [I need {o.a}|I want to buy {food}|I am looking for {o.a}]," {x} [answered|said].',
            '"[Will you come with me to {p}|Shall we go to {p} together]?" asked {x}. "[Gladly|With pleasure], [if it does not rain|but only after lunch|if I can be home by six]," said {y}.',
            '"[Have you heard the news|Do you know what happened]?" asked {y}. "[No, tell me|What is it]?" "{friend} has found {o.a} {p.at}."',
            '"[Can you help me|Could you do me a favour]?" {x} asked. "[Of course|Certainly], what is it?" "[Please carry this {o.noun}|Please take this {o.noun}] to {p}."',
            '"[Whose {o.noun} is this|Do you know whose {o.noun} this is]?" {y} asked. "[It belongs to {friend}|It is mine]," said {x}. "[I have been looking for it everywhere|Thank you for finding it]."',
            '"[What are you doing tomorrow|What are your plans for {day}]?" "[I will visit {friend}|I will {skill} with {friend}|I want to learn to {skill}]," said {x}.',
            '"[May I borrow your {o.noun}|Could you lend me your {o.noun}]?" asked {y}. "[Yes, but bring it back by {day}|You may, but be careful with it]," {x} [answered|said].',
            '"[What is your favourite food|What do you like to eat]?" "{food_Cap}[, of course|]," [said {x}|answered {x}]. "[Then come to us on {day}|I like it too]."',
        ),
        "close": (
            '"[Goodbye|See you tomorrow|See you on {day}|Take care]!" said {y}.',
            'They [laughed|shook hands|waved] and went [home|on their way].',
            '"[Thank you|Thanks a lot], {y}." "[You are welcome|Do not mention it|My pleasure]."',
        ),
    },
    "zh": {
        "open": (
            "“{x}，[早上好|你好|晚上好]！”{y}说。",
            "“{y}，[你好|早上好]，[最近怎么样|今天好吗]？”{x}问。“[很好，谢谢|还不错，谢谢|有点累，不过挺好的]。”{y}回答。",
            "{x}和{y}在{q}见了面。",
        ),
        "plan": (
            "“[你要去哪里|你去哪儿]？”{y}问。“去{p}，[我要买{o.a}|我想买点{food}|我在找{o.a}]。”{x}回答。",
            "“[跟我一起去{p}好吗|我们一起去{p}吧]？”{x}问。“[好啊|太好了]，[要是不下雨的话|不过得等到午饭以后|只要六点前能回家就行]。”{y}说。",
            "“[你听说了吗|你知道出了什么事吗]？”{y}问。“[没有，快告诉我|什么事]？”“{friend}在{p}捡到了{o.a}。”",
            "“[你能帮我一个忙吗|可以帮帮我吗]？”{x}问。“[当然可以|没问题]，什么事？”“[请把这{o.measure}{o.noun}带到{p}|请帮我把这{o.measure}{o.noun}送到{p}]。”",
            "“[这{o.measure}{o.noun}是谁的|你知道这{o.measure}{o.noun}是谁的吗]？”{y}问。“[是{friend}的|是我的]，”{x}说，“[到处都没有找到呢|谢谢你帮忙找到它]。”",
            "“[明天你做什么|{day}你有什么打算]？”{y}问。“[我去看{friend}|我和{friend}一起{skill}|我想学{skill}]。”{x}说。",
            "“[我可以借你的{o.noun}吗|能把你的{o.noun}借给我吗]？”{y}问。“[可以，{day}以前还给我就行|可以，不过要小心一点]。”{x}[回答|说]。",
            "“[你最喜欢吃什么|你爱吃什么]？”{y}问。“[当然是{food}|{food}]。”{x}[回答|说]。“[那{day}来我家吃吧|我也喜欢]。”",
        ),
        "close": (
            "“[再见|明天见|{day}见|路上小心]！”{y}说。",
            "两个人[笑着|挥挥手，]各自回家了。",
            "“[谢谢你|多谢了]，{y}。”“[不客气|别客气|没什么]。”",
        ),
    },
}  # fmt: skip


def document(world: World, dice: Dice, validation: bool, kind: str | None = None) -> str:
    """One pretraining document; `kind` is drawn by WEIGHTS when not given."""
    makers = {
        "story": lambda: tell(world, dice, validation),
        "report": lambda: _report(world, dice, validation),
        "portrait": lambda: _portrait(world, dice),
        "place": lambda: _place(world, dice),
        "conversation": lambda: _conversation(world, dice, validation),
        "problem": lambda: _problem(world, dice, validation),
        "sums": lambda: _sums(world, dice, validation),
        "words": lambda: _words(world, dice),
    }
    return makers[kind or dice.weighted(WEIGHTS)]()


def _report(world: World, dice: Dice, validation: bool) -> str:
    report = Report(world, dice, validation, events=dice.number(3, 6))
    told = report.text()
    questions, count = report.questions(), dice.number(1, 3)
    if dice.chance(0.5):
        return "\n".join(
            [told]
            + [f"{q.text} {q.answer}" if world.language == "en" else q.text + q.answer for q in questions[:count]]
        )
    closing = {
        "en": "[So in the end:|This is how it ended:|At the end of the day:]",
        "zh": "[最后的情况是这样的：|到最后，|就这样，]",
    }
    answers = [q.answer for q in questions if q.kind in ("person", "holder", "thing")][:count]
    if world.language == "en":
        return told + " " + fill(dice, closing["en"]) + " " + " ".join(answers)
    return told + fill(dice, closing["zh"]) + "".join(answers)


def _portrait(world: World, dice: Dice) -> str:
    person = dice.pick(world.people)
    kinds = dice.sample([kind for kind in facts.attributes(person) if kind != "pet name"], dice.number(4, 7))
    sentences = [facts.state(dice, person, kind) for kind in kinds]
    sentences.sort(key=lambda sentence: not sentence.startswith(person.name))  # who it is about comes first
    # a pronoun more often than not: nobody is named in every sentence
    parts = [sentences[0]] + [_with_pronoun(s, person) if dice.chance(0.65) else s for s in sentences[1:]]
    return finish(world.language, parts)


def _with_pronoun(sentence: str, person: Person) -> str:
    if person.language == "zh":
        return sentence.replace(person.name, person.he, 1) if sentence.startswith(person.name) else sentence
    for old, new in ((f"{person.name}'s ", f"{person.His} "), (f"{person.name} ", f"{person.He} ")):
        if sentence.startswith(old):
            return new + sentence[len(old) :]
    return sentence


def _place(world: World, dice: Dice) -> str:
    start = dice.pick(list(world.places))
    ways = [way for way in world.ways if way[0] == start]
    person = dice.pick(world.people)
    place = Place(world.language, start)
    slots = {
        "x": person,
        "p": place,
        "w": world.word(dice.pick(WEATHER)),
        "day": dice.pick(DAYS[world.language]),
    }
    sentences = [facts.state_way(world, dice, way) for way in dice.sample(ways, dice.number(2, min(4, len(ways))))]
    middle = fill(dice, PLACE_LINES[world.language], **slots)
    weather = fill(dice, WEATHER_LINES[world.language], **slots)
    opening = {
        "en": "[This is about {p}.|What is there to say about {p}?|Let us look at {p}.]",
        "zh": "[说说{p}吧。|{p}是个什么样的地方呢？|我们来看看{p}。]",
    }
    return finish(world.language, [fill(dice, opening[world.language], **slots), middle, *sentences, weather])


def _conversation(world: World, dice: Dice, validation: bool) -> str:
    x, o = world.owner_and_thing(dice, world.people, validation)
    y, z = world.others(dice, 2, x)
    talk = TALKS[world.language]
    p, q = places(world, dice, 2)
    slots = {
        "x": x, "y": y, "friend": z, "o": o, "p": p, "q": q, "day": dice.pick(DAYS[world.language]), "food": x.food,
        "food_Cap": x.food.capitalize(), "skill": x.skill,
    }  # fmt: skip
    plans = dice.sample(talk["plan"], dice.number(1, 2))
    if all("{o." in plan for plan in plans):  # one object cannot be lent and lost in the same talk
        plans = plans[:1]
    lines = [dice.pick(talk["open"]), *plans, dice.pick(talk["close"])]
    return capitalise("\n".join(fill(dice, line, **slots) for line in lines))


def _problem(world: World, dice: Dice, validation: bool) -> str:
    texts = []
    for _ in range(dice.number(1, 2)):
        problem = sums.draw_problem(world, dice, validation)
        if world.language == "en":
            texts.append(f"{dice.pick(('Question', 'Problem', 'Task'))}: {problem.text}\nAnswer: {problem.solution}")
        else:
            texts.append(
                f"{dice.pick(('问题', '题目'))}：{problem.text}\n{dice.pick(('答案', '解答'))}：{problem.solution}"
            )
    return "\n".join(texts)


def _sums(world: World, dice: Dice, validation: bool) -> str:
    count = dice.number(4, 8)
    return "\n".join(sums.sum_line(dice, world.language, sums.draw_sum(dice, validation)) for _ in range(count))


GROUPS = (
    (("animal", "动物"), ANIMALS), (("fruit", "水果"), FRUITS), (("colour", "颜色"), COLOURS),
    (("job", "职业"), JOBS), (("food", "食物"), FOODS),
)  # fmt: skip


def _words(world: World, dice: Dice) -> str:
    """What belongs together, what things are made of, and what they are called in the other language."""
    if dice.chance(0.5):
        entries = dice.sample(OBJECTS + ANIMALS + COLOURS + JOBS, dice.number(4, 7))
        pairs = [(entry[0], entry[2] if len(entry) == 5 else entry[1]) for entry in entries]
        if world.language == "en":
            return capitalise("\n".join(f"{english} is {chinese} in Chinese." for english, chinese in pairs))
        return "\n".join(f"“{chinese}”用英语说是 {english}。" for english, chinese in pairs)
    (group, members) = dice.pick(GROUPS)
    words = dice.sample(world.words(members), 5)
    name = world.word(group)
    if world.language == "zh":
        first = f"{'、'.join(words[:4])}都是{name}。"
        return first + f"{words[4]}也是一种{name}。"
    nouns = [plural(word) for word in words] if members in (ANIMALS, FRUITS, JOBS) else words
    nouns = [noun.replace("mans", "men").replace("cherrys", "cherries") for noun in nouns]
    last = article(words[4]) if members in (ANIMALS, FRUITS, JOBS) else words[4]
    if members is FOODS:
        return capitalise(f"{', '.join(nouns[:3])} and {nouns[3]} are kinds of food. You can eat {last} as well.")
    return capitalise(f"{', '.join(nouns[:3])} and {nouns[3]} are {plural(name)}. {last} is {article(name)}, too.")
