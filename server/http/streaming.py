"""Responses that stop working when their client disconnects: event streams, and whole answers."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import ExitStack, aclosing
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from polyrex.adapters.errors import PolyrexError
from polyrex.server.errors import ClientDisconnected

from .error_handlers import error_response
from .responses import Json

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Await `work`; where the client disconnects first, cancel it and raise ClientDisconnected."""
    watched = asyncio.timeout(None)  # it cancels what is in its context, and nothing else
    watching = asyncio.create_task(_disconnected(receive, watched))
    try:
        async with watched:
            return await work
    except TimeoutError:
        if not watched.expired():
            raise  # the work's own
        raise ClientDisconnected("the client went away") from None
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _disconnected(receive: Receive, watched: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    watched.reschedule(0)  # in the past


class EventStream(Response):
    """Server-sent events that end with `[DONE]`, or with an error event where the work failed.

    An error before the first event becomes an ordinary error response. `held` (the request's place
    in the server) is released before the last event is sent.
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
                if not self._begun:  # a 499 can be counted; later, no status can follow
                    raise

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events):
            try:
                async for event in self._events:
                    if not self._begun:
                        await self._begin(send)
                    await _send_event(send, json.dumps(event, ensure_ascii=False))
            except Exception as error:
                if not self._begun:
                    raise
                if not isinstance(error, PolyrexError):
                    logger.exception("a stream failed")
                self._held.close()
                await end_with_error(send, error)
                return
        self._held.close()  # a client that reads the end may send its next request at once
        await _end(send, "[DONE]")

    async def _begin(self, send: Send) -> None:
        self._begun = True
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})


async def end_with_error(send: Send, error: Exception) -> None:
    """Send the error as the last event of a stream that has begun, in place of `[DONE]`."""
    await _end(send, bytes(error_response(error).body).decode())


async def _end(send: Send, last: str) -> None:
    await _send_event(send, last, more=False)


async def _send_event(send: Send, data: str, *, more: bool = True) -> None:
    body = f"data: {data}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": more})
