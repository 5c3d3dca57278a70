"""Follows what others change in the database: by asking it, and on PostgreSQL by being told."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from polyrex.server.errors import StorageError
from polyrex.server.registry.database import Database
from polyrex.server.registry.storage.postgres import CHANNEL

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_PROBE_SECONDS = 5.0


class Follower:
    """A thread that keeps an index as new as the database, and asks whether that works again."""

    def __init__(self, database: Database, catch_up: Callable[[], int]) -> None:
        self._database = database
        self._catch_up = catch_up
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        others = self._database.engine.dialect.name == "postgresql"
        run = self._follow if others else self._watch
        self._thread = threading.Thread(target=run, name="registry-follower", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for its end."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        """One server has the file: nobody else changes anything, but it may fail and work again."""
        while not self._stopping.wait(_PROBE_SECONDS):
            self._guarded(self._probe)

    def _follow(self) -> None:
        while not self._stopping.is_set():
            try:
                self._listen()
            except (SQLAlchemyError, self._database.engine.dialect.loaded_dbapi.Error) as error:
                logger.warning("the registry's notifications broke off: %s", type(error).__name__)
                self._guarded(self._catch_up)
                self._stopping.wait(_POLL_SECONDS)

    def _listen(self) -> None:
        """Catch up at every notification, and often without; raises where the connection breaks."""
        pooled = self._database.engine.raw_connection()
        connection: Any = pooled.driver_connection
        try:
            pooled.detach()  # the pool has as many as before
            connection.autocommit = True
            connection.execute(f"LISTEN {CHANNEL}")
            probed = time.monotonic()
            while not self._stopping.is_set():
                # Also right after LISTEN: of what happened before, nobody is told.
                self._guarded(self._catch_up)
                if time.monotonic() - probed > _PROBE_SECONDS:
                    self._guarded(self._probe)
                    probed = time.monotonic()
                for _ in connection.notifies(timeout=_POLL_SECONDS, stop_after=1):
                    pass
        finally:
            pooled.close()

    def _probe(self) -> None:
        if not self._database.health.ok:
            self._database.probe()

    def _guarded(self, step: Callable[[], object]) -> None:
        try:
            step()
        except StorageError:
            pass  # the database's health says it, and its log
        except Exception:
            logger.exception("the registry could not be followed; trying again")
