"""The HTTP application, put together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.registry import TaskRegistry
from polyrex.server.config import ServerConfig
from polyrex.server.engines.base import Engine
from polyrex.server.errors import install_error_handlers
from polyrex.server.metrics import Metrics
from polyrex.server.requests.admission import Gate, Readiness
from polyrex.server.requests.fitting import Fitter
from polyrex.server.requests.prompt_routing import PromptIntuition
from polyrex.server.requests.text import Tokenizer

from .auth import Authentication
from .context import Services
from .limits import BodyLimit, CountAnswers, HeaderLimit
from .routes import fit, health, openai, tasks

logger = logging.getLogger(__name__)


def create_app(
    config: ServerConfig,
    engine: Engine,
    registry: TaskRegistry,
    tokenizer: PreTrainedTokenizerBase,
    intuition: PromptIntuition | None = None,
) -> FastAPI:
    """The application over an engine that is not started yet: its lifespan starts and stops it.

    A request passes, outermost first: the count of answers, the limit on headers, the API keys,
    the limit on the body, the routes.
    """
    gate = Gate(config.max_in_flight)
    services = Services(
        config=config,
        engine=engine,
        registry=registry,
        tokenizer=Tokenizer(tokenizer),
        metrics=Metrics(engine.stats, registry, lambda: gate.in_flight),
        gate=gate,
        readiness=Readiness(),
        fitter=Fitter(config.model, registry),
        intuition=intuition,
    )
    app = FastAPI(title="polyrex", lifespan=_lifespan, redirect_slashes=False)
    app.state.services = services
    for routes in (openai, tasks, fit, health):
        app.include_router(routes.router)
    install_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limit=config.max_body_bytes)
    if config.api_key_digests:
        app.add_middleware(Authentication, digests=config.api_key_digests)
    app.add_middleware(HeaderLimit, config=config)
    app.add_middleware(CountAnswers, counter=services.metrics.http_requests)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    """Starts the engine in the background, so that the health routes answer meanwhile."""
    services: Services = app.state.services
    starting = asyncio.create_task(_start(services))
    try:
        yield
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await services.engine.stop()


async def _start(services: Services) -> None:
    try:
        await services.engine.start()
    except Exception as error:
        logger.exception("the engine failed to start")
        services.readiness.failure = error
    services.readiness.settled.set()
