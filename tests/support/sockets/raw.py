"""Connections without a client library, for what no library would do."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

PATIENCE = 30.0
"""Seconds after which a server that should have closed a connection has not."""


@dataclass(frozen=True)
class Answer:
    """The first answer on a connection."""

    status: int
    headers: dict[str, str]
    body: bytes

    def error(self) -> dict[str, Any]:
        """The error of its JSON body."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


@contextmanager
def connected(
    port: int, *, address: str = "127.0.0.1", receive_buffer: int | None = None
) -> Iterator[socket.socket]:
    """A connection from one of this machine's own addresses; it takes few bytes ahead of its
    reader where a buffer's size is given."""
    with socket.socket() as connection:
        connection.settimeout(PATIENCE)
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.bind((address, 0))
        connection.connect(("127.0.0.1", port))
        yield connection


def request(method: str, path: str, body: object = None, **headers: str) -> bytes:
    """A request as it is sent; `body` becomes JSON."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = {"host": "localhost", "content-type": "application/json"}
    lines |= {"content-length": str(len(content))} | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes; raises TimeoutError where it does not."""
    received = bytearray()
    with suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            received += piece
    return bytes(received)


def answer(received: bytes) -> Answer:
    """Read an answer whose body is not in chunks."""
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    length = int(headers.get("content-length", "0"))
    return Answer(int(status.split()[1]), headers, body[:length])
