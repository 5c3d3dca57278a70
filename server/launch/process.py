"""The server as a process: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from polyrex.server.config import ServerConfig
from polyrex.server.errors import StartError
from polyrex.server.requests.admission import Readiness


def check_exposure(host: str, *, keys: bool, insecure: bool) -> None:
    """Raise StartError where a server that asks for no API key would be open to the network."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not (loopback or keys or insecure):
        raise StartError(
            f"{host} can be reached from outside, and no API key would be asked for: "
            "give --api-key-file FILE, or --insecure if that is meant"
        )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises StartError where the address cannot be had.

    Bound before the model is loaded, so that a taken port is known at once.
    """
    try:
        found = socket.getaddrinfo(host, port, proto=socket.IPPROTO_TCP)
        family, kind, protocol, _, address = found[0]
        # asyncio sends at once (TCP_NODELAY) only where the socket says that it is TCP; otherwise
        # an answer's last packet may wait 40 ms for the client's acknowledgement of the first.
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
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app,
        http="h11",  # unlike httptools, it bounds the headers that it holds in memory
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
    readiness: Readiness,
    ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish for a bounded time.

    `ready` is called when the engine answers. Raises StartError where it failed to start.
    """
    asyncio.run(_run(app, listener, config, readiness, ready))


async def _run(
    app: FastAPI,
    listener: socket.socket,
    config: ServerConfig,
    readiness: Readiness,
    ready: Callable[[], None],
) -> None:
    server = _Server(uvicorn_config(app, config))

    async def watch_start() -> None:
        await readiness.settled.wait()
        if readiness.failure is None:
            ready()
        else:
            server.should_exit = True

    watching = asyncio.create_task(watch_start())
    try:
        await server.serve(sockets=[listener])
    finally:
        watching.cancel()
    if readiness.failure is not None:
        raise StartError(f"the engine failed to start: {readiness.failure}")


class _Server(uvicorn.Server):
    """uvicorn's server, which would end by the signal that stopped it; this one ends well."""

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
