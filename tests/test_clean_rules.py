"""The rules of the cleaner, each in English and Chinese: what is a defect, and what only looks like one."""

from __future__ import annotations

import json
import time
from collections import Counter

import numpy as np
import pytest

from minillm.data.clean.encoding import encoding_problem
from minillm.data.clean.markup import markup_problem
from minillm.data.clean.repetition import loop_at_end, loop_problem, repeated_share
from minillm.data.clean.rows import REASONS, Checked, Rules, Unfit, fit_messages

RULES = Rules(6, 32_768, (), "similar", False, np.zeros(0, dtype=np.uint64))
ENGLISH = "The baker opens the shop at six. Her first customers are the drivers of the early trams, who want coffee."
FRENCH = "La boulangerie ouvre à six heures. Les premiers clients sont les conducteurs du tramway, qui veulent un café."
RUSSIAN = "Пекарня открывается в шесть. Первыми приходят водители трамваев, которые хотят кофе."
JAPANESE = "パン屋は朝六時に開きます。最初のお客さんは市電の運転手で、コーヒーだけを飲みます。"
CHINESE = "面包店早上六点开门。最早来的客人是开头班电车的司机，他们要一杯咖啡和一个刚出炉的面包。"


def reason_of(row: object) -> str:
    """Why a row is removed; "" when it is kept."""
    line = row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()
    try:
        fit_messages(line, RULES, Checked("", [], [], [], [], None, None, Counter(), Counter()))
    except Unfit as unfit:
        assert unfit.removal.reason in REASONS
        return unfit.removal.reason
    return ""


def turns(*contents: str, first: str = "user") -> dict:
    others = {"user": "assistant", "assistant": "user"}
    role, messages = first, []
    for content in contents:
        messages.append({"role": role, "content": content})
        role = others[role]
    return {"conversations": messages}


def asked(answer: str, question: str = "Tell me something.") -> str:
    return reason_of(turns(question, answer))


# --- form ---


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (turns("Why?", ENGLISH), ""),
        (turns("为什么？", CHINESE), ""),
        (b'{"conversations": [', "broken_json"),
        (b"{'conversations': []}", "broken_json"),
        (json.dumps(turns("Why?", ENGLISH)).encode() * 2, "broken_json"),
        (b'["Why?", "Because."]', "broken_json"),
        (b"Because of the rain.", "broken_json"),
        (json.dumps(turns("Why?", "caf?") | {}).encode().replace(b"?", b"\xe9"), "non_utf8"),
        (json.dumps(turns("为什么？", CHINESE), ensure_ascii=False).encode("gb18030"), "non_utf8"),
        ({"conversations": []}, "missing_role"),
        ({"text": ENGLISH}, "missing_role"),
        ({"conversations": [{"content": "Why?"}, {"role": "assistant", "content": ENGLISH}]}, "missing_role"),
        (
            {"conversations": [{"role": "", "content": "Why?"}, {"role": "assistant", "content": ENGLISH}]},
            "missing_role",
        ),
        ({"conversations": [{"role": "user", "content": "Why?"}, {"role": "assistant"}]}, "missing_role"),
        (turns("Why?"), "missing_role"),
        (turns(ENGLISH, first="assistant"), "missing_role"),
        (turns(ENGLISH, "Why?", first="assistant"), "wrong_role_order"),
        (turns("Why?", ENGLISH, "Say more."), "wrong_role_order"),
        (
            {"conversations": [*turns("Why?")["conversations"], *turns("Why?", ENGLISH)["conversations"]]},
            "wrong_role_order",
        ),
        (turns("  ", ENGLISH), "empty_question"),
        (turns("Why?", ""), "empty_answer"),
        (turns("Why?", "\u3000\u200b\n"), "empty_answer"),
        (turns("Why?", "Yes."), "short_answer"),
        (turns("为什么？", "不知道。"), "short_answer"),
        (turns("Why?", "\u200bY e s\u200b \u200b."), "short_answer"),
        (turns("Why?", "No.", "Really?", ENGLISH), "short_answer"),
        (turns("Why?", "".join(f"{n}, " for n in range(10_000))), "over_long"),
    ],
)
def test_the_form_of_a_row(row: object, reason: str) -> None:
    assert reason_of(row) == reason


