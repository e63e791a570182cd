"""minillm chat: every family answers, remembers as much as fits, and shows on a terminal how it writes."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Nursery
from tiny import random_model, tiny_config
from training import environment

from minillm.checkpoint.files import save_tensors
from minillm.cli import main
from minillm.families.autoregressive import Autoregressive
from minillm.families.base import Progress
from minillm.families.diffusion import Diffusion
from minillm.families.settings import FamilyConfig
from minillm.models.candidates import Candidates
from minillm.serve.chat import BLOCK, DIM, LIKELY, NEW, Canvas, ChatSettings, pieces, visible
from minillm.serve.generate import Engine
from minillm.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load()
FAMILIES = {
    "ar": FamilyConfig("ar"),
    "diffusion": FamilyConfig("diffusion"),
    "blocks": FamilyConfig("diffusion", diffusion_block=4),
    "sdd": FamilyConfig("sdd", k_schedule=(4,)),
    "bilateral": FamilyConfig("sdd", k_schedule=(4,), denoiser="bilateral"),
}
EVERY = pytest.mark.parametrize("name", FAMILIES)
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def checkpoint(folder: Path, name: str = "ar", stage: str = "full_sft") -> str:
    """A random model of a family over the shipped tokenizer, with 64 positions."""
    family = FAMILIES[name]
    denoiser = family.denoiser if family.architecture == "sdd" else ""
    config = tiny_config(vocab_size=TOKENIZER.vocab_size, causal=name == "ar", denoiser=denoiser)
    path = folder / f"{name}.pt"
    content = {
        "model_state_dict": random_model(config).state_dict(),
        "model_config": config.to_dict(),
        "family": family.to_dict(),
        "stage": stage,
    }
    save_tensors(path, content)
    return str(path)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command with these lines on its standard input."""

    def talk(lines: str, path: str, *flags: str, count: int = 6) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return main(["chat", "--checkpoint", path, "--max_new_tokens", str(count), *flags])

    return talk


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that an AR model gets; it answers "One.", "Two.", ..."""
    seen: list[str] = []
    answers = ("One.", "Two.", "Three.", "Four.", "Five.")

    def generate(self: Any, model: Any, given: list[list[int]], sampling: Any, watch: Any = None) -> list[list[int]]:
        seen.append(TOKENIZER.decode(given[0], skip_special=False))
        tokens = TOKENIZER.encode(answers[len(seen) - 1])
        for end in range(1, len(tokens) + 1):
            watch(Progress([tokens[:end]]))
        return [tokens]

    monkeypatch.setattr(Autoregressive, "generate", generate)
    return seen


# The conversation


@EVERY
def test_the_first_answer_is_that_of_generate_and_nothing_else_is_printed(
    name: str, tmp_path: Path, talk: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path, flags = checkpoint(tmp_path, name), ["--temperature", "1", "--block_length", "4", "--seed", "5"]
    assert main(["generate", "--checkpoint", path, "--max_new_tokens", "6", "--prompt", "Hi", *flags]) == 0
    alone = capsys.readouterr().out
    assert talk("Hi\n", path, *flags) == 0
    assert capsys.readouterr().out == alone
    assert alone.strip()


def test_a_pipe_gets_its_answer_and_exit_status_0(tmp_path: Path, nursery: Nursery) -> None:
    line = f"printf 'Hi\\n' | {nursery.python} -m minillm chat --checkpoint {checkpoint(tmp_path)} --max_new_tokens 5"
    done = subprocess.run(["sh", "-c", line], capture_output=True, env=environment(), timeout=60)
    assert done.returncode == 0
    assert done.stdout.strip() and done.stdout.endswith(b"\n") and b"\x1b" not in done.stdout
    assert b"warning" not in done.stderr and b"/quit" not in done.stderr  # nobody is there to be told


def test_what_was_said_is_remembered_until_new(
    tmp_path: Path, talk: Callable[..., int], prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "Hi\n\n  \nAnd?\n/new\nAgain"  # lines without anything are no messages; the last has no end
    assert talk(lines, checkpoint(tmp_path), "--system", "Be kind") == 0
    start = "<|im_start|>system\nBe kind" + END
    first = start + USER + "Hi" + END + ASSISTANT
    assert prompts == [first, first + "One." + END + USER + "And?" + END + ASSISTANT, first.replace("Hi", "Again")]
    captured = capsys.readouterr()
    assert captured.out == "One.\nTwo.\nThree.\n"
    assert "forgotten" in captured.err


def test_quit_ends_the_chat(tmp_path: Path, talk: Callable[..., int], prompts: list[str]) -> None:
    assert talk("Hi\n/quit\nHi\n", checkpoint(tmp_path)) == 0
    assert len(prompts) == 1


def test_the_oldest_exchanges_are_dropped_where_they_do_not_fit_and_that_is_said(
    tmp_path: Path, talk: Callable[..., int], prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["red", "green", "blue", "white"]
    path = checkpoint(tmp_path)
    assert talk("\n".join(words), path, "--system", "S", count=20) == 0
    assert all(prompt.startswith("<|im_start|>system\nS" + END) for prompt in prompts)
    for number, prompt in enumerate(prompts):
        assert len(TOKENIZER.encode(prompt, parse_special=True)) + 20 <= 64
        held = [word for word in words if word in prompt]
        assert held == words[number + 1 - len(held) : number + 1]  # the newest, without a gap
    assert "red" in prompts[1] and "red" not in prompts[3]
    captured = capsys.readouterr()
    assert "the oldest exchange is forgotten: the model has 64 positions" in captured.err
    assert captured.out.splitlines() == ["One.", "Two.", "Three.", "Four."]


def test_a_message_that_never_fits_is_an_error_but_ends_no_conversation_at_a_terminal(
    tmp_path: Path,
    talk: Callable[..., int],
    prompts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, lines = checkpoint(tmp_path), "Hi\n" + "many words " * 40 + "\nGo on\n"
    assert talk(lines, path) == 1
    assert len(prompts) == 1
    assert "shorten the prompt" in capsys.readouterr().err
    prompts.clear()
    monkeypatch.setattr(sys, "stdin", Terminal(lines))
    assert main(["chat", "--checkpoint", path, "--max_new_tokens", "6"]) == 0
    assert "shorten the prompt" in capsys.readouterr().err
    assert len(prompts) == 2 and "Hi" in prompts[1] and "Go on" in prompts[1]


def test_a_chat_that_can_never_fit_does_not_begin(
    tmp_path: Path, talk: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk("", checkpoint(tmp_path), count=63) == 1
    assert "lower --max_new_tokens" in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "warned"), [("pretrain", True), ("full_sft", False), ("rlhf", False)])
def test_a_pretrained_checkpoint_answers_with_a_warning(
    stage: str, warned: bool, tmp_path: Path, talk: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk("Hi\n", checkpoint(tmp_path, stage=stage)) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert ("has not learned to answer" in captured.err) == warned


def test_every_answer_draws_afresh_and_the_seed_repeats_the_chat(
    tmp_path: Path, talk: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path, chats = checkpoint(tmp_path), []
    for seed in ("1", "1", "2"):
        assert talk("Hi\n/new\nHi\n", path, "--temperature", "2", "--top_p", "1", "--seed", seed) == 0
        chats.append(capsys.readouterr().out)
    assert chats[0] == chats[1] != chats[2]
    assert talk("Hi\n", path, "--temperature", "2", "--top_p", "1", "--seed", "1") == 0
    first = capsys.readouterr().out
    assert chats[0].startswith(first) and chats[0] != first + first


# Ctrl-C


def interrupt(monkeypatch: pytest.MonkeyPatch, family: type, seen: list[int]) -> list[str]:
    """Ctrl-C at the first answer, when these tokens are seen. The prompts come back."""
    prompts: list[str] = []

    def generate(self: Any, model: Any, given: list[list[int]], sampling: Any, watch: Any = None) -> list[list[int]]:
        prompts.append(TOKENIZER.decode(given[0], skip_special=False))
        if len(prompts) > 1:
            return [TOKENIZER.encode("Bye.")]
        watch(Progress([seen]))
        raise KeyboardInterrupt

    monkeypatch.setattr(family, "generate", generate)
    return prompts


@pytest.mark.parametrize("family", [Autoregressive, Diffusion])
@pytest.mark.parametrize("screen", [True, False], ids=["terminal", "file"])
def test_ctrl_c_stops_an_answer_and_what_is_readable_of_it_stays(
    family: type, screen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = TOKENIZER.encode("I am𠮷")[:-1]  # and half a character
    hidden = [TOKENIZER.mask_id, *TOKENIZER.encode(" later")] if family is Diffusion else []
    prompts = interrupt(monkeypatch, family, said + hidden)
    out: io.StringIO = Terminal() if screen else io.StringIO()
    monkeypatch.setattr(sys, "stdin", Terminal("Hi\nGo on\n"))
    if screen:
        lines = iter(["Hi", "Go on"])
        monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError))
    monkeypatch.setattr(sys, "stdout", out)
    path = checkpoint(tmp_path, "ar" if family is Autoregressive else "diffusion")
    assert main(["chat", "--checkpoint", path, "--max_new_tokens", "6"]) == 0
    if screen:  # what stood there before is erased, line by line
        left = [line.rsplit("\r")[-1] for line in ESCAPES.sub("", out.getvalue()).splitlines()]
        assert [line for line in left if line][-2:] == ["I am", "Bye."]
    else:
        assert out.getvalue() == "I am\nBye.\n"
    assert prompts[1] == prompts[0] + "I am" + END + USER + "Go on" + END + ASSISTANT
    assert "(stopped)" in capsys.readouterr().err


def test_ctrl_c_ends_a_command_that_nobody_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, talk: Callable[..., int]
) -> None:
    prompts = interrupt(monkeypatch, Autoregressive, TOKENIZER.encode("I am"))
    assert talk("Hi\nGo on\n", checkpoint(tmp_path)) == 130
    assert len(prompts) == 1


@pytest.mark.parametrize("end", [KeyboardInterrupt, EOFError])
def test_ctrl_c_and_ctrl_d_at_the_prompt_end_the_chat(
    end: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(prompt: str) -> str:
        raise end

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr("builtins.input", ask)
    assert main(["chat", "--checkpoint", checkpoint(tmp_path), "--max_new_tokens", "4"]) == 0


# On a terminal


def test_a_stream_prints_whole_characters_as_soon_as_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, talk: Callable[..., int]
) -> None:
    text = "雪，𠮷鑫 a"
    tokens = TOKENIZER.encode(text)
    assert len(tokens) > len(text)  # some characters are several tokens
    out, shown = Terminal(), []

    def generate(self: Any, model: Any, given: list[list[int]], sampling: Any, watch: Any = None) -> list[list[int]]:
        for end in range(1, len(tokens) + 1):
            watch(Progress([tokens[:end]]))
            shown.append(out.getvalue())
        return [tokens]

    monkeypatch.setattr(Autoregressive, "generate", generate)
    monkeypatch.setattr(sys, "stdout", out)
    assert talk("Hi\n", checkpoint(tmp_path)) == 0
    assert out.getvalue() == text + "\n"
    assert all(text.startswith(each) for each in shown) and shown[-1] == text
    assert len(set(shown)) == len(text) - text.count(" ")  # " a" is one token; every other character came alone


def test_an_answer_that_ends_in_half_a_character_is_printed_like_anywhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, talk: Callable[..., int]
) -> None:
    tokens = TOKENIZER.encode("a𠮷")[:-1]

    def generate(self: Any, model: Any, given: list[list[int]], sampling: Any, watch: Any = None) -> list[list[int]]:
        watch(Progress([tokens]))
        return [tokens]

    out = Terminal()
    monkeypatch.setattr(Autoregressive, "generate", generate)
    monkeypatch.setattr(sys, "stdout", out)
    assert talk("Hi\n", checkpoint(tmp_path)) == 0
    assert out.getvalue() == TOKENIZER.decode(tokens) + "\n"


@EVERY
def test_a_terminal_ends_with_the_same_answer_as_a_file(
    name: str, tmp_path: Path, talk: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    path, outs = checkpoint(tmp_path, name), []
    for out in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stdout", out)
        assert talk("Hi\n", path, "--temperature", "0", count=12) == 0
        outs.append(out.getvalue())
    plain, screen = outs
    assert plain.strip() and screen.endswith(visible(plain))
    assert (BLOCK in screen) == (name != "ar")  # the others are seen while they are hidden


def test_a_long_canvas_shows_the_lines_that_fit_the_terminal(
    tmp_path: Path, talk: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "20", "LINES": "5"}.items():
        monkeypatch.setenv(name, value)
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    assert talk("Hi\n", checkpoint(tmp_path, "diffusion"), "--temperature", "0", count=48) == 0
    ups = [len(run) // len("\x1b[1A\x1b[2K") for run in re.findall(r"(?:\x1b\[1A\x1b\[2K)+", out.getvalue())]
    assert max(ups) == 4  # lines that a redraw goes back, the one for the cursor included
    assert len(out.getvalue().rpartition("\x1b[2K")[2]) > 4 * 20  # the finished answer is whole


def canvas(folder: Path, name: str) -> Canvas:
    return Canvas(Engine.open(ChatSettings(checkpoint=checkpoint(folder, name), max_new_tokens=8)))


def spans(text: Any) -> list[tuple[str, str]]:
    return [(text.plain[span.start : span.end], span.style) for span in text.spans if span.start < span.end]


def test_hidden_positions_are_dim_blocks_and_new_tokens_are_highlighted(tmp_path: Path) -> None:
    display, mask = canvas(tmp_path, "diffusion"), TOKENIZER.mask_id
    old, new = TOKENIZER.encode("old"), TOKENIZER.encode(" new")
    display.tokens = [*old, mask, *new, mask]
    text = display.draw([*old, mask, *[mask] * len(new), mask], None)
    assert text.plain == f"old{BLOCK} new{BLOCK}"
    found = spans(text)
    assert [style for _, style in found if style == DIM] == [DIM, DIM]
    assert "".join(part for part, style in found if style == NEW) == " new"
    display.tokens = [*old, mask, TOKENIZER.end_of_turn_id, *new]
    assert display.draw([], None).plain == f"old{BLOCK}"  # what follows the end is no part of the answer


def test_a_hidden_position_shows_its_belief_where_that_is_likely(tmp_path: Path) -> None:
    display, mask = canvas(tmp_path, "sdd"), TOKENIZER.mask_id
    (known,), (yes,), (no,) = (TOKENIZER.encode(word) for word in ("a", "b", "c"))
    ids = [[0, 0], [no, yes], [yes, no], [TOKENIZER.ignore_id, no]]
    sure = [[1.0, 0.0], [0.1, LIKELY + 0.1], [LIKELY - 0.1, 0.1], [0.9, 0.0]]
    beliefs = Candidates(torch.tensor([ids]), torch.tensor([sure]))
    display.tokens = [known, known, mask, mask, mask]  # the first is of an earlier block, which has no beliefs
    text = display.draw(display.tokens, beliefs)
    assert text.plain == f"aab{BLOCK}{BLOCK}"
    assert {style for part, style in spans(text) if part in ("b", BLOCK)} == {DIM}


def test_half_a_character_is_a_block_and_the_rest_of_the_text_is_right(tmp_path: Path) -> None:
    display, mask = canvas(tmp_path, "diffusion"), TOKENIZER.mask_id
    tokens = TOKENIZER.encode("𠮷")
    assert len(tokens) > 1
    display.tokens = [*tokens, *tokens[:1], mask, *TOKENIZER.encode("b")]
    text = display.draw([], None).plain
    assert text == f"𠮷{BLOCK}{BLOCK}b"


def test_pieces_are_the_text_cut_at_whole_characters() -> None:
    for text in ("Once upon a time.", "雪，𠮷鑫 a\n", ""):
        tokens = TOKENIZER.encode(text)
        found = pieces(TOKENIZER, tokens)
        assert len(found) == len(tokens) and "".join(found) == text
        assert all(piece in text for piece in found)


def test_an_answer_cannot_control_the_terminal() -> None:
    text = "a\x1b[31mb\r\x9b2Jc\n\t雪\u3000"
    assert len(visible(text)) == len(text)
    assert visible(text) == "a\ufffd[31mb\ufffd\ufffd2Jc\n\t雪\u3000"
