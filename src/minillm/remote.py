"""JSON to a server and back, with time-outs and a few tries. What is behind the address is the caller's business."""

from __future__ import annotations

import http.client
import json
import os
import time
from typing import Any
from urllib.parse import urlsplit

from minillm.log import UserError

TRIES = 4  # of a request that the server was too busy for, or that did not arrive
FIRST_PAUSE = 1.0  # seconds; doubled with every try
BUSY = (408, 409, 429, 500, 502, 503, 504)


class NoReply(Exception):
    """A request that failed, and why."""


class Server:
    """An address. A key in OPENAI_API_KEY is sent along."""

    def __init__(self, address: str, timeout: float, flag: str) -> None:
        """`timeout`: seconds that a reply may take. Raises UserError, naming the flag, for an address that is none."""
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{flag} {address}: give an address such as http://127.0.0.1:8000/v1")
        self.address, self.timeout, self.parts = address, timeout, parts

    def ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        """The text of the reply to POST {address}{path} with a body as JSON, or to GET without one.

        Raises:
            NoReply: there was none, after a few tries.
            UserError: the server refuses such requests.
        """
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
            try:
                status, text = self._send(path, body)
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if 200 <= status < 300:
                return text
            problem = f"HTTP {status}: {' '.join(text.split())[:200]}"
            if status not in BUSY:
                raise UserError(f"{self.address}{path} refuses the request ({problem})")
        raise NoReply(problem)

    def _send(self, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
        secure = self.parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self.parts.hostname or "", self.parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        try:
            place = self.parts.path.rstrip("/") + path
            data = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", place, data, headers)
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        finally:
            connection.close()
