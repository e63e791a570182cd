"""The fast engine gives the ids of `tokenizers`, bit for bit, or is not used and says why."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data.files import RowReport, read_rows
from minillm.text import engine as engines
from minillm.text.engine import GPT2_PATTERN, LLAMA3_PATTERN, FastEngine, NotExpressible, byte_characters
from minillm.text.tokenizer import SPECIAL_TOKENS, Tokenizer

pytest.importorskip("tiktoken", reason="tiktoken is not installed")

SHARED = Path(__file__).resolve().parents[1] / "../shared/data"
SHARED_FILES = sorted(
    path.name for path in SHARED.glob("*") if path.suffix in (".json", ".jsonl", ".txt", ".gz") and path.is_file()
)
SHIPPED = Tokenizer.load()
PIECES = [
    *SPECIAL_TOKENS, "<|", "|>", "<", "think>", "<|im_start|", "\n", "\r\n", " ", "   ", "\t\t", "\u00a0", "\u3000",
    "\u0085", "\x1c", "\u200b", "世界", "今天天气很好", "🙂", "👩\u200d👧", "é", "e\u0301", "ß", "ſ", "K", "'S", "'ll",
    "’t", "don't", "7", "1234567", "½", "٣", "Ⅷ", "x=1;", "-----", "\u0378", "\U00031350", "\U0002ebf0", "\0", "​",
]  # fmt: skip
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
awkward_text = st.lists(st.one_of(any_text, st.sampled_from(PIECES)), max_size=12).map("".join)


@lru_cache
def trained(pattern: str | None) -> Tokenizer:
    """A tokenizer that cuts text by `pattern` (None: ByteLevel's own rule), with the tokens that ours have."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    if pattern is None:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    made.decoder = decoders.ByteLevel()
    texts = [Path(__file__).read_text(encoding="utf-8"), "今天天气很好 " * 3, "the 12 and 123 of 2024\n\n" * 3]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    description = json.loads(made.to_str())
    for added in description["added_tokens"]:
        added["special"] = added["content"].startswith("<|")
    return Tokenizer(json.dumps(description), "")


def same_ids(tokenizer: Tokenizer, text: str, parse_special: bool = False) -> bool:
    engine = tokenizer.fast_engine()
    assert engine is not None
    ids = engine.encode(text, parse_special)
    assert ids is not None
    return ids.tolist() == tokenizer._encode_slowly([text], parse_special)[0]


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


def assert_same_ids_in_file(name: str, most: int) -> None:
    texts, size = [], 0
    for row in read_rows(SHARED / name, RowReport()):
        texts += [text for text in strings(row.value) if not any("\ud800" <= c <= "\udfff" for c in text)]
        size += sum(map(len, strings(row.value)))
        if size > most:
            break
    fast = SHIPPED.encode_arrays(texts)
    left = [text for text, ids in zip(texts, fast, strict=True) if isinstance(ids, list)]
    assert all(len(text) > engines.LONGEST for text in left), "the fast engine has encoded the others"
    assert all(list(a) == b for a, b in zip(fast, SHIPPED._encode_slowly(texts, False), strict=True))


needs_shared = pytest.mark.skipif(not SHARED_FILES, reason="there is no ../shared/data beside this checkout")


@needs_shared
@pytest.mark.parametrize("name", SHARED_FILES)
def test_real_text_has_the_same_ids(name: str) -> None:
    assert_same_ids_in_file(name, most=300_000)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED_FILES)
def test_all_of_the_real_text_has_the_same_ids(name: str) -> None:
    assert_same_ids_in_file(name, most=10**12)


@settings(max_examples=400, deadline=None)
@given(awkward_text, st.booleans())
def test_awkward_text_has_the_same_ids(text: str, parse_special: bool) -> None:
    assert same_ids(SHIPPED, text, parse_special)


@pytest.mark.parametrize("pattern", [None, GPT2_PATTERN, LLAMA3_PATTERN], ids=["bytelevel", "gpt2", "llama3"])
def test_so_it_has_under_other_split_rules(pattern: str | None) -> None:
    tokenizer = trained(pattern)

    @settings(max_examples=150, deadline=None)
    @given(awkward_text, st.booleans())
    def check(text: str, parse_special: bool) -> None:
        assert same_ids(tokenizer, text, parse_special)

    check()


