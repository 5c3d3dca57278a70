"""Middleware that bounds what a client may send, before anything reads it."""

from __future__ import annotations

from collections import Counter

from starlette.datastructures import Headers, QueryParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polyrex.server.config import ServerConfig
from polyrex.server.errors import HeadersTooLarge, InvalidRequest, TooLarge
from polyrex.server.http.error_handlers import error_response

_SEVERAL = frozenset({"label"})
"""The parameters of a query that may come several times."""
_DROPPED = 16
"""How many times the body limit is read and dropped before the connection is closed."""


class HeaderLimit:
    """Refuses requests whose headers are too many or too large."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = scope["headers"]
            size = sum(len(name) + len(value) for name, value in headers)
            config = self._config
            if size > config.max_header_bytes or len(headers) > config.max_headers:
                refused = HeadersTooLarge(
                    f"at most {config.max_headers} headers of {config.max_header_bytes} bytes"
                )
                await error_response(refused)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class QueryLimit:
    """Refuses a query that has a parameter twice: which one would be meant is a guess."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["query_string"]:
            names = Counter(name for name, _ in QueryParams(scope["query_string"]).multi_items())
            twice = [name for name in names if names[name] > 1 and name not in _SEVERAL]
            if twice:
                refused = InvalidRequest(f"{twice[0]:.80} may come once", twice[0][:80])
                await error_response(refused)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Reads the whole body, whatever its Content-Length says, and refuses one that is too large."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        body = bytearray()
        received = 0
        too_large = len(declared) > 19 or (declared.isdecimal() and int(declared) > self._limit)
        more = True
        # The rest of a body that is too large is read and dropped, up to a bound: a client that is
        # still sending would otherwise see its connection break instead of the answer.
        while more and received <= _DROPPED * self._limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            received += len(message.get("body", b""))
            more = message.get("more_body", False)
            too_large = too_large or received > self._limit
            body = bytearray() if too_large else body + message.get("body", b"")
        if too_large:
            refused = TooLarge(f"the body may have at most {self._limit} bytes")
            await error_response(refused)(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body)}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)
