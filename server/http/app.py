"""Assembles the HTTP application."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version

from fastapi import FastAPI
from transformers import PreTrainedTokenizerBase

from polyrex.server.admission.gate import Readiness
from polyrex.server.admission.places import Places
from polyrex.server.admission.quotas import TenantQuotas
from polyrex.server.config import ServerConfig
from polyrex.server.engines.base import Engine
from polyrex.server.errors import StorageError
from polyrex.server.observability.loop_lag import LoopLag
from polyrex.server.observability.metrics import Metrics
from polyrex.server.observability.tracing import Traces, traces_from
from polyrex.server.registry.edits import TaskEdits
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.registry.tenants.directory import Directory
from polyrex.server.requests.database_calls import DatabaseCalls
from polyrex.server.requests.fitting import Fitter
from polyrex.server.requests.prepare import RequestPreparer
from polyrex.server.requests.prompt_routing import PromptIntuition
from polyrex.server.requests.text import Tokenizer

from .access import check_declared
from .auth import Guard
from .context import AppContext
from .deadlines import RunningRequests
from .error_handlers import install_error_handlers
from .json_body import BodyReader
from .limits.lifetimes import Lifetimes
from .limits.sizes import BodyLimit, HeaderLimit, QueryLimit
from .openapi.document import describe
from .request_log import RequestLog
from .routes import fit, health, lora, openai, tasks, tenants, versions

logger = logging.getLogger(__name__)

_PURGE_SECONDS = 3600
_MOST_READS = 1024  # more than there are completions, whose routers may have to be read
_MOST_WRITES = 256  # each holds a body


def create_app(
    config: ServerConfig,
    engine: Engine,
    registry: TaskRegistry,
    tokenizer: PreTrainedTokenizerBase,
    intuition: PromptIntuition | None = None,
    traces: Traces | None = None,
) -> FastAPI:
    """Build the application around an engine and a registry; its lifespan starts and stops both.

    Traces go where the environment says, if not to `traces`.

    A request passes, outermost first: the request log, the limit on its time, that on headers, the
    guard (API keys and roles), the limits on the query and on the body, the routes.
    """
    places = Places(config, engine)
    readiness = Readiness()
    traces = traces or traces_from(os.environ)
    directory = Directory(registry.database)
    registry.on_change(directory.follow)
    text = Tokenizer(tokenizer)
    reads, writes = DatabaseCalls(_MOST_READS), DatabaseCalls(_MOST_WRITES)
    context = AppContext(
        config=config,
        engine=engine,
        registry=registry,
        reads=reads,
        writes=writes,
        bodies=BodyReader(),
        tokenizer=text,
        preparer=RequestPreparer(config.model, registry, reads, text, engine, intuition),
        metrics=Metrics(config.model, engine, registry, places, readiness),
        traces=traces,
        places=places,
        edits=TaskEdits(registry),
        directory=directory,
        quotas=TenantQuotas(directory),
        readiness=readiness,
        fitter=Fitter(config.model, registry, reads, writes, config.fit_device, config.fit_seconds),
    )
    app = FastAPI(
        title="polyrex", version=version("polyrex"), lifespan=_lifespan, redirect_slashes=False
    )
    app.state.context = context
    app.state.running = RunningRequests()
    for routes in (openai, tasks, versions, lora, fit, tenants, health):
        app.include_router(routes.router)
    check_declared(app.routes)
    describe(app, keys=bool(config.api_key_digests))
    install_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limit=config.max_body_bytes)
    app.add_middleware(QueryLimit)
    app.add_middleware(Guard, config=config, directory=directory)
    app.add_middleware(HeaderLimit, config=config)
    app.add_middleware(Lifetimes, running=app.state.running, limit=config.request_seconds)
    app.add_middleware(
        RequestLog, metrics=context.metrics, registry=registry, traces=context.traces
    )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    """Start the engine in the background, so that the health routes answer meanwhile."""
    context: AppContext = app.state.context
    context.registry.start()
    starting, stopping = asyncio.create_task(_start(context)), asyncio.Event()
    purging = asyncio.create_task(_purge(context, stopping))
    measuring = asyncio.create_task(LoopLag(context.metrics.loop_lag).run())
    try:
        yield
    finally:
        starting.cancel()
        measuring.cancel()
        stopping.set()  # and not cancelled: its thread may have the database in use
        await asyncio.gather(starting, measuring, purging, return_exceptions=True)
        await context.engine.stop()
        await asyncio.to_thread(_close, context)


def _close(context: AppContext) -> None:
    context.bodies.close()
    context.preparer.close()
    for calls in (context.reads, context.writes):
        calls.close()
    if context.traces is not None:
        context.traces.close()
    context.registry.close()


async def _start(context: AppContext) -> None:
    try:
        await context.engine.start()
    except Exception as error:
        logger.exception("the engine failed to start")
        context.readiness.failure = error
    context.readiness.settled.set()


async def _purge(context: AppContext, stopping: asyncio.Event) -> None:
    """Delete for good, every hour, what was dropped long ago."""
    kept = context.registry.config.retention_days * 24 * 3600
    while not stopping.is_set():
        try:
            await context.writes.run(context.edits.purge, time.time() - kept)
        except StorageError as error:
            logger.warning("dropped tasks are not purged: %s", error)
        except Exception:  # this purge is not the last one
            logger.exception("dropped tasks are not purged")
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), _PURGE_SECONDS)
