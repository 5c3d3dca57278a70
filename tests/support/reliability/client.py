"""A client over one kept connection; httpx would take as long for a request as the server does."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any, Self

OCTETS = "application/octet-stream"

LOST = (OSError, HTTPException)
"""What a request raises when its server has gone: whether it was carried out is unknown."""


class RefusedError(Exception):
    """The server answered, but not as it should."""


@dataclass(frozen=True)
class Answer:
    """A response; the names of its headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, which is JSON."""
        return json.loads(self.body)

    def text(self) -> str | None:
        """The text of a streamed completion; None where there is no such task.

        Raises RefusedError where the answer is another, or the stream broke off.
        """
        if self.status == 404:
            return None
        events = [line.removeprefix(b"data: ") for line in self.body.split(b"\n\n") if line]
        if self.status != 200 or events[-1:] != [b"[DONE]"]:
            raise RefusedError(f"{self.status} {self.body[-400:]!r}")
        return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])

    @property
    def revision(self) -> int:
        """The revision of the registry that the answer names."""
        return int(self.headers["x-polyrex-revision"])


_KEPT_SECONDS = 2.0
"""How long a connection may be idle: a server closes it after five seconds (uvicorn's default)."""


class Client:
    """One connection to a server. Not for several threads at once."""

    def __init__(self, port: int, key: str | None = None, timeout: float = 60) -> None:
        """`key`: an API key."""
        self._connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
        self._used = 0.0
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] = {},
    ) -> Answer:
        """Send one request and read the whole answer. Raises LOST."""
        if time.monotonic() - self._used > _KEPT_SECONDS:
            self.close()  # the next request opens a new one
        try:
            self._connection.request(method, path, body, self._headers | dict(headers))
            response = self._connection.getresponse()
            answer = response.read()
        except LOST:
            self.close()
            raise
        self._used = time.monotonic()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, answer)

    def put(self, name: str, router: bytes, headers: Mapping[str, str] = {}) -> Answer:
        """Register a task, or give it a new version."""
        return self.send("PUT", f"/v1/tasks/{name}", router, {"content-type": OCTETS, **headers})

    def post(self, path: str, body: object, headers: Mapping[str, str] = {}) -> Answer:
        """Send JSON."""
        sent = {"content-type": "application/json", **headers}
        return self.send("POST", path, json.dumps(body).encode(), sent)

    def complete(
        self, task: str, tokens: int, prompt: list[int], headers: Mapping[str, str] = {}
    ) -> Answer:
        """A greedy completion by a task, streamed. Raises LOST."""
        body = {
            "task": task,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        return self.post("/v1/completions", body, headers)
