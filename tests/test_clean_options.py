"""What the cleaner does beyond its rules: duplicates, languages, personal data, evaluation sets."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minillm.config import UsageError
from minillm.data.clean import CleanReport, CleanSettings, clean_conversations
from minillm.data.clean.contamination import evaluation_ngrams, overlaps
from minillm.data.clean.duplicates import SHINGLE, normal_form, signatures, similar_rows
from minillm.data.clean.language import quick_language
from minillm.data.clean.pii import mask
from minillm.log import UserError

STORY = (
    "The baker opens the shop at six, and her first customers are the drivers of the early trams, who want nothing but "
    "coffee. At seven come the teachers, then children on their way to school, who count their coins twice."
)
CHINESE_STORY = (
    "面包店早上六点开门，最早来的客人是开头班电车的司机，他们只要一杯咖啡。七点钟来的是老师，然后是上学的孩子，"
    "他们把手里的硬币数了两遍，最后买了一个最小的面包，分成三份，一边走一边吃，到校门口正好吃完。"
)
needs_model = pytest.mark.skipif(importlib.util.find_spec("py3langid") is None, reason="py3langid is not installed")


def cleaned(tmp_path: Path, rows: list[tuple[str, str]], **settings: object) -> tuple[CleanReport, list[dict]]:
    """Cleans (question, answer) rows; the report and the entries of the removed rows."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in rows
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    report = clean_conversations(CleanSettings(input=str(source), output=str(output), **settings))  # type: ignore[arg-type]
    removed = (tmp_path / "out.jsonl.removed.jsonl").read_text(encoding="utf-8")
    return report, [json.loads(line) for line in removed.splitlines()]


# --- duplicates ---


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, World!", "hello world"),
        ("A  B\n\nC", "abc"),
        ("你好，世界！", "你好 世界"),
        ("ＡＢＣ１２３", "abc123"),
        ("Straße", "STRASSE"),
        ("cafe\u0301", "CAFÉ"),
        ("20 ℃", "20°c"),
    ],
)
def test_the_normal_form_keeps_letters_and_digits_only(one: str, other: str) -> None:
    assert normal_form(one) == normal_form(other) != ""


def test_texts_without_letters_keep_their_own_form() -> None:
    assert len({normal_form(text) for text in ("😀", "😢", "+", "-", "？")}) == 5


def test_the_same_letters_are_near_duplicates_unless_that_is_off(tmp_path: Path) -> None:
    rows = [
        ("Why?", STORY),
        ("why", STORY.upper()),
        ("Why?", STORY),
        ("为什么？", CHINESE_STORY),
        ("为什么", f" {CHINESE_STORY}"),
    ]
    report, removed = cleaned(tmp_path, rows, near_duplicates="same")
    assert [(r["line"], r["reason"], r["of"].rsplit(":", 1)[1]) for r in removed] == [
        (2, "near_duplicate", "1"),
        (3, "exact_duplicate", "1"),
        (5, "near_duplicate", "4"),
    ]
    assert cleaned(tmp_path, rows, near_duplicates="off")[0].reasons == {"exact_duplicate": 1}


def test_nearly_the_same_text_is_found_and_the_first_stays(tmp_path: Path) -> None:
    rows = [
        ("What happens in the morning?", STORY),
        ("为什么？", CHINESE_STORY),
        ("What happens in the morning?", STORY.replace("twice", "two times")),
        ("为什么？", CHINESE_STORY.replace("吃完", "吃光")),
        ("What happens in the evening?", STORY),
        ("What happens in the morning?", "The " + " ".join(reversed(STORY.split()))),
    ]
    report, removed = cleaned(tmp_path, rows)
    assert [(r["line"], r["reason"], r["of"].rsplit(":", 1)[1]) for r in removed] == [
        (3, "near_duplicate", "1"),
        (4, "near_duplicate", "2"),
    ]
    assert cleaned(tmp_path, rows, near_duplicates="same")[0].removed == 0


