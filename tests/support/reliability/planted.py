"""Defects that a forked server is given on purpose: a proof must find each of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polyrex.adapters.errors import UnknownTask
from polyrex.adapters.files.task import TaskVersion
from polyrex.server.engines.base import Engine
from polyrex.server.observability.metrics import Metrics
from polyrex.server.registry.memory import follow
from polyrex.server.registry.memory.index import Index
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.registry import TaskRegistry

from .engines import UnpinnedEngine

ACKNOWLEDGED_FIRST = "acknowledged first"
"""A registration is acknowledged before it is committed."""
DEAF = "deaf"
"""The index does not follow what another replica changes."""
MUTE = "mute"
"""A change is not announced: others learn of it when they ask. No defect, but a lost NOTIFY."""
LAZY = "lazy"
"""The database is asked every six seconds alone."""
HURRIED = "hurried"
"""A request with a revision does not wait until the index has reached it."""
UNPINNED = "unpinned"
"""A request does not keep the version that it began with."""
HOARDING = "hoarding"
"""The server keeps 8 KiB of memory for each task."""
LABELLED = "labelled"
"""/metrics has a line for each task."""
SLOW = "slow"
"""The start, /metrics, the search for a task, the list of models and every commit take longer."""


def plant_in_registry(registry: TaskRegistry, defects: Sequence[str]) -> list[bytearray]:
    """Break the registry before it starts; what it shall hoard."""
    if DEAF in defects:
        registry.start = lambda: None  # type: ignore[method-assign]
    if MUTE in defects:
        registry.database._backend.announce = lambda *_: None  # type: ignore[method-assign]
    if LAZY in defects:
        follow._POLL_SECONDS = 6.0
    if SLOW in defects:
        time.sleep(8)
        _slow_down(Index, "find", 0.02)
        _slow_down(Index, "names", 0.2)
        _slow_down(registry.database._backend, "announce", 0.05)
    if HURRIED in defects:
        told = TaskRegistry.revision.fget  # type: ignore[attr-defined]
        TaskRegistry.revision = property(lambda found: max(told(found), 1 << 40))  # type: ignore[assignment, method-assign]
    return [bytearray(os.urandom(8192)) for _ in range(len(registry) if HOARDING in defects else 0)]


def _slow_down(owner: object, method: str, seconds: float) -> None:
    plain = getattr(owner, method)

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return plain(*arguments)

    setattr(owner, method, slow)


def plant_in_engine(engine: Engine, registry: TaskRegistry, defects: Sequence[str]) -> Engine:
    """Wrap the engine."""

    def current(name: str) -> TaskVersion:
        return registry.pin(OPERATOR, name)

    return UnpinnedEngine(engine, current) if UNPINNED in defects else engine


def plant_in_app(app: FastAPI, registry: TaskRegistry, defects: Sequence[str]) -> None:
    """Put a broken middleware in front of the application, or break its metrics."""
    if ACKNOWLEDGED_FIRST in defects:
        app.add_middleware(AcknowledgeFirst, registry=registry)
    metrics: Metrics = app.state.context.metrics
    if SLOW in defects:
        _slow_down(metrics, "text", 0.1)
    if LABELLED in defects:
        for name, _ in registry.models(OPERATOR, None, len(registry)):
            metrics.http_requests.labels("GET", f"/v1/tasks/{name}", "200").inc()


@dataclass
class AcknowledgeFirst:
    """Answers a PUT with the version that it will have, and carries it out a moment later."""

    app: ASGIApp
    registry: TaskRegistry
    last: dict[str, int] = field(default_factory=dict)  # version of each task, as acknowledged
    behind: asyncio.Queue[tuple[Scope, bytes]] | None = None
    worker: asyncio.Task[None] | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "PUT":
            await self.app(scope, receive, send)
            return
        if self.behind is None:
            self.behind = asyncio.Queue(maxsize=4)
            self.worker = asyncio.create_task(self._carry_out(self.behind))
        body = await _body(receive)
        name = scope["path"].rsplit("/", 1)[1]
        async with self.turn:  # versions are carried out in the order in which they were told
            version = self.last[name] = self._last(name) + 1
            await self.behind.put((scope, body))
        found = {"version": version, "router_sha256": hashlib.sha256(body).hexdigest()}
        headers = [(b"content-type", b"application/json"), (b"x-polyrex-revision", b"0")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(found).encode()})

    def _last(self, name: str) -> int:
        if name not in self.last:
            try:
                self.last[name] = self.registry.find(OPERATOR, name).last_version
            except UnknownTask:
                self.last[name] = 0
        return self.last[name]

    async def _carry_out(self, behind: asyncio.Queue[tuple[Scope, bytes]]) -> None:
        while True:
            scope, body = await behind.get()
            await asyncio.sleep(0.005)

            async def receive(body: bytes = body) -> Message:
                return {"type": "http.request", "body": body, "more_body": False}

            async def send(_message: Message) -> None:
                return

            await self.app(scope, receive, send)


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body
