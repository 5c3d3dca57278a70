"""Answers that end when their reader does: server-sent events, and work without a stream."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import ExitStack, aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from polyrex.adapters.errors import PolyrexError
from polyrex.server.errors import ClientDisconnected, error_response
from polyrex.server.requests.generation import Piece, generate
from polyrex.server.requests.prepare import Plan

from .context import Services
from .responses import Json, Shape, usage

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away (ClientDisconnected)."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected("the client went away")
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def collect(services: Services, plan: Plan) -> list[list[Piece]]:
    """All pieces of each of a plan's choices."""
    collected: list[list[Piece]] = [[] for _ in plan.choices]
    async with aclosing(generate(services, plan)) as pieces:
        async for index, piece in pieces:
            collected[index].append(piece)
    return collected


async def stream_events(
    services: Services, plan: Plan, shape: Shape, *, include_usage: bool
) -> AsyncGenerator[Json, None]:
    """The events of a streamed answer, one for every piece that has something to show."""
    begun: set[int] = set()
    generated = 0
    counts = {"usage": None} if include_usage else {}
    async with aclosing(generate(services, plan)) as pieces:
        async for index, piece in pieces:
            generated += piece.generated
            if piece.text or piece.tokens or piece.finish_reason is not None:
                choice = shape.chunk_choice(index, piece, first=index not in begun)
                begun.add(index)
                yield shape.chunk(plan, [choice]) | counts
    if include_usage:
        yield shape.chunk(plan, []) | {"usage": usage(plan, generated)}


class EventStream(Response):
    """Server-sent events, ended by `[DONE]`, or by an error event where the answer failed.

    An error before the first event is an ordinary error response. `held` is released when all is
    done but saying so.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[Json, None], headers: dict[str, str], held: ExitStack
    ) -> None:
        super().__init__(headers=headers | {"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._held = held
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            try:
                await until_disconnect(receive, self._send_events(send))
            except ClientDisconnected:
                if not self._begun:  # a status can be counted; later there is nothing to add
                    raise

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events):
            try:
                async for event in self._events:
                    if not self._begun:
                        await self._begin(send)
                    await _send_event(send, json.dumps(event, ensure_ascii=False))
                last = "[DONE]"
            except Exception as error:
                if not self._begun:
                    raise
                if not isinstance(error, PolyrexError):
                    logger.exception("a stream failed")
                last = bytes(error_response(error).body).decode()
        self._held.close()  # whoever has read the end may ask again at once
        await _send_event(send, last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, send: Send) -> None:
        self._begun = True
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})


async def _send_event(send: Send, data: str) -> None:
    body = f"data: {data}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})
