"""The outermost middleware: every request has an id, and every answer is counted and logged."""

from __future__ import annotations

import logging
import re
import time
import uuid
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polyrex.server.errors import InvalidRequest
from polyrex.server.observability.metrics import Metrics
from polyrex.server.observability.requests import (
    RequestRecord,
    RequestTrace,
    Value,
    begin_request,
    end_request,
)
from polyrex.server.observability.tracing import Traces
from polyrex.server.registry.registry import TaskRegistry

from .error_handlers import error_response

logger = logging.getLogger(__name__)
access_log = logging.getLogger("polyrex.access")

HEADER = "x-request-id"
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})
_ASKED_ALL_THE_TIME = frozenset({"/livez", "/readyz", "/metrics"})
_PARENTS = frozenset({b"traceparent", b"tracestate"})
_NAMES = {status.value: status.name.lower() for status in HTTPStatus}
_NOBODY_READS = 499


class RequestLog:
    """Takes or makes a request's id, and records what was answered, unexpected errors included.

    Ids are for people: they are shown in answers, logs and traces, and nothing depends on them.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, registry: TaskRegistry, traces: Traces | None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._registry = registry
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value.decode("latin-1") for name, value in _headers(scope, _OWN)]
        valid = len(given) == 1 and _ID.fullmatch(given[0]) is not None
        record = RequestRecord(
            id=given[0] if valid else uuid.uuid4().hex,
            state=scope.setdefault("state", {}),
            trace=self._begin_trace(scope),
        )
        exchange = _Exchange(scope, receive, send, record, self._metrics)
        token = begin_request(record)
        try:
            await exchange.run(self._app if valid or not given else error_response(_WRONG_ID))
        finally:
            self._finish(exchange, record)
            end_request(token)

    def _begin_trace(self, scope: Scope) -> RequestTrace | None:
        if self._traces is None:
            return None
        parents = {
            name.decode(): value.decode("latin-1") for name, value in _headers(scope, _PARENTS)
        }
        return self._traces.begin(_labels(scope)[0], parents)

    def _finish(self, exchange: _Exchange, record: RequestRecord) -> None:
        """Count, log and trace a request that is over."""
        status = exchange.status or _NOBODY_READS
        if record.error is None and status >= 400:
            record.error = _NAMES.get(status, "client_disconnected")
        method, route = _labels(exchange.scope)
        self._metrics.finished(record)
        if record.trace is not None:
            about = _about(record, method, route, status, self._registry.revision)
            # That a client is wrong is no error of the server; in a stream, there is no status.
            failed = status < 400 or status >= 500
            record.trace.end(about, record.error if failed else None)
        quiet = route in _ASKED_ALL_THE_TIME and status < 400
        level = logging.DEBUG if quiet else logging.INFO
        if access_log.isEnabledFor(level):
            fields: dict[str, Value] = {
                "method": method,
                "route": route,
                "status": status,
                "seconds": round(time.perf_counter() - record.begun, 6),
                "bytes": exchange.size,
            }
            if record.error is not None:
                fields["error"] = record.error
            access_log.log(level, "%s %s %d", method, route, status, extra={"fields": fields})


class _Exchange:
    """One request and its answer, as they pass."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, record: RequestRecord, metrics: Metrics
    ) -> None:
        self.scope = scope
        self.status = 0  # none yet
        self.size = 0  # bytes of the answer's body
        self._receive = receive
        self._send = send
        self._record = record
        self._metrics = metrics

    async def run(self, app: ASGIApp) -> None:
        """Let the application answer; where it fails unexpectedly, answer that."""
        try:
            await app(self.scope, self.receive, self.send)
        except Exception as error:
            if self.status:  # too late for another answer: the connection is closed
                raise
            logger.exception("a request failed")
            await error_response(error)(self.scope, self.receive, self.send)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._record.received = time.perf_counter()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._metrics.http_requests.labels(*_labels(self.scope), self.status).inc()
            own = (HEADER.encode(), self._record.id.encode())
            message = {**message, "headers": [*message["headers"], own]}
        else:
            self.size += len(message.get("body", b""))
        await self._send(message)


_OWN = frozenset({HEADER.encode()})
_WRONG_ID = InvalidRequest(f"{HEADER}: one, of 1 to 64 letters, digits, '.', '_' and '-'", HEADER)


def _headers(scope: Scope, names: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    return [header for header in scope["headers"] if header[0] in names]


def _labels(scope: Scope) -> tuple[str, str]:
    """Method and route; clients choose method and path, and neither may make a label of its own."""
    method = scope["method"] if scope["method"] in _METHODS else "other"
    return method, getattr(scope.get("route"), "path", "none")


def _about(
    record: RequestRecord, method: str, route: str, status: int, revision: int
) -> dict[str, Value]:
    """What a trace says of a request."""
    about: dict[str, Value] = {
        "http.request.method": method,
        "http.route": route,
        "http.response.status_code": status,
        "polyrex.request_id": record.id,
        "polyrex.registry.revision": revision,
    }
    for name, value in record.fields().items():
        if name in ("tenant", "task", "version"):
            about[f"polyrex.{name}"] = value
    return about
