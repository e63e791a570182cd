"""Tasks about single words: letters, translation, what belongs together."""

# ruff: noqa: E501 (a template reads best on one line)

from __future__ import annotations

from typing import Any

from minillm.data.demo.answers import Task, number_task, say
from minillm.data.demo.dice import Dice, capitalise, fill, held_out
from minillm.data.demo.passages import GROUPS
from minillm.data.demo.vocabulary import ANIMALS, COLOURS, FRUITS, JOBS, MATERIALS, OBJECTS, PLACES, article
from minillm.data.demo.world import World


def letters(world: World, dice: Dice, validation: bool) -> Task:
    pool = world.words(OBJECTS[:0]) + [entry[2 * world.column] for entry in OBJECTS]
    pool += [world.word(entry) for entry in (*ANIMALS, *FRUITS, *JOBS, *PLACES, *COLOURS)]
    pool = [word for word in pool if " " not in word and len(word) > 1]
    kind = dice.pick(
        ("spell", "reverse", "count", "first", "capitals")
        if world.language == "en"
        else ("reverse", "count", "first", "last", "spell")
    )
    word = dice.pick(pool)
    while held_out(kind, word) != validation:
        word = dice.pick(pool)
    if kind == "count":
        prompt = say(
            world,
            dice,
            '[How many letters does the word "{w}" have?|Count the letters of "{w}".|How many letters are there in "{w}"?]',
            "[“{w}”这个词有几个字？|数一数“{w}”有几个字。|“{w}”是由几个字组成的？]",
            w=word,
        )
        answer = say(world, dice, '"{w}" has {n} letters.', "“{w}”有{n}个字。", w=word, n=len(word))
        return number_task(dice, prompt, answer, len(word))
    english = {
        "spell": '[Spell the word "{w}".|How do you spell "{w}"?|Please spell "{w}" letter by letter.]',
        "reverse": '[Write the word "{w}" backwards.|Reverse the word "{w}".|What is "{w}" written backwards?]',
        "first": '[What is the first letter of "{w}"?|With which letter does "{w}" begin?]',
        "capitals": '[Write "{w}" in capital letters.|Put "{w}" into capitals.]',
    }
    chinese = {
        "spell": "[把“{w}”一个字一个字地读出来。|请把“{w}”拆成单个的字。]",
        "reverse": "[把“{w}”倒过来写。|“{w}”倒过来怎么写？|请把“{w}”的字反过来排列。]",
        "first": "[“{w}”的第一个字是什么？|“{w}”这个词开头是哪个字？]",
        "last": "[“{w}”的最后一个字是什么？|“{w}”这个词末尾是哪个字？]",
    }
    results = {
        "spell": "-".join(word),
        "reverse": word[::-1],
        "first": word[0],
        "last": word[-1],
        "capitals": word.upper(),
    }
    prompt = say(world, dice, english.get(kind, ""), chinese.get(kind, ""), w=word)
    answer = results[kind]
    slips = {
        "spell": ["-".join(word[:-1]), "-".join(word[::-1])],
        "reverse": [word, word[::-1][1:], word[-1] + word[:-1]],
        "first": list(word[1:]),
        "last": list(word[:-1]),
        "capitals": [word, word.capitalize(), word.upper()[:-1]],
    }
    rivals = [value for value in slips[kind] if value != answer]
    return Task(prompt, answer, ("exact", answer), answer, rivals)


