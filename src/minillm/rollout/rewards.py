"""Rewards of completions: texts in, numbers out. A function that raises, hangs or returns nonsense never stops a run.

N completions.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minillm.log import UserError, info, warn
from minillm.rollout.worker import MATH, Failure, Worker
from minillm.text.answers import as_number, final_answer, has_format, is_right, marked_answer
from minillm.text.ngrams import repetition

if TYPE_CHECKING:
    from minillm.checkpoint.reward import RewardModel
    from minillm.text.tokenizer import Tokenizer

Function = Callable[[str, str, str], "float | Failure"]  # of (prompt, completion, answer)
Tokens = tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]  # of prompts and of completions
BUILT_IN = ("math", "number", "format", "length", "repetition", "model")
GRAMMAR = "NAME, NAME:ARGUMENT, NAME=WEIGHT or NAME:ARGUMENT=WEIGHT"


class RewardResult(NamedTuple):
    """Rewards of N completions."""

    total: np.ndarray  # float32 [N]: the weighted sum; 0 where a function failed
    parts: dict[str, np.ndarray]  # of each function, float32 [N], without its weight; NaN where it failed
    failed: np.ndarray  # bool [N]: leave these out of a group's mean and deviation, and give them advantage 0


class RewardSpec(NamedTuple):
    """One of the words behind --reward."""

    name: str  # a built-in one, "model", or the user's module
    argument: str  # behind the first colon
    weight: float

    @property
    def title(self) -> str:
        """What metrics call it: the built-in's or the user's function's name."""
        return self.name if self.name in BUILT_IN else self.argument


def parse_reward(text: str) -> RewardSpec:
    """`NAME[:ARGUMENT][=WEIGHT]`: `math`, `format=0.2`, `length:0-256=0.1`, `module:function`, `model:CHECKPOINT=2`.
    The weight is what follows the last equals sign.

    Raises:
        UserError: the text is none of these.
    """
    body, equals, weight_text = text.rpartition("=")
    if not equals:
        body, weight_text = text, "1"
    try:
        weight = float(weight_text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0.0:
        raise UserError(f"--reward {text}: the weight behind the last = is not a number other than 0")
    name, colon, argument = body.partition(":")
    if not name or (colon and not argument):
        raise UserError(f"--reward {text}: give {GRAMMAR}")
    if name in ("math", "number", "format", "repetition") and colon:
        raise UserError(f"--reward {text}: {name} takes no argument; a weight is written {name}={argument}")
    if name in ("length", "model") and not colon:
        what = "a range of tokens, such as length:0-256" if name == "length" else "a checkpoint, model:PATH"
        raise UserError(f"--reward {text}: {name} needs {what}")
    if name not in BUILT_IN and not colon:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"--reward {text}: there is no built-in {name!r}.{hint} Built in: {', '.join(BUILT_IN)}; a function of "
            "your own is module:function"
        )
    return RewardSpec(name, argument, weight)


