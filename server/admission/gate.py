"""Admission: nobody before the engine has started, and no more completions than a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from polyrex.server.errors import EngineStopped, InvalidRequest, Overloaded


class Gate:
    """Counts the completions under way and admits no more than a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0

    @contextmanager
    def admit(self, completions: int) -> Iterator[None]:
        """Count completions as under way while the context lasts.

        Raises Overloaded where there is no room now, InvalidRequest where there never is.
        """
        if completions > self.limit:
            raise InvalidRequest(
                f"prompts times n may be at most {self.limit}, got {completions}", "n"
            )
        if self.in_flight + completions > self.limit:
            raise Overloaded(f"too many completions are under way, at most {self.limit}")
        self.in_flight += completions
        try:
            yield
        finally:
            self.in_flight -= completions


@dataclass
class Readiness:
    """Whether the engine has started; `settled` is set once that has succeeded or failed."""

    settled: asyncio.Event = field(default_factory=asyncio.Event)
    failure: BaseException | None = None

    def check(self) -> None:
        """Raise EngineStopped unless the engine has started."""
        if not self.settled.is_set():
            raise EngineStopped("the engine is starting")
        if self.failure is not None:
            raise EngineStopped("the engine failed to start")