def test_rows_with_other_numbers_are_other_rows(tmp_path: Path) -> None:
    rows = [("What happens in the morning?", STORY + f" They have {n} coins.") for n in (3, 5, 8)]
    assert cleaned(tmp_path, rows)[0].kept == 3


def jaccard(one: str, other: str) -> float:
    first, second = ({text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)} for text in (one, other))
    return len(first & second) / len(first | second)


def test_minhash_estimates_the_similarity_of_shingles() -> None:
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("abcdefgh一二三四"), 400)) for _ in range(40)]
    mixed = [text[: 10 * n] + other[10 * n :] for n, (text, other) in enumerate(zip(texts, texts[1:], strict=False))]
    values, keys = signatures([(text, text[:100]) for text in texts[:-1]] + [(text, text[:100]) for text in mixed])
    count = len(mixed)
    assert values.shape == (2 * count, 2, 64) and keys.shape == (2 * count, 16)
    estimated = (values[:count, 0] == values[count:, 0]).mean(axis=1)
    exact = [jaccard(one, other) for one, other in zip(texts, mixed, strict=False)]
    assert np.abs(estimated - exact).mean() < 0.05 and np.abs(estimated - exact).max() < 0.2


def test_signatures_do_not_depend_on_the_other_rows_and_short_texts_have_one() -> None:
    sides = [(f"question{n}", f"answer{n}" * n) for n in range(1, 30)] + [("", ""), ("a", "b")]
    values, keys = signatures(sides)
    for index in (0, 7, 30):
        alone = signatures(sides[index : index + 1])
        assert (alone[0] == values[index]).all() and (alone[1] == keys[index]).all()


def test_a_row_goes_only_for_one_that_stays() -> None:
    values = np.zeros((3, 2, 64), dtype=np.uint16)
    values[1, :, :5] = 1  # 0.92 in common with the first
    values[2, :, :10] = 1  # 0.92 in common with the second, 0.84 with the first
    keys = np.arange(48, dtype=np.uint64).reshape(3, 16)
    keys[1, 3] = keys[0, 3]
    keys[2, 5] = keys[1, 5]
    assert similar_rows([values[:2], values[2:]], [keys[:2], keys[2:]]) == {1: 0}


# --- languages ---

GREETINGS = {
    "en": ("How are you today?", "I am fine, and what about you? It is a good day for a walk in the park."),
    "zh": ("你今天好吗？", "我很好，你呢？今天天气不错，很适合去公园里散步。"),
    "fr": ("Comment allez-vous aujourd'hui ?", "Je vais très bien, merci. Il fait beau, nous irons nous promener."),
    "ru": ("Как у вас дела сегодня?", "У меня всё хорошо, спасибо. Сегодня хорошая погода для прогулки в парке."),
    "ja": ("今日はお元気ですか。", "はい、元気です。今日は天気がいいので、公園を散歩しましょう。"),
}


def test_english_and_chinese_are_known_by_their_looks() -> None:
    found = {language: quick_language("\n".join(text)) for language, text in GREETINGS.items()}
    assert found == {"en": "en", "zh": "zh", "ja": "ja", "fr": "undecided", "ru": "undecided"}


@needs_model
def test_other_languages_are_removed_only_where_that_is_asked(tmp_path: Path) -> None:
    rows = [
        *GREETINGS.values(),
        ("Translate into French: I am fine.", "Je vais très bien, merci beaucoup."),
        ("1+1?", "1 + 1 = 12 - 10"),
    ]
    assert cleaned(tmp_path, rows)[0].removed == 0
    report, removed = cleaned(tmp_path, rows, languages="en,zh")
    assert [(r["line"], r["reason"], r["detail"]) for r in removed] == [
        (3, "language", "fr"),
        (4, "language", "ru"),
        (5, "language", "ja"),
    ]
    assert report.languages["en"] == 1 and report.languages["zh"] == 1 and report.languages["undecided"] == 1