class RewardFunctions:
    """The functions named by `--reward`."""

    def __init__(
        self, texts: Sequence[str], tokenizer: Tokenizer, *, timeout: float = 10.0, device: str = "cpu"
    ) -> None:
        """Open them.

        Args:
            texts: as `parse_reward` reads them.
            tokenizer: of the completions; lengths and repetition are counted in its tokens.
            timeout: seconds that one call of a user's function, or of math-verify, may take.
            device: of a reward model.

        Raises:
            UserError: a name that does not exist, two that are alike, a module or checkpoint that cannot be opened.
        """
        self.specs = [parse_reward(text) for text in texts]
        if not self.specs:
            raise UserError("no reward: give --reward, such as --reward math format=0.2")
        titles = [spec.title for spec in self.specs]
        for title in titles:
            if titles.count(title) > 1:
                raise UserError(f"--reward: {title} is there twice; their weights can be added up")
        self.tokenizer, self.worker = tokenizer, Worker(timeout)
        self.told: set[tuple[str, str]] = set()
        self.model = next((self._open_model(spec, device) for spec in self.specs if spec.name == "model"), None)
        self.functions = {spec.title: self._open(spec) for spec in self.specs if spec.name != "model"}

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        answers: Sequence[str],
        *,
        tokens: Tokens | None = None,
    ) -> RewardResult:
        """Judge N completions (as text, without the stop token) of N prompts whose right answers are `answers`.

        `tokens`: the prompts and the completions as token ids, for a reward model; without them it reads the texts.
        """
        total = np.zeros(len(completions), dtype=np.float32)
        failed = np.zeros(len(completions), dtype=np.bool_)
        parts = {}
        for spec in self.specs:
            if spec.name == "model":
                values = self._ask_model(spec, tokens or self._encoded(prompts, completions), completions)
            else:
                values = self._judge(spec, prompts, completions, answers)
            parts[spec.title] = values
            failed |= np.isnan(values)
            total += np.float32(spec.weight) * values
        total[failed] = 0.0
        return RewardResult(total, parts, failed)

    def close(self) -> None:
        """End the worker process, if there is one."""
        self.worker.close()

    def _judge(
        self, spec: RewardSpec, prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]
    ) -> np.ndarray:
        """One function's values, float32 [N]; NaN where it failed."""
        function = self.functions[spec.title]
        values = np.empty(len(completions), dtype=np.float32)
        for row, texts in enumerate(zip(prompts, completions, answers, strict=True)):
            try:
                value = function(*texts)
            except Exception as error:
                value = Failure(type(error).__name__, str(error))
            if isinstance(value, Failure):
                self._tell(spec, value, texts[1])
                value = math.nan
            values[row] = value
        return values

    def _ask_model(self, spec: RewardSpec, tokens: Tokens, completions: Sequence[str]) -> np.ndarray:
        """The reward model's values, float32 [N]; NaN where it has none."""
        assert self.model is not None
        try:
            values = self.model(*tokens).numpy()
        except Exception as error:  # a text that is too long for it, say
            values = np.full(len(completions), np.nan, dtype=np.float32)
            self._tell(spec, Failure(type(error).__name__, str(error)), completions[0] if completions else "")
        values[~np.isfinite(values)] = np.nan
        if np.isnan(values).any():
            row = int(np.isnan(values).argmax())
            self._tell(spec, Failure("no number", "the reward model's value is not finite"), completions[row])
        return values  # type: ignore[no-any-return]

    def _encoded(self, prompts: Sequence[str], completions: Sequence[str]) -> Tokens:
        encode = self.tokenizer.encode_batch
        return encode(prompts, parse_special=True), encode(completions)

    def _open_model(self, spec: RewardSpec, device: str) -> RewardModel:
        from minillm.checkpoint.reward import open_reward_model

        model = open_reward_model(spec.argument, device=device)
        if model.tokenizer.json_text != self.tokenizer.json_text:
            raise UserError(
                f"--reward model:{spec.argument} was trained with another tokenizer than the model to train: it would "
                "read other texts than are written"
            )
        return model

    def _tell(self, spec: RewardSpec, failure: Failure, completion: str) -> None:
        """Once for each function and kind of failure."""
        if (spec.title, failure.kind) not in self.told:
            self.told.add((spec.title, failure.kind))
            warn(
                f"the reward {spec.title} failed ({failure.kind}: {failure.detail}); what fails so counts as a failed "
                f"sample and is not mentioned again. The completion was: {completion[:200]!r}"
            )

    def _open(self, spec: RewardSpec) -> Function:
        if spec.name == "math":
            return self._math()
        if spec.name == "number":
            return lambda prompt, completion, answer: float(same_number(completion, answer))
        if spec.name == "format":
            return lambda prompt, completion, answer: float(has_format(completion))
        if spec.name == "length":
            low, high = length_range(spec.argument)
            return lambda prompt, completion, answer: length_reward(self._tokens(completion), low, high)
        if spec.name == "repetition":
            return lambda prompt, completion, answer: -repetition(self.tokenizer.encode(completion))
        return self._user(f"{spec.name}:{spec.argument}")

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _math(self) -> Function:
        """is_right settles numbers and equal texts; math-verify, where it is installed, is asked about the rest. It
        takes seconds to start, so that waits until there is something to ask."""
        if importlib.util.find_spec("math_verify") is None:
            info("[reward] math compares exact numbers and texts; for formulas: pip install 'minillm-trainer[rl]'")
            return lambda prompt, completion, answer: float(is_right(completion, answer))

        def judge(prompt: str, completion: str, answer: str) -> float | Failure:
            if is_right(completion, answer):
                return 1.0
            found = final_answer(completion)
            if as_number(marked_answer(answer) or answer) is not None and (not found or as_number(found) is not None):
                return 0.0  # two numbers that differ, or nothing that could be one
            return self.worker.call(MATH, prompt, completion, answer)

        return judge

    def _user(self, function: str) -> Function:
        failure = self.worker.open(function)
        if failure:
            raise UserError(
                f"--reward {function} cannot be imported ({failure.kind}: {failure.detail}). It is module:function, "
                "the module in this folder or installed"
            )
        return lambda prompt, completion, answer: self.worker.call(function, prompt, completion, answer)


def same_number(completion: str, answer: str) -> bool:
    """is_right for numbers alone: an answer that is no number is never met."""
    return as_number(marked_answer(answer) or answer) is not None and is_right(completion, answer)


def length_range(text: str) -> tuple[int, int]:
    """`100` or `50-200`: (least, most) tokens. Raises UserError for anything else."""
    low, dash, high = text.partition("-")
    if not (low.isascii() and low.isdigit() and (high.isascii() and high.isdigit() if dash else True)):
        raise UserError(f"--reward length:{text}: give a number of tokens, or a range such as length:0-256")
    least, most = int(low), int(high or low)
    if least > most or most == 0:
        raise UserError(f"--reward length:{text}: the range is empty")
    return least, most


def length_reward(tokens: int, least: int, most: int) -> float:
    """1 within the range; below it tokens / least; above it falling to 0 at twice the most."""
    if tokens < least:
        return tokens / least
    return 1.0 if tokens <= most else max(0.0, 2.0 - tokens / most)
