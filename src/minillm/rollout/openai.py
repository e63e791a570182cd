"""An engine elsewhere: a server with OpenAI's completions API that takes and gives token ids, such as vLLM's.

What such a server needs stands in docs/stages.md, under Rollouts. Only models whose tokens have an order can be there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from minillm.atomic import write_atomic, write_text
from minillm.families.base import Sampling
from minillm.log import UserError, warn
from minillm.models.transformer import LanguageModel
from minillm.remote import NoReply, Server
from minillm.rollout.base import Completion
from minillm.rollout.engine import check_prompts, completion_seeds
from minillm.rollout.settings import RolloutSettings
from minillm.text.tokenizer import Tokenizer

REQUESTS = 32  # at once; the server makes batches of them
TOKEN = "token_id:"  # how vLLM writes a token where it is asked for ids
WEIGHTS = "model.safetensors"


class ServedEngine:
    """Asks a server for completions; hands it new weights as files in a folder that it reads."""

    def __init__(self, settings: RolloutSettings, tokenizer: Tokenizer, *, positions: int) -> None:
        """`positions`: the longest text that the model can read.

        Raises:
            UserError: an address that is none, no server there, or a folder without an address to say so.
        """
        if bool(settings.rollout_folder) != bool(settings.rollout_reload):
            raise UserError(
                "--rollout_folder is where new weights are written and --rollout_reload the address that makes the "
                "server read them: give both, or neither"
            )
        self.server = Server(settings.rollout_url, settings.rollout_timeout, "--rollout_url")
        self.reload = None
        if settings.rollout_reload:
            self.reload = Server(settings.rollout_reload, settings.rollout_timeout, "--rollout_reload")
        self.folder, self.tokenizer, self.positions = Path(settings.rollout_folder), tokenizer, positions
        self.name = settings.rollout_model or self._served()
        self.told = False

    def generate(
        self, prompts: Sequence[Sequence[int]], *, count: int, sampling: Sampling, before: Sequence[Sequence[int]] = ()
    ) -> list[list[Completion]]:
        """`count` completions of each prompt: see `rollout.base.Engine`. A request a prompt, many at once."""
        check_prompts(prompts, sampling, self.positions)
        if count < 1 or not prompts:
            return [[] for _ in prompts]
        seeds = completion_seeds([*before, *prompts], 1, sampling.seed)[len(before) :, 0].tolist()

        def ask(prompt: Sequence[int], seed: int) -> list[Completion]:
            reply = self._ask("/completions", self._request(prompt, count, sampling, seed))
            return self._read(reply, count, sampling)

        with ThreadPoolExecutor(min(REQUESTS, len(prompts))) as pool:
            return list(pool.map(ask, prompts, seeds))

    def update(self, model: LanguageModel) -> None:
        """Write the weights into the folder, in the form of `minillm export`, and post to the reload address.

        Raises:
            UserError: the server does not take them.
            OSError: the folder cannot be written.
        """
        if self.reload is None:
            if not self.told:
                warn(
                    "without --rollout_folder and --rollout_reload the server goes on with its own weights: what it "
                    "writes is less and less what the model in training would write"
                )
                self.told = True
            return
        self._write(model)
        try:
            self.reload.ask("", {"method": "reload_weights"})
        except NoReply as problem:
            raise UserError(f"--rollout_reload {self.reload.address}: no reply ({problem})") from problem

    def _write(self, model: LanguageModel) -> None:
        from safetensors.torch import save_file

        from minillm.convert.huggingface import hf_config
        from minillm.models.dialects import weights_to
        from minillm.models.lora import merge, unmerge, without_adapters

        if not (self.folder / "config.json").exists():
            self.tokenizer.save(self.folder)
            config = hf_config(model.config, self.tokenizer, {"architecture": "ar"})
            write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        merge(model)
        named = weights_to(without_adapters(model.state_dict()), model.config)
        weights = {key: value.cpu().contiguous() for key, value in named.items()}
        unmerge(model)
        write_atomic(self.folder / WEIGHTS, lambda path: save_file(weights, str(path), metadata={"format": "pt"}))

    def _request(self, prompt: Sequence[int], count: int, sampling: Sampling, seed: int) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.name,
            "prompt": list(prompt),
            "n": count,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            "logprobs": 1,
            # what vLLM adds to the API
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True,  # the stop tokens are those above, no others
            "return_tokens_as_token_ids": True,
        }
        if sampling.top_k:
            request["top_k"] = sampling.top_k
        if sampling.repetition_penalty != 1.0:
            request["repetition_penalty"] = sampling.repetition_penalty
        return request

    def _read(self, reply: Any, count: int, sampling: Sampling) -> list[Completion]:
        """The completions in a reply. Raises UserError for one that does not say what was asked for."""
        try:
            choices = sorted(reply["choices"], key=lambda choice: int(choice["index"]))
            read = [self._completion(choice, sampling) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.server.address}: the reply is none of a completions API that gives token ids and their "
                f"log-probabilities, as vLLM's does ({type(error).__name__}: {error})"
            ) from error
        if len(read) != count:
            raise UserError(f"{self.server.address}: {len(read)} completions came, {count} were asked for")
        return read

    def _completion(self, choice: Any, sampling: Sampling) -> Completion:
        """Raises KeyError, TypeError or ValueError where something is missing or impossible."""
        names, log_probs = choice["logprobs"]["tokens"], [float(each) for each in choice["logprobs"]["token_logprobs"]]
        if not all(str(name).startswith(TOKEN) for name in names):
            raise ValueError(f"tokens come as text, not as {TOKEN}5, so they cannot be told apart")
        tokens = [int(name[len(TOKEN) :]) for name in names]
        if not 0 < len(tokens) <= sampling.max_new_tokens or len(tokens) != len(log_probs):
            raise ValueError(f"{len(tokens)} tokens with {len(log_probs)} log-probabilities")
        if not all(0 <= token < self.tokenizer.vocab_size for token in tokens):
            raise ValueError("a token is none of this vocabulary: the server has another model")
        if not all(math.isfinite(each) and each <= 1e-3 for each in log_probs):
            raise ValueError("a log-probability is above 0 or not finite")
        reason, finished = choice["finish_reason"], tokens[-1] in sampling.stop_ids
        if reason not in ("stop", "length") or (reason == "stop") != finished:
            raise ValueError(f"finish_reason is {reason!r} and the last token {tokens[-1]}")
        return Completion(tokens, log_probs, finished)

    def _served(self) -> str:
        """The first model that the server has."""
        reply = self._ask("/models", None)
        try:
            return str(reply["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.server.address}/models names no model: give --rollout_model") from error

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        try:
            return json.loads(self.server.ask(path, body))
        except NoReply as problem:
            raise UserError(
                f"--rollout_url {self.server.address}: no reply ({problem}). Is the server there, and "
                "--rollout_timeout long enough?"
            ) from problem
        except ValueError as error:
            raise UserError(f"{self.server.address}{path}: the reply is no JSON") from error
