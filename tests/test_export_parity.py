"""The comparison that ends every export finds what differs and says where. (Whole exports: test_huggingface.py.)"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import random_model, saved, tiny_config
from torch import Tensor

from minillm.checkpoint.model import open_checkpoint
from minillm.convert.parity import PROMPTS, Expected, Prompt, compare, expectations, first_difference
from minillm.log import UserError


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Expected]:
    model = random_model(tiny_config(vocab_size=6400))
    return expectations(open_checkpoint(str(saved(tmp_path_factory.mktemp("a") / "a.pt", model))))


class Echo:
    """A runtime that says what is expected, with one answer changed."""

    name = "echo 1.0"

    def __init__(self, expected: Sequence[Expected], **changes: Any) -> None:
        self.by_ids = {tuple(each.ids): each for each in expected}
        self.by_prompt = {each.prompt.name: each for each in expected}
        self.changes = changes

    def encode(self, prompt: Prompt) -> list[int]:
        return self.changes.get("ids", {}).get(prompt.name, self.by_prompt[prompt.name].full_ids)

    def logits(self, ids: Sequence[int]) -> Tensor:
        change = self.changes.get("logits", {}).get(self.by_ids[tuple(ids)].prompt.name, lambda logits: logits)
        return change(self.by_ids[tuple(ids)].logits.clone())

    def write(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        each = self.by_ids[tuple(ids)]
        assert new_tokens == each.new_tokens
        return self.changes.get("tokens", {}).get(each.prompt.name, each.tokens)


def last(value: float) -> Any:
    def change(logits: Tensor) -> Tensor:
        logits[4, 77] += value
        return logits[2:]  # a runtime may give the last positions only

    return change


def test_prompts_are_english_and_chinese_text_and_conversations() -> None:
    for written in (lambda text: text.isascii(), lambda text: not text.isascii()):
        assert any(written(each.text) for each in PROMPTS if each.text)
        assert any(written(each.messages[0]["content"]) for each in PROMPTS if each.messages)


def test_what_is_the_same_is_said_with_its_counts(expected: list[Expected]) -> None:
    said = compare(expected, Echo(expected))
    count = sum(len(each.tokens) for each in expected)
    assert said.startswith(f"echo 1.0 reads 4 prompts into the same ids and gives the same {count} greedily") and count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": {"a Chinese conversation": [1, 2]}}, "reads a Chinese conversation otherwise: token 1 is 1"),
        ({"tokens": {"a Chinese text": []}}, "something else after a Chinese text: token 1 is missing (the end)"),
        ({"logits": {"an English text": last(0.5)}}, "other logits for an English text: at token 5 of"),
        ({"logits": {"an English text": last(float("nan"))}}, "they differ by inf"),
        ({"logits": {"an English text": lambda logits: logits[:, :-1]}}, "gives logits of shape"),
    ],
)  # fmt: skip
def test_what_differs_is_named(expected: list[Expected], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="the export is refused") as raised:
        compare(expected, Echo(expected, **changes))
    assert message in str(raised.value)


def test_rounding_is_no_difference(expected: list[Expected]) -> None:
    compare(expected, Echo(expected, logits={"an English text": last(5e-5)}))


def test_a_model_with_few_positions_reads_the_end_of_a_prompt(tmp_path: Path) -> None:
    model = random_model(tiny_config(vocab_size=6400, max_position_embeddings=12))
    for each in expectations(open_checkpoint(str(saved(tmp_path / "a.pt", model)))):
        assert each.ids == each.full_ids[-6:] and each.new_tokens == 6


def test_the_first_difference_counts_what_is_missing() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1]) == first_difference([1], [1, 2]) == 1
