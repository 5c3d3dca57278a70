"""The server as a process: its socket, its signals, how it ends."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from polyrex.server.config import ServerConfig
from polyrex.server.errors import StartError
from polyrex.server.http.hosts import is_loopback
from polyrex.server.admission.gate import Readiness


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
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    """Configure uvicorn to run the application."""
    return uvicorn.Config(
        app,
        http="h11",  # unlike httptools, it bounds the memory that headers take
        h11_max_incomplete_event_size=config.max_header_bytes,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=config.drain_seconds,
    )


def run(
    app: FastAPI,
    listener: socket.socket,
    config: ServerConfig,
    ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish for a bounded time.

    `ready` is called once the engine has started. Raises StartError where it failed to start.
    """
    asyncio.run(_run(app, listener, config, ready))


async def _run(
    app: FastAPI,
    listener: socket.socket,
    config: ServerConfig,
    ready: Callable[[], None],
) -> None:
    # not through AppContext, whose module imports torch: the port is bound before that
    readiness: Readiness = app.state.context.readiness
    server = _Server(uvicorn_config(app, config))

    async def watch_start() -> None:
        await readiness.settled.wait()
        if readiness.failure is None:
            # What is there now stays: Python's collector need not walk through it again and again,
            # for which requests would wait.
            gc.collect()
            gc.freeze()
            ready()
        else:
            server.should_exit = True

    watching = asyncio.create_task(watch_start())
    try:
        await server.serve(sockets=[listener])
    finally:
        watching.cancel()
        gc.unfreeze()  # or extension modules complain at the end of what was not collected
    if readiness.failure is not None:
        raise StartError(f"the engine failed to start: {readiness.failure}")


class _Server(uvicorn.Server):
    """uvicorn's server, but it exits normally: uvicorn would raise the signal again at the end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        previous = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        # The second signal does not wait for running requests.
        self.force_exit = self.should_exit
        self.should_exit = True
