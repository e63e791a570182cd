"""The text the shipped tokenizer learned from: the demo world, and a lexicon arranged by code.

Nobody's writing is in it. Words of our own lists are repeated about as often as their rank makes us expect
in real text (Zipf's law), each in the forms it takes there: after a space, opening a sentence, quoted.
"""

# ruff: noqa: E501 (the table of signs)

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from minillm.data.demo import passages, tasks
from minillm.data.demo.dice import Dice
from minillm.data.demo.world import World

FOLDER = Path(__file__).parent

# Where a word stands and how often: (what comes before it, capitalised?, share).
ENGLISH_PLACES = (
    (" ", False, 0.84), ("", False, 0.03), (" ", True, 0.055), ("", True, 0.035),
    ('"', True, 0.012), ("“", True, 0.012), ('"', False, 0.004), ("(", False, 0.004), ("-", False, 0.006),
)  # fmt: skip
CHINESE_PLACES = (("", 0.93), ("，", 0.05), ("：", 0.01), ("“", 0.01))
# How often a form occurs beside its base word.
FORM_SHARES = {"s": 0.35, "ed": 0.4, "ing": 0.3, "er": 0.2, "est": 0.15, "ly": 0.25}
# How large the whole is: enough that rare entries still count, little enough for a few seconds.
SCALE = 0.3
DEMO_DOCUMENTS = 2400
SIGNS = {
    ",": 60000, ".": 50000, ".\n": 6000, ".\n\n": 5000, "\n": 20000, "\n\n": 9000, ",\"": 4000, ".\"": 3000,
    "?\"": 1500, "!\"": 1500, ".\"\n\n": 2500, "?\"\n\n": 1200, "!\"\n\n": 1200, ":\n": 1500, ":\n\n": 1500,
    ",”": 2500, ".”": 2000, "?”": 900, "!”": 900, ".”\n\n": 1500, "?”\n\n": 700, "!”\n\n": 700, "'": 2000,
    "\"": 2500, " \"": 4000, " “": 3000, "“": 5000, "”": 5000, "’": 3000, "‘": 1200, "--": 3000, "—": 3500,
    " —": 500, " (": 1800, "(": 800, ")": 1500, "),": 500, ").": 600, ";": 4500, ":": 3500, "?": 4000, "!": 4000,
    "...": 900, "…": 700, "……": 500, "-": 4000, " -": 900, "/": 500, " =": 1400, " +": 900, " *": 500,
    "=": 500, "+": 400, "**": 600, " **": 500, "**:": 300, "*": 300, "#": 300, " #": 300, "```": 200,
    "```\n": 200, "()": 300, "():\n": 200, "('": 200, "(\"": 200, "')": 150, "\")": 150, "['": 120, "']": 120,
    " {": 200, "{": 200, "}": 300, "[": 300, "]": 300, "_": 500, "<": 300, ">": 500, "</": 200, " <": 200,
    "%": 500, " $": 600, "$": 500, "&": 200, " &": 150, "|": 200, " |": 200, "@": 100, "\\": 200, "://": 100,
    "，": 20000, "。": 15000, "。\n": 4000, "。\n\n": 2500, "、": 6000, "：": 3500, "：\n": 900, "：\n\n": 700,
    "；": 1500, "？": 2500, "！": 2500, "。”": 1200, "！”": 700, "？”": 700, "：“": 1500,
    "”。": 300, "，”": 300, "”，": 500, "《": 900, "》": 800, "》（": 100, "（": 900, "）": 800, "），": 200, "）。": 200,
    "！\n": 400, "？\n": 400, "；\n": 300, "·": 400, "——": 500, "～": 100, " ": 9000, "  ": 700, "   ": 900,
    "    ": 500, "       ": 500, "           ": 200, "\t": 200, "'s": 7000, "'t": 2500, "'ll": 900, "'re": 900,
    "'ve": 900, "'m": 900, "'d": 900, "’s": 3500, "’t": 1800, "’ll": 500, "’re": 450, "’ve": 400, "’m": 400, "’d": 400,
    "℃": 60, "°": 100,
}  # fmt: skip
SUFFIXES = str.split(
    "tion tions ment ness able ible ful less ing ings ed er ers est ly ally ity ies ous ious ive ance "
    "ence ant ent al ial ian ism ist ize ized ise ate ated ation ating ure ward wards ship hood dom ery "
    "ary ory ted ting led ling ned ning red ring sed sing ved ving ded ding ched ching shed shing ged "
    "ging ked king ped ping bed bing med ming some land man men son ton ville berry field stone ford burg"
)
PREFIXES = str.split(
    "un re in im dis en em de pre pro con com ex ac ad ap as at be bl br ch cl cr dr fl fr gl gr pl pr sc "
    "sh sk sl sm sn sp st str sw th tr tw wh wr qu inter over under out sub trans mis non fore super anti "
    "auto"
)


