"""Assembles the HTTP application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.registry import TaskRegistry
from polyrex.server.config import ServerConfig
from polyrex.server.engines.base import Engine
from polyrex.server.requests.admission import Gate, Readiness
from polyrex.server.requests.fitting import Fitter
from polyrex.server.requests.metrics import Metrics
from polyrex.server.requests.prepare import RequestPreparer
from polyrex.server.requests.prompt_routing import PromptIntuition
from polyrex.server.requests.text import Tokenizer

from .auth import Authentication
from .context import AppContext
from .error_handlers import install_error_handlers
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
    """Build the application around an engine; the application's lifespan starts and stops it.

    A request passes, outermost first: the count of answers, the limit on headers, the API keys,
    the limit on the body, the routes.
    """
    gate = Gate(config.max_in_flight)
    text = Tokenizer(tokenizer)
    context = AppContext(
        config=config,
        engine=engine,
        registry=registry,
        tokenizer=text,
        preparer=RequestPreparer(config.model, registry, text, engine, intuition),
        metrics=Metrics(engine, registry, gate),
        gate=gate,
        readiness=Readiness(),
        fitter=Fitter(config.model, registry, config.fit_device),
    )
    app = FastAPI(
        title="polyrex", version=version("polyrex"), lifespan=_lifespan, redirect_slashes=False
    )
    app.state.context = context
    for routes in (openai, tasks, fit, health):
        app.include_router(routes.router)
    install_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limit=config.max_body_bytes)
    if config.api_key_digests:
        app.add_middleware(Authentication, digests=config.api_key_digests)
    app.add_middleware(HeaderLimit, config=config)
    app.add_middleware(CountAnswers, counter=context.metrics.http_requests)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    """Start the engine in the background, so that the health routes answer meanwhile."""
    context: AppContext = app.state.context
    starting = asyncio.create_task(_start(context))
    try:
        yield
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await context.engine.stop()


async def _start(context: AppContext) -> None:
    try:
        await context.engine.start()
    except Exception as error:
        logger.exception("the engine failed to start")
        context.readiness.failure = error
    context.readiness.settled.set()
