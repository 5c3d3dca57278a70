"""What the routes work with: built once in app.py, reached through a dependency."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from polyrex.adapters.files.registry import TaskRegistry
from polyrex.server.config import ServerConfig
from polyrex.server.engines.base import Engine
from polyrex.server.metrics import Metrics
from polyrex.server.requests.admission import Gate, Readiness
from polyrex.server.requests.fitting import Fitter
from polyrex.server.requests.prompt_routing import PromptIntuition
from polyrex.server.requests.text import Tokenizer


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
    fitter: Fitter
    intuition: PromptIntuition | None
    started: int = field(default_factory=lambda: int(time.time()))


async def _of_app(request: Request) -> Services:  # not async, it would run in a thread
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_of_app)]
