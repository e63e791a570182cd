"""minillm chat: a conversation in the terminal. An ordered family streams its tokens; the others are watched while
they reveal their canvas. Answers go to standard output, everything that is said about them to standard error.

N tokens of the canvas, K candidates of a position.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

from minillm.log import UserError, info, warn
from minillm.serve.generate import Engine, WriteSettings

if TYPE_CHECKING:
    from rich.text import Text

    from minillm.families.base import Progress
    from minillm.models.candidates import Candidates
    from minillm.text.chat import Message
    from minillm.text.tokenizer import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of bytes that are no whole character (yet)
BLOCK = "\N{LIGHT SHADE}"  # a hidden position
DIM, NEW = "dim", "bold green"
LIKELY = 0.3  # a belief at least so sure is shown instead of a block


@dataclass(frozen=True, kw_only=True)
class ChatSettings(WriteSettings):
    """Chat with a checkpoint"""


class Conversation:
    """What has been said, as far as the model's positions hold it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.exchanges: list[list[Message]] = []  # a user's turn and its answer, oldest first

    def prompt(self, text: str) -> list[int]:
        """The token ids to answer `text` from. The oldest exchanges are dropped until they and the answer fit.

        Raises:
            UserError: `text` does not fit by itself; nothing is dropped then.
        """
        for dropped in range(len(self.exchanges) + 1):
            past = [message for exchange in self.exchanges[dropped:] for message in exchange]
            tokens = self.engine.chat_prompt([*past, {"role": "user", "content": text}])
            if len(tokens) <= self.engine.room:
                break
        else:
            self.engine.check_length(len(tokens))
        if dropped:
            del self.exchanges[:dropped]
            limit = self.engine.opened.model.config.max_position_embeddings
            what = "exchange is" if dropped == 1 else f"{dropped} exchanges are"
            info(f"(the oldest {what} forgotten: the model has {limit} positions)")
        return tokens

    def remember(self, text: str, answer: str) -> None:
        self.exchanges.append([{"role": "user", "content": text}, {"role": "assistant", "content": answer}])


class Display:
    """Follows one answer while it is written, and shows nothing of it."""

    def __init__(self, engine: Engine) -> None:
        self.tokenizer, self.sampling = engine.opened.tokenizer, engine.sampling
        self.ordered = engine.family.ordered
        self.tokens: list[int] = []  # [N], the last that was seen
        self.printed = 0  # characters of the answer that stand in the terminal already

    def live(self) -> AbstractContextManager[Any]:
        """What has to be open while the answer is written."""
        return nullcontext()

    def see(self, progress: Progress) -> None:
        self.tokens = list(progress.tokens[0])

    def readable(self) -> list[int]:
        """The beginning that is written already: up to the first hidden position, or to the end."""
        if self.ordered:
            return self.tokens
        ends = {self.tokenizer.mask_id, *self.sampling.stop_ids}
        return list(takewhile(lambda token: token not in ends, self.tokens))


class Stream(Display):
    """Prints each character as soon as its last token is there."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.read = 0  # tokens that are printed

    def see(self, progress: Progress) -> None:
        super().see(progress)
        text = self.tokenizer.decode(self.tokens[self.read :])
        if text.endswith(INCOMPLETE):
            return
        self.read = len(self.tokens)
        self.printed += len(text)
        sys.stdout.write(visible(text))
        sys.stdout.flush()


class Canvas(Display):
    """Redraws the answer at every step; the last lines where it is longer than the terminal."""

    def __init__(self, engine: Engine) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(engine)
        self.console = Console(file=sys.stdout, highlight=False)
        # Transient: the finished answer is printed in its place, whole and without colours.
        self.screen = Live(console=self.console, auto_refresh=False, transient=True)

    def live(self) -> AbstractContextManager[Any]:
        return self.screen

    def see(self, progress: Progress) -> None:
        from rich.text import Text

        before = self.tokens
        super().see(progress)
        lines = self.draw(before, progress.candidates).wrap(self.console, self.console.width)
        self.screen.update(Text("\n").join(lines[-max(1, self.console.height - 1) :]), refresh=True)

    def draw(self, before: Sequence[int], candidates: Candidates | None) -> Text:
        """Blocks or beliefs where hidden, highlighted where not in `before`; what follows a stop token is left out."""
        from rich.text import Text

        shown = list(takewhile(lambda token: token not in self.sampling.stop_ids, self.tokens))
        text, mask = Text(), self.tokenizer.mask_id
        for hidden, group in groupby(enumerate(shown), key=lambda pair: pair[1] == mask):
            run = list(group)
            if hidden:
                for position, _ in run:
                    text.append(self._belief(position, candidates), DIM)
                continue
            for (position, token), piece in zip(run, pieces(self.tokenizer, [token for _, token in run])):
                old = position < len(before) and before[position] == token
                # A character whose other tokens are still hidden is hidden itself.
                text.append(visible(piece).replace(INCOMPLETE, BLOCK), "" if old else NEW)
        return text

    def _belief(self, position: int, candidates: Candidates | None) -> str:
        """The most probable token of a hidden position where it is likely, else a block."""
        if candidates is None:
            return BLOCK
        # Candidates are those of the block under way, which is the end of the canvas.
        place = position - len(self.tokens) + candidates.tokens.shape[1]
        best = int(candidates.probabilities[0, place].argmax()) if place >= 0 else 0
        if place < 0 or float(candidates.probabilities[0, place, best]) < LIKELY:
            return BLOCK
        text = visible(self.tokenizer.decode([int(candidates.tokens[0, place, best])]))
        return BLOCK if not text or INCOMPLETE in text else text


def pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text. A character of several tokens comes with its last, the others add nothing."""
    result, first = [], 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[first:end])
        if text.endswith(INCOMPLETE) and end < len(tokens):
            result.append("")
        else:
            result.append(text)
            first = end
    return result


