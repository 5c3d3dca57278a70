"""A connection of the server: uvicorn's, with an end to whatever a client may leave open.

uvicorn waits for ever for the rest of a request, and for a client to read its answer. Here each of
these has a deadline. One tick of the server looks at all connections, so that a request costs no
timer. httptools, which parses, puts no bound on headers: they are counted as they arrive.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from enum import Enum, auto
from functools import partial
from typing import Any, cast

import httptools
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from polyrex.server.config import ServerConfig
from polyrex.server.errors import (
    HeadersTooLarge,
    InvalidRequest,
    ReceiptTimeout,
    ServerError,
    TooManyConnections,
)
from polyrex.server.http.error_handlers import error_response

from .connections import Connections

_BRIEF_SECONDS = 1.0
"""What a connection beyond the limits has to ask for the server's health."""
_LINGER_SECONDS = 1.0
"""How long what a client still sends is dropped after its connection's last answer. Closed at once,
TCP would reset the connection, and the answer could be lost."""
_SLOWEST_BODY = 1024.0  # bytes a second
_MOST_PIPELINED = 16
_HEALTH = frozenset({"/livez", "/readyz"})


class ConnectionConfig(uvicorn.Config):
    """uvicorn's settings, with ours, and all connections of one server."""

    def __init__(self, app: FastAPI, limits: ServerConfig, connections: Connections) -> None:
        super().__init__(
            app,
            http=HttpConnection,
            loop="asyncio",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=connections.accepted_at_once,
        )
        self.limits = limits
        self.connections = connections


class _Receiving(Enum):
    """What of a request is being received."""

    nothing = auto()
    headers = auto()
    body = auto()
    refused = auto()  # whatever comes is dropped


