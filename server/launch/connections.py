"""The connections of a server: how many there may be, and the clock that all of them go by."""

from __future__ import annotations

import logging
import os
import resource
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Protocol

import prometheus_client

from polyrex.server.config import ServerConfig

logger = logging.getLogger(__name__)

_BRIEF = 64
"""Most connections beyond the limits. They live long enough to ask for the server's health."""
_DESCRIPTORS = 1 << 16
"""Where more are allowed, so many are enough."""


class Connection(Protocol):
    """What is known here of a connection."""

    @property
    def address(self) -> str:
        """The client's address."""
        ...

    def check_time(self, now: float) -> None:
        """End what has taken too long by `now`, seconds of the event loop's clock."""
        ...

    def abort(self) -> None:
        """Close without waiting for what is unsent."""
        ...


class Connections:
    """Counts open connections, of all clients and of each address, and ends those too many."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        is_open: prometheus_client.Gauge,
        closed: prometheus_client.Counter,
    ) -> None:
        """The metrics: connections open now, and those that the server closed, by reason."""
        free = raise_descriptor_limit() - _open_descriptors()
        self.most = max(1, min(config.max_connections, free // 2))
        self._most_brief = max(1, min(_BRIEF, free // 8))
        # asyncio accepts so many more before it asks here about the first, and again in the next
        # two rounds of its loop.
        self.accepted_at_once = max(1, min(_BRIEF, free // 16))
        self._most_of_address = config.max_address_connections
        if self.most < config.max_connections:
            logger.warning(
                "at most %d connections instead of %d: only %d descriptors are free",
                *(self.most, config.max_connections, free),
            )
        self._open = is_open
        self._closed = closed
        self._of_address: Counter[str] = Counter()
        self._lasting: set[Connection] = set()
        self._brief: OrderedDict[Connection, None] = OrderedDict()

    def add(self, connection: Connection) -> bool:
        """Count a new connection; whether it is within the limits, and may last.

        One beyond them takes the place of the oldest such one, if there are too many of these.
        """
        self._open.inc()
        of_address = self._of_address[connection.address]
        if len(self._lasting) < self.most and of_address < self._most_of_address:
            self._of_address[connection.address] += 1
            self._lasting.add(connection)
            return True
        self._brief[connection] = None
        if len(self._brief) > self._most_brief:
            oldest, _ = self._brief.popitem(last=False)
            self.closing("evicted")
            oldest.abort()
        return False

    def remove(self, connection: Connection) -> None:
        """Stop counting a connection, which is closed."""
        self._open.dec()
        self._brief.pop(connection, None)
        if connection in self._lasting:
            self._lasting.remove(connection)
            self._of_address[connection.address] -= 1
            if not self._of_address[connection.address]:
                del self._of_address[connection.address]

    def closing(self, reason: str) -> None:
        """Count a connection that the server closes, by the reason."""
        self._closed.labels(reason).inc()

    def check_time(self, now: float) -> None:
        """End what has taken too long, on every connection."""
        for connection in (*self._lasting, *self._brief):
            try:
                connection.check_time(now)
            except Exception:  # it must not keep the others open
                logger.exception("a connection failed, and is closed")
                connection.abort()


def raise_descriptor_limit() -> int:
    """Raise this process's limit of descriptors, as far as it may and there is use for it.

    Returns how many there can be now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _DESCRIPTORS
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


def _open_descriptors() -> int:
    listed = Path("/proc/self/fd")
    return len(os.listdir(listed)) if listed.exists() else 64
