"""A database that keeps others waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, event

from support.fake_server import Served


@contextmanager
def transactions_that_wait(served: Served) -> Iterator[threading.Event]:
    """Let transactions wait at their beginning; the event is set when one does."""
    gate, begun = threading.Event(), threading.Event()

    def wait(_connection: Connection) -> None:
        begun.set()
        gate.wait()

    engine = served.registry.database.engine
    event.listen(engine, "begin", wait)
    try:
        yield begun
    finally:
        gate.set()  # and the listener stays: threads may be within it
