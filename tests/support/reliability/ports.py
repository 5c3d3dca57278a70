"""Ports for processes that have to be told one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port of loopback that the system gives to nobody else while the context lasts.

    It stays bound here, and is not listened to: a process that asks for this very port, and allows
    that addresses are used again, as servers do, can bind it as well.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
        yield port
