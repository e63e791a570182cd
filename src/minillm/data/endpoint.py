"""Asking a model behind an OpenAI-compatible endpoint: POST {endpoint}/chat/completions, several requests at a time."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from minillm.log import UserError, warn
from minillm.remote import NoReply, Server

MOST_FAILURES = 10  # running: then the endpoint is given up

Key = TypeVar("Key", bound=Hashable)


class Reply(NamedTuple):
    """What a model said."""

    content: str
    reasoning: str  # where the server gives the thoughts apart, "" elsewhere
    finish: str  # "stop", "length", ...


class Endpoint:
    """A server's address, and the model that is asked there."""

    def __init__(self, address: str, model: str, timeout: float) -> None:
        """Raises UserError for an address that is none."""
        self.server = Server(address, timeout, "--endpoint")
        self.address, self.model = address, model

    def ask(self, request: dict[str, Any]) -> Reply:
        """One reply, after a few tries.

        Raises:
            NoReply: there was none.
            UserError: the server refuses such requests.
        """
        return _reply(self.server.ask("/chat/completions", {"model": self.model, **request}))


def _reply(text: str) -> Reply:
    """Raises NoReply for what is not a chat completion."""
    try:
        choice = json.loads(text)["choices"][0]
        message = choice["message"]
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        return Reply(str(message.get("content") or ""), str(thought), str(choice.get("finish_reason") or ""))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise NoReply(f"not a chat completion: {' '.join(text.split())[:200]}") from error


def ask_all(
    endpoint: Endpoint, requests: Iterable[tuple[Key, dict[str, Any]]], concurrency: int
) -> Iterator[tuple[Key, Reply]]:
    """The replies in the order in which they come; a request without a reply is left out, with a warning.

    Raises:
        UserError: the server refuses the first requests, or several running had no reply.
    """
    left, failures, answered = iter(requests), 0, False
    with ThreadPoolExecutor(concurrency) as pool:
        running: dict[Future[Reply], Key] = {}
        try:
            while True:
                for key, request in islice(left, concurrency - len(running)):
                    running[pool.submit(endpoint.ask, request)] = key
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    key = running.pop(future)
                    try:
                        reply = future.result()
                    except (NoReply, UserError) as problem:
                        if isinstance(problem, UserError) and not answered:
                            raise  # a wrong name or key: no request will do better
                        failures += 1
                        warn(f"{endpoint.address}: no reply ({problem})")
                        if failures >= MOST_FAILURES:
                            raise UserError(
                                f"{endpoint.address} gave no reply to {failures} requests running ({problem}). Replies "
                                "until now are kept: the same command goes on where it was"
                            ) from problem
                        continue
                    failures, answered = 0, True
                    yield key, reply
        finally:
            for future in running:
                future.cancel()
