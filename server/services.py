"""What the routes work with: built once in app.py, reached through a dependency."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from polyrex.adapters.registry import TaskRegistry

from .config import ServerConfig
from .engines.base import Engine
from .errors import EngineStopped, InvalidRequest, Overloaded
from .metrics import Metrics
from .text import Tokenizer


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


@dataclass(frozen=True)
class Services:
    """Everything that a route may need."""

    config: ServerConfig
    engine: Engine
    registry: TaskRegistry
    tokenizer: Tokenizer
    metrics: Metrics
    gate: Gate
    readiness: Readiness
    started: int = field(default_factory=lambda: int(time.time()))


def _of_app(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_of_app)]