class HttpConnection(HttpToolsProtocol):
    """One client's connection."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, ConnectionConfig)
        self._limits = config.limits
        self._all = config.connections
        self._lasting = True  # within the limits of connections
        self._receiving = _Receiving.nothing
        self._since = 0.0  # when what is being received began
        self._due = math.inf  # when it must be there
        self._received = 0  # bytes of it
        self._answering: RequestResponseCycle | None = None
        self._wrong: ServerError | None = None  # why the parser was stopped
        self._last_words: ServerError | None = None  # said once the answer under way has ended
        self._unsent = 0  # bytes at the last look
        self._read = 0.0  # when the client last read something, or had nothing to read
        self._closing = False  # the last answer has been written

    @property
    def address(self) -> str:
        return self.client[0] if self.client else ""

    # What asyncio calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._read = self.loop.time()
        self._lasting = self._all.add(self)
        if self._lasting:
            self._due = self._read + self._limits.header_seconds
        else:
            self._due = self._read + _BRIEF_SECONDS
            self.app = partial(_health_alone, self.app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.remove(self)
        self.pipeline.clear()
        super().connection_lost(exc)
        # uvicorn tells only the request that came last.
        if self._answering is not None and not self._answering.response_complete:
            _disconnect(self._answering)

    def data_received(self, data: bytes) -> None:
        if self._receiving is _Receiving.refused:
            return
        if self._receiving is _Receiving.nothing:
            self._begin(_Receiving.headers, self._limits.header_seconds)
        self._received += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.cycle.keep_alive = False  # answered as if no upgrade had been asked for
        except httptools.HttpParserError:
            self._refuse("invalid", self._wrong or InvalidRequest("this is no HTTP request"))
        else:
            if self._receiving is not _Receiving.headers:
                return
            if self._received > self._limits.max_header_bytes:
                self._refuse("invalid", self._headers_too_large())
            elif self.parser.get_method() == b"PRI":  # the parser would wait for the rest of it
                self._refuse("invalid", InvalidRequest("HTTP/2 is not spoken here, HTTP/1.1 is"))

    def resume_writing(self) -> None:
        self._read = self.loop.time()
        super().resume_writing()

    # What the parser calls. An error raised here stops it.

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._receiving is _Receiving.body:
            return  # a trailer: the request has been judged, and is under way, without it
        super().on_header(name, value)
        if len(self.headers) > self._limits.max_headers:
            self._wrong = self._headers_too_large()
            raise self._wrong

    def on_headers_complete(self) -> None:
        if self.parser.get_http_version() == "1.1" and _count(self.headers, b"host") != 1:
            self._wrong = InvalidRequest("send one Host header")
            raise self._wrong
        if len(self.pipeline) == _MOST_PIPELINED:
            self._wrong = InvalidRequest("too many requests before an answer to the first")
            raise self._wrong
        super().on_headers_complete()
        self.cycle.transport = _Outlet(self, self.cycle)  # type: ignore[assignment]
        if not self._lasting:
            self.cycle.keep_alive = False
        self._begin(_Receiving.body, self._limits.body_seconds)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._receiving = _Receiving.nothing
        self._due = math.inf
        if self._answering is None or self._answering.response_complete:
            self._due = self.loop.time() + self._limits.keep_alive_seconds

    # What the answers call.

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        # As uvicorn's, but without a timer for each request.
        assert self._answering is not None
        cast(_Outlet, self._answering.transport).flush()
        self.server_state.total_requests += 1
        if self._closing:
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._last_words is not None:
            self._say(self._last_words)
        elif self._receiving is _Receiving.nothing:
            self._due = self.loop.time() + self._limits.keep_alive_seconds

    # What the server calls.

    def check_time(self, now: float) -> None:
        """End what has taken too long by `now`, seconds of the event loop's clock."""
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self._unsent:
            self._read = now
        self._unsent = unsent
        if now - self._read > self._limits.write_seconds:
            self._all.closing("write")
            self.abort()
        elif now >= self._due or self._body_is_slow(now):
            self._too_late()

    def abort(self) -> None:
        """Close without waiting for what is unsent; a request under way is told, and ends."""
        self.transport.abort()

    def close_softly(self) -> None:
        """Close once everything is sent, and the client has been heard out for a moment.

        Where it has sent whole requests there is nothing to wait for.
        """
        self._closing = True
        self._last_words = None
        self.pipeline.clear()
        if self._receiving is _Receiving.nothing:
            self.transport.close()
        else:
            self._receiving = _Receiving.refused
            self._due = self.loop.time() + _LINGER_SECONDS
            try:
                self.transport.write_eof()
            except OSError:  # the client has reset the connection, and we have not seen it yet
                self.abort()

    def _begin(self, part: _Receiving, seconds: float) -> None:
        self._receiving = part
        self._received = 0
        self._since = self.loop.time()
        due = self._since + seconds
        self._due = due if self._lasting else min(self._due, due)

    def _body_is_slow(self, now: float) -> bool:
        if self._receiving is not _Receiving.body:
            return False
        seconds = now - self._since - self._limits.header_seconds
        return seconds > 0 and self._received < seconds * _SLOWEST_BODY

    def _too_late(self) -> None:
        if self._receiving is _Receiving.nothing:
            self._all.closing("idle")
            self.transport.close()
        elif self._receiving is _Receiving.refused:
            self.abort()
        elif self.flow.read_paused:  # it is we who are slow
            self._begin(self._receiving, self._limits.header_seconds)
        else:
            error = ReceiptTimeout("the rest of the request did not come in time")
            self._refuse(self._receiving.name, error)

    # How a request ends of which the application knows nothing, or not all.

    def _refuse(self, reason: str, error: ServerError) -> None:
        """Answer what is being received with an error, after the answers before it; then close."""
        self._all.closing(reason)
        body, self._receiving = self._receiving is _Receiving.body, _Receiving.refused
        self._due = math.inf
        if body and self.cycle.response_complete:  # it was answered early, as with 401
            self.close_softly()
            return
        if body:
            _disconnect(self.cycle)
            if self.cycle is not self._answering:
                self.pipeline.popleft()
        earlier = self._answering if self._answering is not self.cycle or not body else None
        if earlier is not None and not earlier.response_complete:
            self._last_words = error
        else:
            self._say(error)

    def _say(self, error: ServerError) -> None:
        response = error_response(error)
        headers = [*self.server_state.default_headers, *response.raw_headers]
        headers = [header for header in headers if header[0] != b"connection"]
        headers.append((b"connection", b"close"))
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        status = STATUS_LINE[response.status_code]
        self.transport.write(status + lines + b"\r\n" + bytes(response.body))
        self.close_softly()

    def _headers_too_large(self) -> HeadersTooLarge:
        most, size = self._limits.max_headers, self._limits.max_header_bytes
        return HeadersTooLarge(f"at most {most} headers of {size} bytes")


class _Outlet:
    """Where one answer is written: a transport whose connection closes softly.

    The answer's head waits for the first of its body, so that both are one call of the system.
    """

    def __init__(self, connection: HttpConnection, cycle: RequestResponseCycle) -> None:
        self.is_closing = connection.transport.is_closing
        self._connection = connection
        self._write = connection.transport.write
        self._cycle = cycle
        self._head: bytes | None = None  # empty once it is written

    def write(self, data: bytes) -> None:
        """Write a part of the answer."""
        if not self._cycle.response_started:  # it is 100 Continue
            self._write(data)
        elif self._head is None:
            self._head = data
        elif self._head:
            self._write(self._head + data)
            self._head = b""
        else:
            self._write(data)

    def flush(self) -> None:
        """Write a head to which no body has come."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Close the connection, once everything is sent."""
        self.flush()
        self._connection.close_softly()


async def _health_alone(app: Any, scope: Scope, receive: Receive, send: Send) -> None:
    """The application of a connection beyond the limits."""
    if scope["path"] in _HEALTH:
        await app(scope, receive, send)
    else:
        refused = TooManyConnections("too many connections are open: close some, or come again")
        await error_response(refused)(scope, receive, send)


def _disconnect(cycle: RequestResponseCycle) -> None:
    """Tell a request that its client is gone."""
    cycle.disconnected = True
    cycle.message_event.set()


def _count(headers: Sequence[tuple[bytes, bytes]], wanted: bytes) -> int:
    return sum(1 for name, _ in headers if name == wanted)
