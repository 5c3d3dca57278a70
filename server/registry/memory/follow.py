"""Follows what others change in the database: by asking it, and on PostgreSQL by being told."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

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
        self._heard = True  # of changes, by notifications
        self._probe_due = 0.0

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
            except Exception as error:
                self._hears(error)
                self._guarded(self._ask)  # which is enough, until it hears again
                self._stopping.wait(_POLL_SECONDS)

    def _listen(self) -> None:
        """Catch up at every notification, and often without; raises where the connection breaks."""
        pooled = self._database.engine.raw_connection()
        connection: Any = pooled.driver_connection
        try:
            pooled.detach()  # the pool has as many as before
            connection.autocommit = True
            connection.execute(f"LISTEN {CHANNEL}")
            while not self._stopping.is_set():
                # Also right after LISTEN: of what happened before, nobody is told.
                self._guarded(self._ask)
                for _ in connection.notifies(timeout=_POLL_SECONDS, stop_after=1):
                    pass
                self._hears()
        finally:
            pooled.close()

    def _hears(self, error: Exception | None = None) -> None:
        """Log every turn of it once."""
        if error is not None and self._heard:
            reason = type(error).__name__
            logger.warning("the registry's notifications broke off (%s): it is asked", reason)
        elif error is None and not self._heard:
            logger.info("the registry's notifications are heard again")
        self._heard = error is None

    def _ask(self) -> None:
        self._catch_up()
        if time.monotonic() > self._probe_due:
            self._probe()
            self._probe_due = time.monotonic() + _PROBE_SECONDS

    def _probe(self) -> None:
        if not self._database.health.ok:
            with suppress(StorageError):  # the health and its log say it
                self._database.probe()

    def _guarded(self, step: Callable[[], object]) -> None:
        """Take a step, and let the database's health say what goes wrong with it."""
        try:
            step()
        except StorageError:  # the health says it already
            return
        except Exception as error:
            self._database.follows(error)
            return
        self._database.follows()
