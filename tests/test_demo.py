"""The demo data: the same everywhere, right where it can be checked, and honestly split."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from minillm.data.demo import DEFAULT_SIZE, DemoSettings, generate_demo, prompts, run
from minillm.data.demo.dice import Dice, capitalise, fill, held_out
from minillm.data.demo.stories import Report, tell
from minillm.data.demo.vocabulary import OBJECTS, article
from minillm.data.demo.world import World
from minillm.log import UserError
from minillm.text.chat import encode_chat
from minillm.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pretrain", "pretrain_val", "sft", "sft_val", "dpo", "dpo_val")
SUM = re.compile(r"(\d+) ([-+x]) (\d+) = (\d+)")


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("demo")
    generate_demo(place, size=DEFAULT_SIZE)
    return place


@pytest.fixture(scope="module")
def rows(folder) -> dict[str, list[dict]]:
    return {name: read(folder, name) for name in FILES}


def texts(row: dict) -> list[str]:
    if "text" in row:
        return [row["text"]]
    messages = row["conversations"] if "conversations" in row else [*row["chosen"], row["rejected"][-1]]
    return [message["content"] for message in messages]


def test_the_same_seed_gives_the_same_bytes_whatever_the_hash_seed(tmp_path):
    digests = set()
    for hash_seed in ("0", "7"):
        out = tmp_path / hash_seed
        code = f"from minillm.data.demo import *; run(DemoSettings(output_dir={str(out)!r}, size=64))"
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT / "src")}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        content = b"".join((out / f"{name}.jsonl").read_bytes() for name in FILES)
        digests.add(hashlib.sha256(content).hexdigest())
    assert len(digests) == 1
    generate_demo(tmp_path / "other", size=64, seed=1)
    assert read(tmp_path / "other", "sft") != read(tmp_path / "0", "sft")


def test_the_manifest_counts_what_was_written(folder, rows):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["rows"] == {name: len(rows[name]) for name in FILES}
    assert manifest["size"] == DEFAULT_SIZE == len(rows["pretrain"])


def test_the_default_size_fits_its_purpose(rows):
    tokenizer = Tokenizer.load()
    tokens = {"en": 0, "zh": 0}
    for row in rows["pretrain"]:
        tokens[row["language"]] += len(tokenizer.encode(row["text"])) + 1
    assert 210_000 < sum(tokens.values()) < 250_000  # read twice, with what follows, in 20 minutes at 700 tokens/s
    assert 0.45 < tokens["en"] / sum(tokens.values()) < 0.55
    assert 1300 < len(rows["sft"]) < 1450 and 350 < len(rows["dpo"]) < 390
    lengths = [len(encode_chat(tokenizer, row["conversations"])[0]) for row in rows["sft"]]
    assert 50 < sum(lengths) / len(lengths) < 120 and max(lengths) < 400


def test_nothing_is_said_twice(rows):
    for name in FILES:
        repeated = Counter(json.dumps([row.get(k) for k in ("text", "conversations", "chosen")]) for row in rows[name])
        assert sum(count - 1 for count in repeated.values()) < 0.01 * len(rows[name])


def test_validation_is_big_enough_and_shares_no_text_and_no_prompt_with_training(rows):
    asked = {side: set() for side in ("training", "validation")}
    for name in FILES:
        side = "validation" if name.endswith("_val") else "training"
        asked[side].update(prompt for row in rows[name] for prompt in prompts(row))
        if side == "validation":
            assert len(rows[name]) >= 40
    assert asked["training"].isdisjoint(asked["validation"])


def test_number_pairs_of_validation_never_occur_in_training(rows):
    pairs = {"training": set(), "validation": set()}
    for name in FILES:
        side = "validation" if name.endswith("_val") else "training"
        for row in rows[name]:
            for text in texts(row):
                pairs[side].update(frozenset((a, b)) for a, _, b, _ in SUM.findall(text))
    assert len(pairs["training"]) > 400 and len(pairs["validation"]) > 10
    assert pairs["training"].isdisjoint(pairs["validation"])


def test_who_meets_which_object_differs_between_training_and_validation():
    for language in ("en", "zh"):
        world = World(0, language)
        met = {side: set() for side in (False, True)}
        for side in met:
            for index in range(400):
                person, thing = world.owner_and_thing(Dice(index, side), world.people, side)
                met[side].add((person.name, thing.noun))
        assert met[False].isdisjoint(met[True])


def test_every_sum_is_right(rows):
    seen = 0
    for name in ("pretrain", "pretrain_val", "sft", "sft_val"):
        for row in rows[name]:
            for text in texts(row):
                for a, sign, b, result in SUM.findall(text):
                    value = {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign]
                    assert value == int(result), text
                    seen += 1
    assert seen > 500


def test_every_check_accepts_the_answer_it_belongs_to(rows):
    checked = 0
    for row in rows["sft"] + rows["sft_val"]:
        answer = row["conversations"][-1]["content"]
        if "check" in row:
            assert passes(row["check"], answer), row
            checked += 1
    assert checked > 0.8 * len(rows["sft"])


def passes(check: dict, answer: str) -> bool:
    if check["type"] == "number":
        return re.findall(r"\d+", answer)[-1] == check["answer"]
    return answer == check["answer"] if check["type"] == "exact" else check["answer"] in answer


def test_conversations_alternate_and_end_with_an_answer(rows):
    for row in rows["sft"] + rows["sft_val"]:
        roles = [message["role"] for message in row["conversations"]]
        roles = roles[1:] if roles[0] == "system" else roles
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(message["content"].strip() for message in row["conversations"])


def test_pairs_differ_in_the_last_answer_only(rows):
    for row in rows["dpo"] + rows["dpo_val"]:
        assert row["chosen"][:-1] == row["rejected"][:-1]
        assert row["chosen"][-1] != row["rejected"][-1]
        assert row["chosen"][-1]["role"] == row["rejected"][-1]["role"] == "assistant"
    assert {row["kind"] for row in rows["dpo"]} == {"wrong", "rude", "rambling", "language", "invented"}


def test_no_slot_and_no_bracket_is_left_over(rows):
    for name in FILES:
        for row in rows[name]:
            for text in texts(row):
                assert not re.search(r"[{}\[\]|]|  |None", text), text


def test_english_articles_fit_their_words(rows):
    for row in rows["pretrain"]:
        if row["language"] == "en":
            assert not re.search(r"\b[Aa] [aeio]\w|\b[Aa]n [bcdfgjklmnpqrstvwxyz]", row["text"]), row["text"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_answers_about_a_report_follow_from_what_happened(language):
    """Replay the sentences word by word and compare with what the generator answers."""
    world = World(0, language)
    for index in range(200):
        report = Report(world, Dice("replay", index), validation=False, events=5)
        where: dict[str, str] = {}
        for sentence in report.sentences:
            subject = min(report.people, key=lambda p: sentence.find(p.name) if p.name in sentence else 9999)
            moved = re.search(
                r"(went to|walked to|moved on to|was (?:at|in|by|on)|day (?:at|in|by|on)) the (.+)\.",
                sentence,
            )
            if language == "zh":
                moved = re.search(r"(去了|来到|走到|在)(" + "|".join(world.places) + r")。", sentence)
                moved = moved if "留在" not in sentence else None
            if moved:
                where[subject.name] = moved[2]
        for question in report.questions():
            if question.kind == "person":
                name = next(person.name for person in report.people if person.name in question.text)
                assert where[name] == question.key, report.text()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_requested_story_is_about_the_requested_person_and_object(language):
    world = World(0, language)
    for index in range(50):
        dice = Dice("story", index)
        hero = world.owner_and_thing(dice, world.children, False)
        story = tell(world, dice, False, plot="lost", hero=hero)
        assert hero[0].name in story and hero[1].noun in story


def test_a_world_is_varied(rows):
    openings = Counter(row["text"][:25] for row in rows["pretrain"])
    assert len(openings) > 0.5 * len(rows["pretrain"])
    assert len({row["kind"] for row in rows["sft"]}) >= 15
    assert len(OBJECTS) >= 40


@pytest.mark.parametrize("size", [1, 64])
def test_small_sizes_work_too(tmp_path, size):
    counts = generate_demo(tmp_path, size=size)
    assert counts["pretrain"] == size and counts["sft"] >= 16 and counts["dpo"] >= 8
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([f"{n}.jsonl" for n in FILES] + ["manifest.json"])


def test_an_impossible_size_is_refused_and_leaves_everything_alone(tmp_path):
    run(DemoSettings(output_dir=str(tmp_path), size=2))
    before = (tmp_path / "sft.jsonl").read_bytes()
    with pytest.raises(UserError, match="--size"):
        run(DemoSettings(output_dir=str(tmp_path), size=0))
    assert (tmp_path / "sft.jsonl").read_bytes() == before


def test_templates_choose_fill_and_capitalise():
    assert {fill(Dice(i), "[a|b [c|d]] {x}", x=1) for i in range(40)} == {"a 1", "b c 1", "b d 1"}
    assert capitalise('he said: "no." then "yes!" he cried. so') == 'He said: "no." Then "yes!" he cried. So'
    assert (article("owl"), article("red owl")) == ("an owl", "a red owl")
    share = sum(held_out("pair", i) for i in range(4000)) / 4000
    assert 0.1 < share < 0.15


@pytest.mark.parametrize("name", ["identity_conversations", "preference_pairs"])
def test_the_hand_written_chinese_files_are_usable(name):
    lines = (ROOT / "data/chinese" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) >= 60 and len({json.dumps(row) for row in rows}) == len(rows)
    tokenizer = Tokenizer.load()
    for row in rows:
        for key in ("conversations",) if "conversations" in row else ("chosen", "rejected"):
            assert row[key][-1]["role"] == "assistant"
            assert any(encode_chat(tokenizer, row[key])[1])