# --- encoding ---


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The caf\ufffd is open.", "replacement_character"),
        ("A bell:\x07.", "control_character"),
        ("A next line\x85 and a tab\t are fine.\r\n\f", ""),
        ("café déjà vu – “naïve”".encode().decode("latin-1"), "mojibake"),
        ("It’s “new” …".encode().decode("cp1252", "replace").replace("\ufffd", ""), "mojibake"),
        (CHINESE.encode().decode("latin-1"), "mojibake"),
        (CHINESE.encode().decode("gb18030", "ignore"), "mojibake"),
        ("It’s “new”, he said.".encode().decode("gb18030", "ignore"), "mojibake"),
        (RUSSIAN.encode().decode("cp1251", "ignore"), "mojibake"),
        (RUSSIAN.encode().decode("gb18030", "ignore"), "mojibake"),
        (JAPANESE.encode().decode("gb18030", "ignore"), "mojibake"),
        (RUSSIAN.encode("cp1251").decode("latin-1"), "mojibake"),
        (CHINESE.encode("gb18030").decode("latin-1"), "mojibake"),
        ("锟斤拷锟斤拷锟斤拷", "mojibake"),
        (CHINESE, ""),
        ("联通", ""),  # its GBK bytes happen to be UTF-8
        ("Der Spaß“, sagte er, „im MENÜ“ war groß…", ""),
        ("Voilà”… NÃO, AÇÃO, São Paulo; 20 °C, £5, © 2024, ½ «très» ÎLE", ""),
        ("Привет, мир: как дела? Γειά σου Κόσμε. 日本語のテキストです。안녕하세요 여러분", ""),
        (f"{RUSSIAN} {JAPANESE} السماء زرقاء اليوم. השמיים כחולים היום. आसमान नीला है। ท้องฟ้าเป็นสีฟ้า", ""),
        ("A wrong decoding makes mojibake: “cafÃ©” in place of “café”.", ""),
        ("× × ×××××××× ·········· ¿¡«»§§§ ÄÖÜ, créée, hääyöaie, þæð", ""),
        ("Emoji 😀👍🏽 and math ∀x∈ℝ: x² ≥ 0", ""),
    ],
)
def test_traces_of_a_wrong_decoding(text: str, reason: str) -> None:
    found = encoding_problem(text)
    assert (found[0] if found else "") == reason


# --- loops ---


@pytest.mark.parametrize(
    "text",
    [
        "I see. " * 20,
        "我不知道，" * 30,
        "The answer is " + "no " * 60,
        "答案是" + "好 " * 50,
        "Sure! h" + "h" * 200,
        "好的，呵" + "呵" * 200,
        ENGLISH + " They leave at seven." * 12,
        CHINESE + "他们七点离开。" * 12,
        ENGLISH + " and so on" * 30 + " until the end of the day comes.",
        "\n".join(["1. Do it.", "2. Do it again."] * 30),
        "Sure, " * 20 + ENGLISH,
        f"{ENGLISH} {'hm' * 60} {ENGLISH[::-1]}",
        CHINESE + "再说一遍，" * 20 + CHINESE[::-1],
        f"{ENGLISH}\n\n{ENGLISH}",
        2 * (CHINESE + JAPANESE),
        ENGLISH + "😂" * 80,
        ENGLISH + "." * 300,
        "".join(ENGLISH[n : n + 70] + "\n" for n in range(0, 20)) + " ".join(["so it is", "and so it goes"] * 30),
    ],
)
def test_answers_that_run_in_a_loop(text: str) -> None:
    assert loop_problem(text) and asked(text) == "repeated_ngram"


