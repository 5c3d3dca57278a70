"""Who is let in: not before the engine has been started, and no more than can be served."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from polyrex.server.errors import EngineStopped, InvalidRequest, Overloaded


class Gate:
    """Counts the completions that are under way, and lets no more than a limit in."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.in_flight = 0

    @contextmanager
    def admit(self, completions: int) -> Iterator[None]:
        """Count them while the context lasts; raises Overloaded where they are too many."""
        if completions > self._limit:
            raise InvalidRequest(
                f"prompts times n may be at most {self._limit}, got {completions}", "n"
            )
        if self.in_flight + completions > self._limit:
            raise Overloaded(f"{self.in_flight} completions are under way, at most {self._limit}")
        self.in_flight += completions
        try:
            yield
        finally:
            self.in_flight -= completions


@dataclass
class Readiness:
    """Whether the engine has been started; `settled` is set when that has succeeded or failed."""

    settled: asyncio.Event = field(default_factory=asyncio.Event)
    failure: BaseException | None = None

    def check(self) -> None:
        """Raise EngineStopped unless the engine has been started."""
        if not self.settled.is_set():
            raise EngineStopped("the engine is starting")
        if self.failure is not None:
            raise EngineStopped("the engine failed to start")
