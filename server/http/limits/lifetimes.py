"""Middleware that ends every request in time: by its deadline, or when the server stops.

A request is ended as `asyncio.timeout` ends what it guards: its task is cancelled, whatever it is
waiting for, so that it frees what it holds. Only then does its client get the error: as an answer,
or as the last event of a stream that has begun.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polyrex.server.errors import InvalidRequest, ServerError
from polyrex.server.http.deadlines import Lifetime, RunningRequests, seconds_allowed, stopping
from polyrex.server.http.error_handlers import error_response
from polyrex.server.http.streaming import EventStream, end_with_error

_WHILE_STOPPING = frozenset({"/livez", "/metrics"})
"""What is still answered once the server is stopping; /readyz is not, for it is not ready."""


class Lifetimes:
    """Refuses requests once the server is stopping, and ends those that have taken too long."""

    def __init__(self, app: ASGIApp, running: RunningRequests, limit: float) -> None:
        """`limit`: seconds from a request's last byte to its answer's."""
        self._app = app
        self._running = running
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._running.stopping and scope["path"] not in _WHILE_STOPPING:
            await error_response(stopping())(scope, receive, send)
            return
        try:
            seconds = seconds_allowed(Headers(scope=scope), self._limit)
        except InvalidRequest as error:
            await error_response(error)(scope, receive, send)
            return
        lifetime = scope.setdefault("state", {})["lifetime"] = Lifetime()
        answer = _Answer(send)
        with self._running.entered(lifetime):
            try:
                async with lifetime.timeout:
                    received = _clocked(scope, receive, lifetime, seconds)
                    await self._app(scope, received, answer.send)
            except TimeoutError:
                if not lifetime.timeout.expired():
                    raise  # somebody else's
                assert lifetime.reason is not None
                await answer.end(lifetime.reason, scope, receive)


def _clocked(scope: Scope, receive: Receive, lifetime: Lifetime, seconds: float) -> Receive:
    """`receive`, but the request's time begins once its body is there."""

    async def clocked() -> Message:
        message = await receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            scope["state"]["deadline"] = lifetime.begin(seconds)
        return message

    return clocked


class _Answer:
    """What has been sent of a request's answer, and how to end it with an error."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = False
        self._is_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._is_stream = kind.startswith(EventStream.media_type.encode())
        await self._send(message)

    async def end(self, error: ServerError, scope: Scope, receive: Receive) -> None:
        """Send the error. A body that has begun and is no stream stays as it is, cut short."""
        if not self._begun:
            await error_response(error)(scope, receive, self._send)
        elif self._is_stream:
            await end_with_error(self._send, error)