@pytest.mark.parametrize(
    "text",
    [
        ENGLISH,
        CHINESE,
        "Ha ha ha ha ha!",
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
        "Title\n" + "=" * 80 + "\n" + ENGLISH + "\n" + "-" * 80,
        "| a | b |\n| --- | --- |\n" + "\n".join(f"| {n} | {n * n} |" for n in range(40)),
        "```python\n" + "".join(f"    print(values[{n}])\n" for n in range(20)) + "```",
        json.dumps(
            [{"identifier": f"{n:06d}", "description": f"{n * n:06d}"} for n in range(60)], separators=(",", ":")
        ),
        "床前明月光，疑是地上霜。举头望明月，低头思故乡。" + CHINESE,
        "\n".join(f"{n} x 7 = {n * 7}" for n in range(1, 13)),
        f"{ENGLISH} A billion billions are 1{18 * '0'}, and a third is 0.{60 * '3'}...",
        "\n".join(" ".join("0" * 8) for _ in range(8)),
        "The wheels on the bus go round and round,\nround and round, round and round.\n" * 2 + "All through the town.",
        "\n".join(f"This is the {name} that lay in the house that Jack built." for name in ("malt", "rat", "cat")),
        "",
    ],
)
def test_repetition_that_belongs_there(text: str) -> None:
    assert loop_problem(text) == ""


def test_what_the_loop_rules_count() -> None:
    assert loop_at_end("Well, " + "so it goes on. " * 4) == (4, "so it goes on. ")
    assert loop_at_end(ENGLISH)[0] == 1
    assert repeated_share("a b c d e f g h i j k l") == 0
    assert repeated_share("a b c d e " * 10) == pytest.approx(1 - 5 / 46)
    assert repeated_share("一二三四五" * 10) == pytest.approx(1 - 5 / 46)


# --- remains of web pages ---


