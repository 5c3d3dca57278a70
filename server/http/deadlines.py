"""How long a request may take: as long as the server allows, or less where its client says so."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers

from polyrex.server.errors import DeadlineExceeded, InvalidRequest, ServerError, ShuttingDown

_HEADERS = {"x-polyrex-timeout": 1.0, "x-envoy-expected-rq-timeout-ms": 1e-3}
"""The headers in which a client, or a proxy in front of it, says how long it will wait; each with
its unit in seconds."""
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")


@dataclass(frozen=True)
class Deadline:
    """A moment at which a request must have ended."""

    at: float  # of time.monotonic

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline so many seconds from now."""
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds until then; 0 once it has passed."""
        return max(0.0, self.at - time.monotonic())


def seconds_allowed(headers: Headers, limit: float) -> float:
    """The least of `limit` seconds and what the headers name.

    Raises InvalidRequest where a header names something else than a number above 0.
    """
    for name, unit in _HEADERS.items():
        value = headers.get(name)
        if value is not None:
            if _NUMBER.fullmatch(value) is None or not float(value):
                raise InvalidRequest(f"{name} must be a number above 0, got {value!r:.40}", name)
            limit = min(limit, float(value) * unit)
    return limit


class Lifetime:
    """The time that one request has left. Routes find it in `request.state.lifetime`."""

    def __init__(self) -> None:
        self.timeout = asyncio.timeout(None)
        self.reason: ServerError | None = None

    def begin(self, seconds: float) -> Deadline:
        """Give the request so many seconds from now on, instead of what it had."""
        self.reason = DeadlineExceeded(f"the request took longer than {seconds:g} s")
        self.timeout.reschedule(asyncio.get_running_loop().time() + seconds)
        return Deadline.after(seconds)

    def end(self, reason: ServerError) -> None:
        """End the request now, if it is still under way."""
        if not self.timeout.expired():
            self.reason = reason
            self.timeout.reschedule(asyncio.get_running_loop().time())


class RunningRequests:
    """The requests under way, and whether the server takes more of them."""

    def __init__(self) -> None:
        self.stopping = False
        self._lifetimes: set[Lifetime] = set()

    def __len__(self) -> int:
        return len(self._lifetimes)

    def end_all(self) -> None:
        """End all of them with ShuttingDown."""
        for lifetime in self._lifetimes:
            lifetime.end(stopping())

    @contextmanager
    def entered(self, lifetime: Lifetime) -> Iterator[None]:
        """Count a request among them while the context lasts."""
        self._lifetimes.add(lifetime)
        try:
            yield
        finally:
            self._lifetimes.discard(lifetime)


def stopping() -> ShuttingDown:
    """The error of requests that a server refuses, or ends, because it is stopping."""
    return ShuttingDown("the server is shutting down")
