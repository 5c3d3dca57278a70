"""A reserved port is for the process that is told of it, and for nobody else."""

from __future__ import annotations

import socket

from polyrex.server.launch.process import bind
from support.reliability.ports import reserved_port


def test_a_reserved_port_can_be_served_by_name_alone() -> None:
    with reserved_port() as port:
        others = {_any_port() for _ in range(200)}
        with (
            bind("127.0.0.1", port) as listener,
            socket.create_connection(("127.0.0.1", port), timeout=30) as client,
        ):
            served, address = listener.accept()
            served.close()
            assert address == client.getsockname()
    assert port not in others


def _any_port() -> int:
    """The port that the system gives to a server that asks for any."""
    with bind("127.0.0.1", 0) as listener:
        port: int = listener.getsockname()[1]
        return port
