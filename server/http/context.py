"""Everything that the routes work with: built once in app.py, injected by FastAPI."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from polyrex.server.admission.gate import Readiness
from polyrex.server.admission.places import Places
from polyrex.server.admission.quotas import TenantQuotas
from polyrex.server.config import ServerConfig
from polyrex.server.engines.base import Engine
from polyrex.server.errors import InvalidRequest
from polyrex.server.observability.metrics import Metrics
from polyrex.server.observability.tracing import Traces
from polyrex.server.registry.edits import TaskEdits
from polyrex.server.registry.principal import Principal
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.registry.tenants.directory import Directory
from polyrex.server.requests.database_calls import DatabaseCalls
from polyrex.server.requests.fitting import Fitter
from polyrex.server.requests.prepare import RequestPreparer
from polyrex.server.requests.text import Tokenizer

from .json_body import BodyReader


@dataclass(frozen=True)
class AppContext:
    """The parts of one application. Only routes read it; they pass on what is needed below.

    Whatever may ask the database goes through `reads` or `writes`, so that none of it keeps the
    event loop waiting, or the completions of tasks that are in memory.
    """

    config: ServerConfig
    engine: Engine
    registry: TaskRegistry
    reads: DatabaseCalls
    writes: DatabaseCalls
    bodies: BodyReader
    tokenizer: Tokenizer
    preparer: RequestPreparer
    metrics: Metrics
    traces: Traces | None
    places: Places
    edits: TaskEdits
    directory: Directory
    quotas: TenantQuotas
    readiness: Readiness
    fitter: Fitter
    started: int = field(default_factory=lambda: int(time.time()))

    def check_name(self, task: str) -> None:
        """Raise InvalidRequest where a new task would have the base model's name."""
        if self.is_base(task):
            raise InvalidRequest(f"{task!r} is the base model's name", "name")

    def is_base(self, task: str) -> bool:
        """Whether a task's name, with its tenant or without, is that of the base model."""
        return self.config.model in (task, task.rpartition(":")[2])


async def _of_app(request: Request) -> AppContext:  # async: FastAPI runs others in a thread
    context: AppContext = request.app.state.context
    return context


Context = Annotated[AppContext, Depends(_of_app)]


async def _asker(request: Request) -> Principal:
    principal: Principal = request.state.principal  # set by auth.py
    return principal


Asker = Annotated[Principal, Depends(_asker)]