def tokenizer_corpus(seed: int = 0) -> Iterator[str]:
    """Texts whose statistics resemble English and Chinese prose, then documents of the demo world."""
    yield from _english()
    yield from _chinese()
    for sign, count in SIGNS.items():
        yield from _repeat(sign, count * SCALE)
    yield from _demo(seed)


def read_lexicon(name: str) -> list[str]:
    """The entries of lexicon_{name}.txt in order, comment lines left out."""
    lines = (FOLDER / f"lexicon_{name}.txt").read_text(encoding="utf-8").splitlines()
    return [entry for line in lines if not line.startswith("#") for entry in line.split()]


def inflect(entry: str) -> Iterator[tuple[str, float]]:
    """The forms of an entry and their shares: `walk/v` -> (walk, 1.0), (walks, 0.35), (walked, 0.4), ..."""
    word, _, kinds = entry.partition("/")
    yield word, 1.0
    endings: list[str] = []
    for kind in kinds:
        endings += {
            "n": ["s"],
            "v": ["s", "ed", "ing"],
            "i": ["s", "ing"],
            "a": ["er", "est"],
            "l": ["ly"],
            "d": ["ed"],
        }.get(kind, [])
    for ending in dict.fromkeys(endings):
        yield attach(word, ending), FORM_SHARES[ending]


def attach(word: str, ending: str) -> str:
    """English spelling of word + s, ed, ing, er, est or ly."""
    consonant_y = word.endswith("y") and word[-2:-1] not in "aeiou"
    if ending == "s":
        if consonant_y:
            return word[:-1] + "ies"
        return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")
    if ending == "ly":
        if word.endswith("le"):
            return word[:-1] + "y"
        return (word[:-1] + "i" if consonant_y else word) + ("y" if word.endswith("ll") else "ly")
    if word.endswith("e") and not (ending == "ing" and word.endswith(("ee", "ye"))):
        return word[:-1] + ending
    if consonant_y and ending != "ing":
        return word[:-1] + "i" + ending
    return word + (word[-1] if _doubles(word) else "") + ending


def _doubles(word: str) -> bool:
    short = len(word) in (3, 4) and word[-1] in "bdgmnprt" and word[-2] in "aeiou" and word[-3] not in "aeiou"
    return short and len([c for c in word if c in "aeiou"]) == 1


def _english() -> Iterator[str]:
    entries = read_lexicon("en")
    counts: dict[str, float] = {}
    for rank, entry in enumerate(entries):
        for word, share in inflect(entry):
            counts.setdefault(word, share * 1_100_000 / (rank + 12) ** 1.07)
    for word, count in counts.items():
        for before, capital, share in ENGLISH_PLACES:
            form = word[0].upper() + word[1:] if capital else word
            yield from _repeat(before + form, count * share * SCALE)
    for place, pieces, weight in ((" ", PREFIXES, 260), ("", SUFFIXES, 160)):
        for piece in pieces:
            yield from _repeat(place + piece, weight * SCALE)


def _chinese() -> Iterator[str]:
    entries = read_lexicon("zh")
    border = entries.index("[words]")
    characters = dict.fromkeys("".join(entries[1:border]))
    words = dict.fromkeys(entry for entry in entries[border + 1 :] if len(entry) > 1)
    yield from _placed(characters, 500_000, 80, 1.0)
    yield from _placed(words, 180_000, 80, 0.95)


def _placed(words: Iterable[str], scale: float, shift: float, exponent: float) -> Iterator[str]:
    for rank, word in enumerate(words):
        count = SCALE * scale / (rank + shift) ** exponent
        for before, share in CHINESE_PLACES:
            yield from _repeat(before + word, count * share)


def _repeat(text: str, count: float) -> Iterator[str]:
    yield from [text] * round(count)


def _demo(seed: int) -> Iterator[str]:
    for language in ("en", "zh"):
        world = World(seed, language)
        for index in range(DEMO_DOCUMENTS // 2):
            yield passages.document(world, Dice(seed, "tokenizer", language, index), validation=False)
            row = tasks.conversation(world, Dice(seed, "tokenizer", "talk", language, index), validation=False)
            yield from (message["content"] for message in row["conversations"])
