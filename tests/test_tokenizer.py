"""The tokenizer loses nothing, nobody writes its control tokens by accident, and it can be reproduced."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.log import UserError
from minillm.text.tokenizer import ASSETS, CONTROL_TOKENS, SPECIAL_TOKENS, Tokenizer
from minillm.text.train import TrainTokenizerSettings, run, train_tokenizer

TOKENIZER = Tokenizer.load()
SHARED = Path(__file__).resolve().parents[1] / "../shared/data"
PIECES = [*SPECIAL_TOKENS, "<|", "|>", "\n", "  ", "\r\n", "世界", "🙂", "é", "7", "don't"]
any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
awkward_text = st.lists(st.one_of(any_text, st.sampled_from(PIECES)), max_size=6).map("".join)


def test_special_tokens_come_first_in_the_documented_order():
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(10))
    assert SPECIAL_TOKENS[:2] == ("<|pad|>", "<|endoftext|>")
    assert (TOKENIZER.pad_id, TOKENIZER.end_of_text_id, TOKENIZER.end_of_turn_id) == (0, 1, 3)
    assert (TOKENIZER.mask_id, TOKENIZER.ignore_id) == (4, 5)
    assert TOKENIZER.vocab_size == 6400
    assert TOKENIZER.special_ids == frozenset(range(6))


def test_every_byte_is_in_the_vocabulary():
    singles = [i for i in range(TOKENIZER.vocab_size) if TOKENIZER.byte_lengths[i] == 1]
    assert len(singles) == 256


@settings(max_examples=300, deadline=None)
@given(awkward_text)
def test_any_text_survives_a_round_trip(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.token_bytes(ids) == len(text.encode())
    assert TOKENIZER.special_ids.isdisjoint(ids)


def test_a_lone_surrogate_is_replaced_instead_of_crashing():
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_control_tokens_are_plain_text_unless_asked_for(token):
    assert len(TOKENIZER.encode(token)) > 1
    parsed = TOKENIZER.encode(token, parse_special=True)
    assert len(parsed) == 1
    assert TOKENIZER.decode(parsed) == "" and TOKENIZER.decode(parsed, skip_special=False) == token
    assert TOKENIZER.token_bytes(parsed) == 0


def test_thinking_tags_are_one_token_each_and_stay_readable():
    ids = TOKENIZER.encode("<think>a</think><answer>b</answer>")
    assert len(ids) == 6
    assert TOKENIZER.decode(ids) == "<think>a</think><answer>b</answer>"


def test_digits_are_split_so_that_sums_can_be_learned():
    assert len(TOKENIZER.encode("90210")) == 5


def test_a_batch_is_encoded_like_its_texts_one_by_one():
    texts = ["Hello there", "", "从前有一个小女孩", "<|im_end|>"]
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_it_can_be_pickled_for_worker_processes():
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert copy.encode("a <|pad|> b") == TOKENIZER.encode("a <|pad|> b")
    assert copy.fingerprint == TOKENIZER.fingerprint


def test_saving_and_loading_changes_nothing(tmp_path):
    TOKENIZER.save(tmp_path / "saved")
    for path in (tmp_path / "saved", tmp_path / "saved" / "tokenizer.json"):
        assert Tokenizer.load(path).fingerprint == TOKENIZER.fingerprint
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_fingerprint_follows_the_chat_template_too():
    assert Tokenizer(TOKENIZER.json_text, "other").fingerprint != TOKENIZER.fingerprint


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="No tokenizer at"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_control_tokens_is_refused():
    description = json.loads(TOKENIZER.json_text)
    description["added_tokens"] = []
    for token in SPECIAL_TOKENS:
        del description["model"]["vocab"][token]
    with pytest.raises(UserError, match="no <|pad|>"):
        Tokenizer(json.dumps(description), "")


def test_the_documented_command_reproduces_the_shipped_tokenizer_byte_for_byte(tmp_path):
    run(TrainTokenizerSettings(output_dir=str(tmp_path)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (ASSETS / name).read_bytes()


def test_training_on_a_users_text_learns_its_words(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"text": "zyzzyva loves zyzzyva and zyzzyva"}\n' * 5, encoding="utf-8")
    run(TrainTokenizerSettings(output_dir=str(tmp_path / "out"), input=(str(file),), vocab_size=300))
    mine = Tokenizer.load(tmp_path / "out")
    assert mine.vocab_size <= 300
    assert len(mine.encode("zyzzyva")) < len(TOKENIZER.encode("zyzzyva"))
    assert mine.decode(mine.encode("anything 世界")) == "anything 世界"


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match="266"):
        train_tokenizer(["text"], 200, tmp_path)
    with pytest.raises(UserError, match="266"):
        run(TrainTokenizerSettings(output_dir=str(tmp_path), vocab_size=10))


@pytest.mark.parametrize(
    ("name", "least"),
    [("pretrain_en_val.jsonl", 3.3), ("pretrain_zh_val.jsonl", 2.1), ("sft_mini_512.jsonl", 3.0)],
)
def test_real_text_takes_few_tokens(name, least):
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not beside this checkout")
    lines = (SHARED / name).read_text(encoding="utf-8").splitlines()[:300]
    rows = [json.loads(line) for line in lines]
    texts = [r["text"] if "text" in r else "\n".join(m["content"] for m in r["conversations"]) for r in rows]
    tokens = sum(map(len, TOKENIZER.encode_batch(texts)))
    assert sum(len(text.encode()) for text in texts) / tokens > least