def test_without_the_package_only_languages_fail_and_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minillm.data.clean import language

    language._model.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    rows = [GREETINGS["en"]]
    assert cleaned(tmp_path, rows)[0].kept == 1
    with pytest.raises(UserError, match=r"pip install 'minillm-trainer\[data\]'"):
        cleaned(tmp_path, rows, languages="en")
    with pytest.raises(UsageError, match="english"):
        cleaned(tmp_path, rows, languages="english")


# --- personal data ---


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jane.doe+x@mail.example.com.", "Write to [EMAIL]."),
        ("我的邮箱是li@example.cn，电话13800138000。", "我的邮箱是[EMAIL]，电话[PHONE]。"),
        ("+86 138-0013-8000, (415) 555-0134, +44 20 7946 0958, 010-12345678", "[PHONE], [PHONE], [PHONE], [PHONE]"),
        ("Appelez le +33 1 23 45 67 89.", "Appelez le [PHONE]."),
        ("身份证11010519491231002X号", "身份证[ID_CARD]号"),
        ("4111 1111 1111 1111 and 378282246310005", "[CREDIT_CARD] and [CREDIT_CARD]"),
        ("ping 8.8.8.8 and 2001:4860:4860::8888", "ping [IP_ADDRESS] and [IP_ADDRESS]"),
    ],
)
def test_personal_data_are_masked(text: str, masked: str) -> None:
    counts: Counter[str] = Counter()
    assert mask(text, counts) == masked
    assert counts.total() == masked.count("[")


@pytest.mark.parametrize(
    "text",
    [
        "1 + 2 = 3; 12345 * 100 = 1234500; 3.14159265358979; 2023-10-12 14:30:00; 100-200-300",
        "110105194912310021 has a wrong check digit, 4111111111111112 too.",
        "localhost is 127.0.0.1 or ::1, the router 192.168.1.1; version 10.2.3",
        "Rate: 400-120-200, a@b, @name, std::vector<int>, 13 800 138",
    ],
)
def test_other_numbers_stay(text: str) -> None:
    assert mask(text, Counter()) == text


def test_masking_is_counted_and_off_by_default(tmp_path: Path) -> None:
    rows = [("Who?", "Ask jane@example.com or call 13800138000 now.")]
    assert cleaned(tmp_path, rows)[0].masked == {}
    report, _ = cleaned(tmp_path, rows, mask_pii=True)
    assert report.masked == {"email": 1, "phone": 1}
    assert "[EMAIL]" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")


# --- evaluation sets ---


def test_rows_that_hold_an_evaluation_text_are_removed(tmp_path: Path) -> None:
    evaluation = tmp_path / "eval.jsonl"
    items = [{"question": STORY, "answer": "six"}, {"text": CHINESE_STORY}, {"question": "How many legs has an ant?"}]
    evaluation.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    inside = " ".join(STORY.split()[4:20]).upper().replace(",", " -")
    rows = [
        ("Tell me.", f"Listen: {inside}; that is all that I know."),
        ("说说看。", f"听着：{CHINESE_STORY[10:30]}。"),
        ("How many legs has an ant?", "An ant has six legs."),
        ("Tell me.", " ".join(STORY.split()[:12]) + " with something else behind it."),
        ("How many legs has a spider?", "It has eight of them."),
    ]
    report, removed = cleaned(tmp_path, rows, decontaminate=(str(evaluation),))
    assert [(r["line"], r["reason"]) for r in removed] == [
        (1, "contaminated"),
        (2, "contaminated"),
        (3, "contaminated"),
    ]
    assert report.kept == 2
    assert overlaps(STORY, evaluation_ngrams([str(evaluation)]))


def test_an_evaluation_file_without_text_is_an_error(tmp_path: Path) -> None:
    empty = tmp_path / "eval.jsonl"
    empty.write_text('{"answer": "four"}\n')
    with pytest.raises(UserError, match="--decontaminate"):
        cleaned(tmp_path, [("Why?", STORY)], decontaminate=(str(empty),))
    with pytest.raises(UserError, match="not found"):
        cleaned(tmp_path, [("Why?", STORY)], decontaminate=(str(tmp_path / "none.jsonl"),))
