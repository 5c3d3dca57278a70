"""A registry on PostgreSQL, which any number of servers share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, exists, select, text
from sqlalchemy.exc import DBAPIError

from polyrex.server.errors import StartError, StorageError
from polyrex.server.registry.schema import audit, state

from .failures import OUTCOME_UNKNOWN
from .migrate import check_schema, upgrade

CHANNEL = "polyrex_registry"
"""Where every change is announced; the payload is its revision."""

_MIGRATION_LOCK = 0x504C5852  # any number that other programs do not use for theirs
_SETTLE_SECONDS = 10.0
_MILLISECONDS = {
    "statement_timeout": 30_000,
    "lock_timeout": 10_000,
    # A server that died without a word must not keep the others from writing.
    "idle_in_transaction_session_timeout": 30_000,
}
_CONNECTING: Mapping[str, Any] = {
    "connect_timeout": 5,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 10,
    "application_name": "polyrex",
    "options": " ".join(f"-c {name}={value}" for name, value in _MILLISECONDS.items()),
}


class Postgres:
    """An open database; `serving` creates and migrates the tables."""

    reading: Mapping[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    # A transaction sees all that was committed before it got its lock on `state`.
    writing: Mapping[str, Any] = {"isolation_level": "READ COMMITTED"}

    def __init__(self, url: URL, *, serving: bool) -> None:
        """Raises StartError, without the password, where it cannot be used."""
        if find_spec("psycopg") is None:
            raise StartError("PostgreSQL needs psycopg: pip install 'polyrex[postgres]'")
        self.engine = _make_engine(
            url, pool_pre_ping=True, pool_size=4, max_overflow=8, pool_timeout=10
        )
        self._apart = _make_engine(url, poolclass=NullPool)
        shown = url.set(query={}).render_as_string()  # the query may hold a password, too
        try:
            self._prepare(serving=serving)
        except DBAPIError as error:
            self.close()
            reason = str(error.orig).strip().splitlines()[0]
            raise StartError(f"{shown}: {reason}") from error
        except StartError as error:
            self.close()
            raise StartError(f"{shown}: {error}") from error

    def _prepare(self, *, serving: bool) -> None:
        with self.engine.connect().execution_options(**self.writing) as connection:
            for setting in ("fsync", "synchronous_commit"):
                if connection.scalar(text(f"SHOW {setting}")) == "off":
                    raise StartError(f"{setting} is off: it would lose what it has acknowledged")
            if serving:
                lock = text("SELECT pg_advisory_xact_lock(:key)")
                connection.execute(lock, {"key": _MIGRATION_LOCK})
                upgrade(connection)
                connection.commit()
            else:
                check_schema(connection)

    def announce(self, connection: Connection, revision: int) -> None:
        """Notify those who listen, when the transaction has committed."""
        notify = text("SELECT pg_notify(:channel, :revision)")
        connection.execute(notify, {"channel": CHANNEL, "revision": str(revision)})

    def settle(self, connection: Connection, change: str, error: DBAPIError) -> bool:
        """Look whether a change is there whose COMMIT was not answered.

        Whoever has the lock on `state` knows that the transaction has ended: it cannot commit any
        more. Asking takes a connection of its own, because all others may be in use.
        """
        connection.invalidate()  # so that there are no more than before
        lock = select(state.c.revision).with_for_update()
        look = select(exists().where(audit.c.change == change))
        give_up = time.monotonic() + _SETTLE_SECONDS
        while True:
            try:
                with self._apart.connect().execution_options(**self.writing) as another:
                    another.execute(lock)
                    return bool(another.execute(look).scalar())
            except Exception:  # whatever it is, the outcome is not known yet
                if time.monotonic() > give_up:
                    raise StorageError(OUTCOME_UNKNOWN) from error
                time.sleep(0.25)

    def touch(self, connection: Connection) -> None:
        """The lock on `state`, which is taken already, has to be written like a change."""

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def _make_engine(url: URL, **pool: Any) -> Engine:
    return create_engine(
        url.set(drivername="postgresql+psycopg"),
        connect_args=dict(_CONNECTING),
        hide_parameters=True,
        **pool,
    )
