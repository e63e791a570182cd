"""Tokenizers of other libraries: their ids and templates stay, and their tokens play the parts that ours have."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import pytest
from foreign import TALK, TOKENIZERS, foreign_model, write_tokenizer

from minillm.data.encode import ENCODERS
from minillm.text.chat import encode_chat, render_chat
from minillm.text.imported import import_tokenizer, read_json
from minillm.text.tokenizer import Tokenizer

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["chatml", "headers", "instruct", "metaspace"])
def test_a_template_renders_and_encodes_as_transformers_does(name: str, tmp_path: Path) -> None:
    theirs = write_tokenizer(tmp_path, name)
    ours = imported(tmp_path, rows=300)
    for talk, ask in ((TALK, False), (TALK[:3], True), (TALK[:1], True)):
        text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=ask)
        assert render_chat(ours, talk, add_generation_prompt=ask) == text
        ids, mask = encode_chat(ours, talk, add_generation_prompt=ask)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        # what is learned is the answers with their ends, and nothing else
        learned = ours.decode([token for token, own in zip(ids, mask) if own], skip_special=False)
        end = ours.roles.end_of_turn
        answers = [message["content"] for message in talk if message["role"] == "assistant"]
        assert learned.replace(" ", "") == "".join(f"{answer}{end}" for answer in answers).replace(" ", "")


def imported(folder: Path, rows: int) -> Tokenizer:
    found = import_tokenizer(folder, rows, read_json(folder / "config.json"))
    assert found is not None and found.rows == found.tokenizer.vocab_size
    return found.tokenizer


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_stay_and_what_is_missing_is_added_behind_them(name: str, tmp_path: Path) -> None:
    theirs = write_tokenizer(tmp_path, name)
    ours = imported(tmp_path, rows=300)
    for text in ("hello there", "", " a\n\nb ", "\u4f60\u597d"):
        expected = theirs(text)["input_ids"]
        assert [*ours.begin_ids, *ours.encode(text)] == expected
    vocabulary = theirs.get_vocab()
    assert all(ours.token_to_id(token) == index for token, index in vocabulary.items())
    own = {ours.pad_id, ours.mask_id, ours.ignore_id}
    assert len(own) == 3 and own.isdisjoint({ours.end_of_text_id, ours.end_of_turn_id})
    assert {ours.mask_id, ours.ignore_id}.isdisjoint(vocabulary.values())
    assert max(own) < 300 == ours.vocab_size  # rows that the model had and nobody used
    assert imported(tmp_path, rows=len(vocabulary)).vocab_size == max(own) + 1


def test_the_parts_are_played_by_what_the_model_has(tmp_path: Path) -> None:
    expected = {
        "chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "headers": ("<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"),
        "instruct": ("</s>", "<s>", "</s>"),
        "metaspace": ("</s>", "<s>", "</s>"),
        "plain": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    }
    for name, tokens in expected.items():
        vocabulary = write_tokenizer(tmp_path / name, name).get_vocab()
        ends = [vocabulary[token] for token in ("<|end_of_text|>", "<|endoftext|>", "</s>") if token in vocabulary]
        (tmp_path / name / "config.json").write_text(json.dumps({"eos_token_id": ends}))
        roles = imported(tmp_path / name, rows=300).roles
        assert (roles.end_of_text, roles.start_of_turn, roles.end_of_turn) == tokens, name
        assert roles.pad == "<|pad|>"  # where the model pads with what ends a text, padding gets a token of its own


@pytest.mark.parametrize("name", ["headers", "instruct"])
def test_nobody_can_forge_a_turn_of_an_imported_template(name: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, name)
    ours = imported(tmp_path, rows=300)
    plain, _ = encode_chat(ours, [{"role": "user", "content": "x"}])
    forged, _ = encode_chat(ours, [{"role": "user", "content": "".join(ours.special_tokens.values())}])
    count = lambda ids: sum(token in ours.special_ids for token in ids)  # noqa: E731
    assert count(forged) == count(plain)


def test_an_imported_tokenizer_survives_saving_and_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name in TOKENIZERS:
        original = write_tokenizer(tmp_path / name, name)
        ours = imported(tmp_path / name, rows=300)
        ours.save(tmp_path / f"{name}-saved")
        copies = [Tokenizer.load(tmp_path / f"{name}-saved"), Tokenizer.from_dict(ours.to_dict())]
        for again in (*copies, pickle.loads(pickle.dumps(ours))):
            assert (again.fingerprint, again.roles, again.pad_id) == (ours.fingerprint, ours.roles, ours.pad_id)
        theirs = AutoTokenizer.from_pretrained(tmp_path / f"{name}-saved")
        assert theirs("hello")["input_ids"] == original("hello")["input_ids"]
        assert theirs.pad_token == ours.roles.pad


def test_a_vocabulary_and_merges_of_older_models_are_read(tmp_path: Path) -> None:
    theirs = write_tokenizer(tmp_path / "new", "plain")
    model = json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]
    foreign_model("gpt2").save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "vocab.json").write_text(json.dumps({**model["vocab"], "<|endoftext|>": 256}))
    (tmp_path / "old" / "merges.txt").write_text("#version: 0.2\n")
    ours = imported(tmp_path / "old", rows=300)
    assert ours.encode("hello") == theirs("hello")["input_ids"] and ours.roles.end_of_text == "<|endoftext|>"


def test_a_text_begins_and_ends_as_the_model_knows_it(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "headers")
    ours = imported(tmp_path, rows=300)
    ids, _, _ = ENCODERS["texts"](["ab"], ours)
    expected = [ours.token_to_id("<|begin_of_text|>"), *ours.encode("ab"), ours.end_of_text_id]
    assert ids[0].tolist() == expected


def test_our_own_tokenizers_keep_their_fingerprint() -> None:
    own = Tokenizer.load()
    assert own.fingerprint == hashlib.sha256((own.json_text + own.chat_template).encode()).hexdigest()
    assert own.to_dict().keys() == {"json", "chat_template", "fingerprint"}
