"""Threads for what asks the registry's database, apart from those that prepare completions.

While the database is locked or cannot be reached, such a call keeps its thread for seconds: in the
event loop's own threads, a few of them would keep every tenant's completions waiting.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from polyrex.server.errors import StorageError

_THREADS = 4
"""Two of these pools need no more connections at once than PostgreSQL's pool has."""
_PATIENCE = 20.0
"""Seconds that a call may wait for a thread."""

P = ParamSpec("P")
T = TypeVar("T")


class DatabaseCalls:
    """Makes calls that may wait for the database; starts no thread before the first."""

    def __init__(self, most: int, threads: int = _THREADS, patience: float = _PATIENCE) -> None:
        """`most` calls are under way or wait at the same time."""
        self._threads = ThreadPoolExecutor(threads, "registry-database")
        self._room = threading.Semaphore(most)
        self._patience = patience

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function returns, or raises.

        Raises StorageError, without having called it, where too many others wait already or it has
        waited for too long.
        """
        if not self._room.acquire(blocking=False):
            raise _busy()
        give_up = time.monotonic() + self._patience

        def call() -> T:
            if time.monotonic() >= give_up:
                raise _busy()
            return function(*args, **kwargs)

        future = self._threads.submit(call)
        future.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Wait for the calls under way; those that wait for a thread are not made any more."""
        self._threads.shutdown(cancel_futures=True)


def _busy() -> StorageError:
    return StorageError("the registry's database is busy; nothing has changed")