def visible(text: str) -> str:
    """Without control characters, which could recolour or clear a terminal; as many characters as before."""
    return "".join(INCOMPLETE if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def reply(conversation: Conversation, text: str, turn: int) -> None:
    """Print the answer to `text` and remember both. Ctrl-C stops an answer to somebody at a terminal; what is
    readable of it stays.

    Raises:
        UserError: `text` is too long for the model.
        KeyboardInterrupt: nobody sits at the terminal, so it is the whole input that should end.
    """
    engine = conversation.engine
    prompt = conversation.prompt(text)
    # The first answer is what `minillm generate` writes; the following ones draw afresh.
    sampling = replace(engine.sampling, seed=engine.sampling.seed + turn)
    terminal, stopped = sys.stdout.isatty(), False
    display = (Stream if engine.family.ordered else Canvas)(engine) if terminal else Display(engine)
    with display.live():
        try:
            tokens = engine.family.generate(engine.opened.model, [prompt], sampling, display.see)[0]
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            tokens, stopped = display.readable(), True
    answer = engine.opened.tokenizer.decode(tokens)
    if stopped:
        answer = answer.rstrip(INCOMPLETE)  # Ctrl-C came between the tokens of a character
    rest = answer[display.printed :]
    sys.stdout.write((visible(rest) if terminal else rest) + "\n")
    sys.stdout.flush()
    if stopped:
        info("(stopped)")
    if answer or not stopped:
        conversation.remember(text, answer)


def read_line() -> str:
    """The next line of standard input. Somebody at a terminal is asked for it.

    Raises:
        EOFError: there is none.
        UserError: it is not text.
    """
    try:
        if sys.stdin.isatty() and sys.stdout.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401  (input() then edits the line and knows the earlier ones)
            return input("> ")
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not {error.encoding} text: {error.reason}") from error
    if not line:
        raise EOFError
    return line.rstrip("\n")


def run(settings: ChatSettings) -> None:
    """Answer lines of standard input until it ends, or /quit. /new forgets what was said.

    Raises:
        UserError: the checkpoint cannot be used, or an input that nobody types has a line that is too long.
    """
    engine = Engine.open(settings)
    engine.check_length(len(engine.chat_prompt([{"role": "user", "content": ""}])))
    if engine.opened.stage == "pretrain":
        warn(f"{settings.checkpoint} was only pretrained: it has not learned to answer (minillm sft teaches that)")
    interactive, turn = sys.stdin.isatty(), 0
    if interactive:
        info("/new forgets the conversation, /quit ends it; Ctrl-C stops an answer.")
    conversation = Conversation(engine)
    while True:
        try:
            line = read_line()
        except (EOFError, KeyboardInterrupt):
            if interactive:
                info("")  # the shell's prompt gets a line of its own
            return
        if line.strip() == "/quit":
            return
        if line.strip() == "/new":
            conversation = Conversation(engine)
            info("(forgotten)")
        elif line.strip():
            try:
                reply(conversation, line, turn)
            except UserError as error:
                if not interactive:
                    raise
                info(f"error: {error}")
            turn += 1
