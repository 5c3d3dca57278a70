"""The server as a process: its socket, its signals, how it ends."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from polyrex.server.admission.gate import Readiness
from polyrex.server.config import ServerConfig
from polyrex.server.errors import EngineRestarting, EngineStopped, StartError
from polyrex.server.http.deadlines import RunningRequests
from polyrex.server.http.hosts import is_loopback

from .connections import Connections
from .protocol import ConnectionConfig

if TYPE_CHECKING:  # they import torch, and the port is bound before that
    from polyrex.server.engines.base import Engine

_BACKLOG = 2048
_SEND_BUFFER = 256 << 10
"""Bytes that the kernel takes ahead of a client that reads slowly, instead of megabytes. Linux
doubles it."""
_LAST_WORDS_SECONDS = 0.5
"""What is left, after the drain, to tell clients that their requests have ended."""
_FORCED_SECONDS = 1.8
"""After the second signal, the process ends in any case."""
_ENGINE_SECONDS = 1.0
"""How often the server looks whether its engine is there."""


def check_exposure(host: str, *, keys: bool, insecure: bool) -> None:
    """Raise StartError where a server without API keys would be open to the network."""
    if not (is_loopback(host) or keys or insecure):
        raise StartError(
            f"{host} can be reached from outside, and no API key would be required: "
            "give --api-key-file FILE, or --insecure if that is meant"
        )


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket; raises StartError where the address is taken or not ours.

    It is bound before the model is loaded, so that a taken port is reported at once.
    """
    try:
        found = socket.getaddrinfo(host, port, proto=socket.IPPROTO_TCP)
        family, kind, protocol, _, address = found[0]
        # asyncio sets TCP_NODELAY only where the protocol is given as TCP; without it, an answer's
        # last packet may wait 40 ms for the client to acknowledge the first.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def run(
    app: FastAPI,
    listener: socket.socket,
    config: ServerConfig,
    ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish for a bounded time.

    `ready` is called once the engine has started. Raises StartError where it failed to start,
    EngineStopped where it ended later and is not started again: only a new process helps.
    """
    asyncio.run(_run(app, listener, config, ready))


async def _run(
    app: FastAPI,
    listener: socket.socket,
    config: ServerConfig,
    ready: Callable[[], None],
) -> None:
    readiness: Readiness = app.state.context.readiness
    engine: Engine = app.state.context.engine
    server = Server(app, config)
    gone: list[EngineStopped] = []

    async def watch() -> None:
        await readiness.settled.wait()
        if readiness.failure is None:
            # What is there now stays: Python's collector need not walk through it again and again,
            # for which requests would wait.
            gc.collect()
            gc.freeze()
            ready()
            error = await _end_of(engine)
            if not server.should_exit:  # or we have stopped it
                gone.append(error)
        server.should_exit = True

    watching = asyncio.create_task(watch())
    try:
        await server.serve(sockets=[listener])
    finally:
        watching.cancel()
        gc.unfreeze()  # or extension modules complain at the end of what was not collected
    if readiness.failure is not None:
        raise StartError(f"the engine failed to start: {readiness.failure}")
    if gone:
        raise gone[0]


async def _end_of(engine: Engine) -> EngineStopped:
    """Wait until the engine is down, and not to be started again; the error that says so."""
    while True:
        await asyncio.sleep(_ENGINE_SECONDS)
        try:
            engine.check()
        except EngineRestarting:
            continue
        except EngineStopped as error:
            return error


class Server(uvicorn.Server):
    """uvicorn's server, with deadlines for clients, and an end that tells them.

    Once it is told to stop it listens on: whoever comes gets a 503, and running requests may
    finish. Those that do not finish in time are ended with an error. uvicorn would refuse
    connections meanwhile, cut streams, and raise the signal again at the end.
    """

    def __init__(self, app: FastAPI, config: ServerConfig) -> None:
        metrics = app.state.context.metrics
        self._connections = Connections(
            config, is_open=metrics.connections, closed=metrics.connections_closed
        )
        self._running: RunningRequests = app.state.running
        self._drain_seconds = config.drain_seconds
        super().__init__(ConnectionConfig(app, config, self._connections))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are not ours
            return
        previous = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        if self.should_exit and not self.force_exit:
            # The second signal does not wait for running requests, nor for anything else.
            self.force_exit = True
            last = threading.Timer(_FORCED_SECONDS, os._exit, (1,))
            last.daemon = True
            last.start()
        self.should_exit = self._running.stopping = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)  # asyncio's is what it accepts at once

    async def on_tick(self, counter: int) -> bool:
        """End what takes too long; whether to stop. uvicorn calls it ten times a second."""
        self._connections.check_time(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, and stop."""
        self._running.stopping = True
        await self._wait_for(lambda: not self._running, self._drain_seconds)
        self._running.end_all()
        await self._wait_for(lambda: not self._running, _LAST_WORDS_SECONDS, forced=True)
        for listening in (*self.servers, *(sockets or ())):
            listening.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        connections = self.server_state.connections
        await self._wait_for(lambda: not connections, _LAST_WORDS_SECONDS, forced=True)
        for connection in list(connections):
            connection.transport.abort()
        with suppress(TimeoutError):  # whatever is left then ends with this process
            limit = _FORCED_SECONDS / 3 if self.force_exit else None
            await asyncio.wait_for(self.lifespan.shutdown(), limit)

    async def _wait_for(
        self, over: Callable[[], bool], seconds: float, *, forced: bool = False
    ) -> None:
        """Wait until it is over, for so many seconds at most; not at all where forced to exit."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not over() and loop.time() < end and (forced or not self.force_exit):
            self._connections.check_time(loop.time())
            await asyncio.sleep(0.02)
