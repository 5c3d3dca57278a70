"""What the routes work with: built once in app.py, reached through a dependency."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from polyrex.adapters.registry import TaskRegistry

from .admission import Gate, Readiness
from .config import ServerConfig
from .engines.base import Engine
from .fitting import Fitter
from .intuition import PromptIntuition
from .metrics import Metrics
from .text import Tokenizer


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
