"""Defects of a server under stress: a proof must find each of them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polyrex.server.engines.base import Engine, GenerationRequest, TokenChunk
from polyrex.server.errors import EngineError, EngineStopped
from support.reliability.engines import WrappedEngine

POISONED = "poisoned"
"""A body that names min_tokens ends what others have under way, and its error tells a path."""
FROZEN = "frozen"
"""Nothing else happens while the server looks at a large body, for a fifth of a second."""
HEAPING = "heaping"
"""Every request leaves memory behind; some a task, a thread and an open file as well."""
UNREAPED = "unreaped"
"""The engine goes on with what nobody waits for any more."""
BOUNDLESS = "boundless"
"""Nothing is refused, however much waits."""
FALSE_ENDS = "false ends"
"""What the engine did not finish ends as if it had."""

_LARGE = 100_000  # bytes


def plant_in_stressed_engine(engine: Engine, defects: Sequence[str]) -> Engine:
    """Wrap the engine."""
    if POISONED in defects:
        engine = PoisonedEngine(engine)
    if UNREAPED in defects:
        engine = UnreapedEngine(engine)
    if FALSE_ENDS in defects:
        engine = FalseEndsEngine(engine)
    return engine


def plant_in_stressed_app(app: FastAPI, engine: Engine, defects: Sequence[str]) -> None:
    """Break the queue, or put a broken middleware in front of the application."""
    if BOUNDLESS in defects:
        for name in ("_press", "_check"):
            setattr(app.state.context.places, name, lambda *_: None)
    if FROZEN in defects or POISONED in defects:
        app.add_middleware(LookAtBodies, poisoned=engine, defects=defects)
    if HEAPING in defects:
        app.add_middleware(Heap)


@dataclass
class PoisonedEngine(WrappedEngine):
    """Every request that is under way at a `poison` fails."""

    poisons: int = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Until there is a poison."""
        before = self.poisons
        async with aclosing(self.engine.generate(request)) as chunks:
            async for chunk in chunks:
                if self.poisons > before:
                    raise EngineError(f"the batch failed in {__file__}")
                yield chunk


@dataclass
class UnreapedEngine(WrappedEngine):
    """Finishes whatever it has begun."""

    _alone: set[asyncio.Task[None]] = field(default_factory=set)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """From a task that nobody cancels."""
        chunks: asyncio.Queue[TokenChunk | Exception] = asyncio.Queue()

        async def finish() -> None:
            try:
                async for chunk in self.engine.generate(request):
                    chunks.put_nowait(chunk)
            except Exception as error:
                chunks.put_nowait(error)

        task = asyncio.create_task(finish())
        self._alone.add(task)
        task.add_done_callback(self._alone.discard)
        while True:
            chunk = await chunks.get()
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk
            if chunk.finish_reason is not None:
                return


class FalseEndsEngine(WrappedEngine):
    """Says that it has finished where it has been stopped."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """As far as it comes."""
        begun = False
        try:
            async with aclosing(self.engine.generate(request)) as chunks:
                async for chunk in chunks:
                    begun = True
                    yield chunk
        except EngineStopped:
            if not begun:
                raise
            yield TokenChunk((), "length")


@dataclass
class LookAtBodies:
    """Looks at every body before the application does."""

    app: ASGIApp
    poisoned: Engine
    defects: Sequence[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def look() -> Message:
            message = await receive()
            body = message.get("body", b"")
            if FROZEN in self.defects and len(body) > _LARGE // 4:
                time.sleep(0.2 * min(1, len(body) / _LARGE))
            if isinstance(self.poisoned, PoisonedEngine) and b'"min_tokens"' in body:
                self.poisoned.poisons += 1
            return message

        await self.app(scope, look, send)


@dataclass
class Heap:
    """Keeps what it does not need."""

    app: ASGIApp
    kept: list[object] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            self.kept.append(os.urandom(4096))
            if len(self.kept) % 50 == 0:
                self.kept.append(asyncio.create_task(asyncio.Event().wait()))
                self.kept.append(open(os.devnull))  # noqa: SIM115  # that is the defect
        await self.app(scope, receive, send)