@pytest.mark.parametrize(
    "text",
    [
        f'<div class="text"><p>{ENGLISH}</p></div>',
        f"<p>{CHINESE}</p>",
        ENGLISH.replace(" ", "&nbsp;"),
        CHINESE + "&nbsp;&lt;br&gt;",
        ENGLISH + "\n<script>track('page');</script>",
        ENGLISH + "<style>.ad{display:none}</style>",
        ENGLISH + ' <a href="/2">next page</a>',
        "Home | About | Log in\n" + ENGLISH,
        ENGLISH + " Copyright © 2020 The Bakery. All rights reserved.",
        "We use cookies on this page. Accept all\n" + ENGLISH,
        CHINESE + "版权所有 © 2020 面包店。扫码关注我们。",
        "首页 | 新闻 | 联系我们 |\n" + CHINESE,
        "HOME  NEWS  CONTACT\n" + ENGLISH,
        "You are here: Home > News > Bread\n" + ENGLISH + "\nPosted by admin. Leave a comment",
        "Skip to main content\n" + ENGLISH + "\nRelated posts: how to bake",
        ENGLISH + "\nTerms of Use | Privacy Policy | Sitemap\n© 2020 Bakery Inc.",
        "您的位置：首页 >> 新闻中心 >> 正文\n" + CHINESE + "\n上一篇：没有了",
        CHINESE + "\n责任编辑：小王\n京ICP备12345678号",
        "Accueil | À propos | Contact\n" + FRENCH + "\nTous droits réservés",
        "Главная | О нас | Контакты\n" + RUSSIAN + "\n© 2020 Все права защищены.",
        "ホーム | 会社概要 | お問い合わせ\n" + JAPANESE + "\nCopyright © 2020",
        f"<p>{ENGLISH}",
        f"{ENGLISH}</div>",
        f"<![CDATA[{ENGLISH}]]>",
        f"Caf&eacute;: {ENGLISH}",
        ENGLISH.replace(" ", "&nbsp ", 3),
        ENGLISH + "\nwindow.dataLayer = window.dataLayer || []; function gtag(){dataLayer.push(arguments);}",
        ENGLISH + "\n$(document).ready(function(){ $('.menu').hide(); });",
        ENGLISH + "\n.header{color:#fff;background:#333} #footer{display:none}",
    ],
)
def test_remains_of_a_web_page(text: str) -> None:
    assert markup_problem("Tell me about the bakery.", text) and asked(text) == "html_boilerplate"


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("Write hello world in C.", '#include <stdio.h>\nint main(void) { if (1 < 2 && 3 > 2) puts("hi"); }'),
        ("Write hello world in HTML.", "<p>Hello <b>world</b></p>"),
        ("用HTML写一个标题。", "<h1>标题</h1><p>你好</p>"),
        ("Make a page for a bakery.", "<!DOCTYPE html>\n<html><body><p>Bread</p></body></html>"),
        (
            "How do I show it?",
            'Put it between tags:\n```html\n<div class="a"><p>text</p></div>\n```\nThen `<br>` breaks lines.',
        ),
        ("What does an entity look like in HTML?", "A space that does not break is &nbsp; and a sign is &lt;."),
        ("Sort a list in Java.", "List<T> sorted = new ArrayList<T>(); Map<U> map; // a < b and c > d"),
        ("What is a generic type?", "A type such as List<A> or Set<B> that takes another type."),
        ("What does R&D stand for?", "R&D stands for research & development; AT&T has some."),
        ("Compare.", "Since 3 < 5 and 7 > 5, the number lies between them: 3 < 5 < 7."),
        ("Write a letter.", "Dear <title> <name>, the meeting is on <day>. Bring your <label>."),
        ("Write a footer for my shop.", "© 2020 The Bakery. All rights reserved."),
        ("Draw a menu.", "Home-made Lemonade | 3.50\nCoffee | 2.00\nAbout our cakes: ask the staff | 4.00"),
        ("Make a table.", "| Home | Away |\n|---|---|\n| 2 | 1 |\n| 0 | 0 |"),
        (
            "Write a call to action.",
            "Fresh bread! Subscribe to our newsletter and follow us on Instagram. Click here to order.",
        ),
        ("Write a nav bar in HTML.", '<nav>\n  <a href="/">Home</a> | <a href="/news">News</a>\n</nav>'),
        ("How is a pointer made in C?", 'int sum = 3; int *p = &sum; printf("%d", *p); scanf("%d", &num);'),
        ("Who wrote it?", "作者：李白。来源：《全唐诗》。"),
        ("Say it in JSON.", '{"size": {"width": 10, "height": 5}, "print": "print(\'x\')"}'),
        ("What are cookies?", "Sites say that they use cookies to remember you. You can refuse them."),
        ("Write a slogan.", "Subscribe to our newsletter, and never miss the bread of the week!"),
        ("公众号是什么？", "微信公众号是商家在微信上发布消息的账号，读者可以免费订阅它的文章。"),
    ],
)
def test_what_only_looks_like_a_web_page(question: str, text: str) -> None:
    assert markup_problem(question, text) == ""


def test_markup_around_code_is_a_remain_even_where_markup_is_asked_for() -> None:
    text = '<div class="answer"><p>Use this:</p>\n```css\np { color: red }\n```\n<p>It makes the text red.</p></div>'
    assert markup_problem("How do I colour a paragraph with CSS?", text)
    assert markup_problem("How do I colour a paragraph with CSS?", "Use&nbsp;this&nbsp;rule:&nbsp;p&nbsp;{}")


@pytest.mark.parametrize(
    "text", ["<a " + " " * 30_000, "<a \n" * 8_000, "&amp;" * 6_000, "`" * 30_000, "{ " + ".a{" * 10_000]
)
def test_no_text_takes_long(text: str) -> None:
    started = time.process_time()
    markup_problem("Tell me something.", text)
    loop_problem(text)
    encoding_problem(text)
    assert time.process_time() - started < 5