def translate(world: World, dice: Dice, validation: bool) -> Task:
    source, target = (0, 1) if world.language == "en" else (1, 0)
    while True:
        english, _, chinese, measure, _ = dice.pick(OBJECTS)
        colour = dice.pick(COLOURS)
        if dice.chance(0.5):
            pair = (article(f"{colour[0]} {english}"), f"一{measure}{colour[1]}的{chinese}")
            rival_colour = dice.pick([c for c in COLOURS if c != colour])
            rivals = [article(f"{rival_colour[0]} {english}"), f"一{measure}{rival_colour[1]}的{chinese}"]
        else:
            entries = [(e[0], e[2]) for e in OBJECTS] + [(e[0], e[1]) for e in (*ANIMALS, *FRUITS, *JOBS, *COLOURS)]
            entries += [(e[0], e[1]) for e in PLACES if e[0] not in ("lake", "bridge")] + list(MATERIALS.items())
            pair, rivals = dice.pick(entries), list(dice.pick(entries))
        if held_out(pair[0]) == validation and rivals[target] != pair[target]:
            break
    prompt = say(
        world, dice,
        '[How do you say "{w}" in Chinese?|Translate into Chinese: {w}|What is "{w}" in Chinese?|What is the Chinese for "{w}"?]',
        "[“{w}”用英语怎么说？|翻译成英语：{w}|“{w}”的英文是什么？|请把“{w}”翻译成英文。]", w=pair[source],
    )  # fmt: skip
    answer = pair[target]
    return Task(prompt, answer, ("exact", answer), answer, [rivals[target]])


def _two_groups(dice: Dice) -> list[Any]:
    """Two groups of words that exclude each other (a fruit is food, and so are some animals)."""
    while True:
        pair = dice.sample(GROUPS, 2)
        names = {pair[0][0][0], pair[1][0][0]}
        if not ("food" in names and names & {"fruit", "animal"}):
            return pair


def odd_one_out(world: World, dice: Dice, validation: bool) -> Task:
    while True:
        (name, members), (_, others) = _two_groups(dice)
        words, odd = dice.sample(world.words(members), 3), dice.pick(world.words(others))
        if held_out(*sorted(words), odd) == validation and odd not in world.words(members):
            break
    mixed = dice.sample([*words, odd], 4)
    comma = ", " if world.language == "en" else "、"
    group = world.word(name)
    prompt = say(
        world, dice, "[Which word does not belong to the others|Find the odd one out|Which one is different]: {l}?" if dice.chance(0.5) else "{l}: which one is not {g}?",
        "[下面哪个词和其他的不是一类|找出不同类的词]：{l}" if dice.chance(0.5) else "{l}，哪一个不是{g}？", l=comma.join(mixed), g=group if group == "food" else article(group),
    )  # fmt: skip
    if world.language == "zh":
        prompt = prompt.replace("a " + group, group).replace("an " + group, group)
    answers = [
        f"{who} does not belong: the others are all {group if group == 'food' else group + 's'}.".capitalize()
        if world.language == "en" else f"{who}。其他的都是{group}。"
        for who in (odd, words[0])
    ]  # fmt: skip
    key = odd.capitalize() if world.language == "en" else odd
    return Task(prompt, answers[0], ("contains", key), answers[0], answers[1:])


def category(world: World, dice: Dice, validation: bool) -> Task:
    while True:
        (name, members), (other_name, others) = _two_groups(dice)
        word = dice.pick(world.words(members))
        if held_out(word, name[0], other_name[0]) == validation and word not in world.words(others):
            break
    truth, asked = world.word(name), world.word(dice.pick((name, other_name)))
    yes = asked == truth
    if world.language == "zh":
        prompt = fill(dice, "[{w}是一种{g}吗？|{w}是{g}吗？|请问{w}属于{g}吗？]", w=word, g=asked)
        answer = f"是的，{word}是{truth}。" if yes else f"不是，{word}是{truth}。"
        return Task(
            prompt,
            answer,
            ("contains", answer[:-1]),
            answer,
            [f"不是，{word}不是{truth}。" if yes else f"是的，{word}是{asked}。"],
        )
    countable = members in (ANIMALS, FRUITS, JOBS)
    subject = article(word) if countable else word
    be = "are" if word.endswith("s") and not countable else "is"
    kind_of = {"food": "a kind of food"}
    prompt = capitalise(f"{be} {subject} {kind_of.get(asked, article(asked))}?")
    right = f"{subject} {be} {kind_of.get(truth, article(truth))}."
    answer = f"Yes, {right}" if yes else f"No, {right}"
    wrong = (
        f"No, {subject} {be} not {kind_of.get(truth, article(truth))}."
        if yes
        else f"Yes, {subject} {be} {kind_of.get(asked, article(asked))}."
    )
    return Task(prompt, answer, ("contains", answer[:-1]), answer, [wrong])