@pytest.mark.parametrize(
    "text", [" " * 5_000 + "x", "字" * 5_000, "\n" * 3_000 + " a", "ab" * 4_000, "'" * 3_000, "9" * 900]
)
def test_so_have_very_long_words(text: str) -> None:
    assert same_ids(SHIPPED, text) and same_ids(trained(None), text)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_merges_a_vocabulary_has_the_ids_are_the_same_or_it_is_refused(data: st.DataObject) -> None:
    """Also merges that training never gives: one token made in several ways, one that cannot be reached."""
    vocab = {character: index for index, character in enumerate(byte_characters())}
    letters, merges = ["a", "b", "c"], []
    for _ in range(data.draw(st.integers(1, 8))):
        pair = data.draw(st.tuples(st.sampled_from(letters), st.sampled_from(letters)))
        if list(pair) not in merges:
            merges.append(list(pair))
            letters.append("".join(pair))
            vocab.setdefault("".join(pair), len(vocab))
    for token in data.draw(st.lists(st.text("abc", min_size=2, max_size=4), max_size=2)):
        vocab.setdefault(token, len(vocab))
    description = json.loads(SHIPPED.json_text)
    description["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": data.draw(st.booleans())}
    description["added_tokens"] = []
    try:
        engine = FastEngine(json.dumps(description))
    except NotExpressible:
        return
    import tokenizers

    slow = tokenizers.Tokenizer.from_str(json.dumps(description))
    for text in data.draw(st.lists(st.text("abc", max_size=12), min_size=5, max_size=20)):
        ids = engine.encode(text)
        assert ids is not None and ids.tolist() == slow.encode(text).ids


def changed(**changes: Any) -> str:
    description = json.loads(SHIPPED.json_text)
    for name, value in changes.items():
        if name == "model":
            value = description["model"] | value
        description[name] = value
    return json.dumps(description)


def test_merges_in_another_order_than_the_vocabulary_are_refused() -> None:
    merges = json.loads(SHIPPED.json_text)["model"]["merges"]
    with pytest.raises(NotExpressible, match="order of its vocabulary"):
        FastEngine(changed(model={"merges": [merges[1], merges[0], *merges[2:]]}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer"),
        (
            {"truncation": {"max_length": 8, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}},
            "truncation",
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "byte-level"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}, "byte-level"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}}, "cuts text"),
        ({"model": {"byte_fallback": True}}, "byte-level"),
        ({"model": {"dropout": 0.1}}, "byte-level"),
    ],
)
def test_what_tiktoken_cannot_do_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(NotExpressible, match=words):
        FastEngine(changed(**changes))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"lstrip": True}, "white space"), ({"content": "pad|><|"}, "overlap"), ({"content": "｜pad｜"}, "ASCII")],
)
def test_added_tokens_that_would_be_found_otherwise_are_refused(change: dict[str, Any], words: str) -> None:
    added = json.loads(SHIPPED.json_text)["added_tokens"]
    with pytest.raises(NotExpressible, match=words):
        FastEngine(changed(added_tokens=[{**added[0], **change}, *added[1:]]))


def test_lone_surrogates_become_question_marks_as_with_the_other_engine() -> None:
    texts = ["fine", "a\ud800b", "<think>\udfff" * 20_000]
    assert SHIPPED.fast_engine() is not None
    assert SHIPPED.encode_batch(texts) == SHIPPED._encode_slowly(texts, False)
    assert SHIPPED.decode(SHIPPED.encode_batch(texts)[1]) == "a?b"


def test_a_batch_large_enough_for_threads_keeps_its_order() -> None:
    texts = [f"story {number} " * (number % 7) for number in range(3_000)]
    fresh = Tokenizer(SHIPPED.json_text, "")
    assert fresh.encode_batch(texts) == fresh._encode_slowly(texts, False)


def test_the_engines_are_known_to_agree_on_every_character() -> None:
    """What SAME_UNICODE claims of the installed versions, in the planes that have letters."""
    from importlib.metadata import version

    if (version("tokenizers"), version("tiktoken")) not in engines.SAME_UNICODE:
        pytest.skip("other versions than the known ones: the difference is found when the engine is built")
    assert engines.find_disputed_characters() == ""


def test_a_text_with_a_disputed_character_is_left_to_the_other_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "disputed_characters", lambda: "字]")
    engine = FastEngine(SHIPPED.json_text)
    assert engine.encode("中字") is None and engine.encode("a]é") is None
    assert engine.encode("中文") is not None and engine.encode("a]") is not None


def test_without_tiktoken_the_slower_engine_is_named_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "tiktoken":
            raise ImportError(name)
        return original(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    fresh = Tokenizer(SHIPPED.json_text, "")
    text = "a story " * 20_000
    for _ in range(2):
        assert fresh.encode_batch([text]) == SHIPPED._encode_slowly([text], False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "tokenizers" in lines[0] and "tiktoken is not installed" in lines[0]
