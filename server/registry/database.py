"""The registry's database: transactions on SQLite or PostgreSQL, and what they do when it fails."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from sqlalchemy import URL, Connection, Engine, insert, make_url, select, update
from sqlalchemy.exc import ArgumentError, DBAPIError

from polyrex.server.errors import StartError, StorageError

from .principal import Principal
from .schema import audit, state
from .storage.backend import Backend
from .storage.failures import Access, Health, Watch
from .storage.postgres import Postgres
from .storage.sqlite import Sqlite

_TURN_SECONDS = 20.0  # that a change may wait for those before it
_LOCKED = select(state.c.revision).where(state.c.id == 1).with_for_update()
_ADVANCED = update(state)  # its one row
_RECORDED = insert(audit)


@dataclass
class Change:
    """A transaction that changes the registry; `record` gives each change its revision."""

    connection: Connection
    principal: Principal
    revision: int  # of the last change
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    recorded: bool = False

    def record(self, action: str, subject: str, subject_id: object, **fields: Any) -> int:
        """Note a change in the audit table, and return its revision.

        `subject` is task, tenant or key; `fields` are further columns of the table.
        """
        self.revision += 1
        self.recorded = True
        row = {
            "revision": self.revision,
            "change": self.id,
            "at": time.time(),
            "tenant": self.principal.tenant,
            "key": self.principal.key,
            "action": action,
            "subject": subject,
            "subject_id": str(subject_id),
            **fields,
        }
        self.connection.execute(_RECORDED, row)
        return self.revision


class Database:
    """One database; every method may be called from any thread."""

    def __init__(self, url: str, *, serving: bool = True) -> None:
        """Open it, and create or migrate its tables.

        A file is then this process's alone. Without `serving`, the database is left as it is, and a
        server may use it at the same time. Raises StartError where it cannot be used, or another
        server has the file.
        """
        self._backend = open_backend(url, serving=serving)
        self._turn = threading.Lock()
        self._watch = Watch()

    @property
    def engine(self) -> Engine:
        """SQLAlchemy's engine, for what needs a connection of its own."""
        return self._backend.engine

    @property
    def health(self) -> Health:
        """Whether the last reading and the last writing transaction worked, and following does."""
        return self._watch.health

    def follows(self, error: Exception | None = None) -> None:
        """Let the health say that this server follows the registry, or what prevents it."""
        self._watch.follows(error)

    @property
    def secret(self) -> bytes:
        """32 random bytes of this registry, the same for all replicas. Raises StorageError."""
        with self.read() as connection:
            found: bytes = connection.execute(select(state.c.secret)).scalar_one()
            return found

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction: a consistent view. Raises StorageError."""
        backend = self._backend
        with (
            self._watch.over(Access.reading),
            backend.engine.connect().execution_options(**backend.reading) as connection,
        ):
            yield connection

    @contextmanager
    def change(self, principal: Principal) -> Iterator[Change]:
        """A write transaction, one at a time in all processes; durable when the context ends.

        Nothing is written where nothing was recorded. Raises StorageError, or StorageFull; what
        was told as failed is undone for good.
        """
        with self._write() as connection:
            change = Change(connection, principal, connection.execute(_LOCKED).scalar_one())
            yield change
            if change.recorded:
                connection.execute(_ADVANCED, {"revision": change.revision})
                self._backend.announce(connection, change.revision)
                self._commit(connection, change)

    def probe(self) -> None:
        """Find out whether a database that failed works again; raises StorageError if not."""
        with self.read() as connection:
            connection.execute(select(state.c.revision))
        if self._watch.fails(Access.writing):
            with self._write() as connection:
                connection.execute(_LOCKED)
                self._backend.touch(connection)
                connection.commit()

    def close(self) -> None:
        """Close every connection, and let another server have the file."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        """A connection for a change, whose transaction is undone unless it is committed."""
        with self._watch.over(Access.writing):
            if not self._turn.acquire(timeout=_TURN_SECONDS):
                raise StorageError("the registry's database is busy; nothing has changed")
            try:
                backend = self._backend
                with backend.engine.connect().execution_options(**backend.writing) as connection:
                    yield connection
            finally:
                self._turn.release()

    def _commit(self, connection: Connection, change: Change) -> None:
        try:
            connection.commit()
        except DBAPIError as error:
            if not self._backend.settle(connection, change.id, error):
                raise


def folder_url(folder: Path) -> str:
    """The address of the registry in a folder of tasks, which is the one without any other."""
    return URL.create("sqlite", database=str(folder / "registry.db")).render_as_string()


def open_backend(url: str, *, serving: bool) -> Backend:
    """Open SQLite's file or PostgreSQL's database of this address; raises StartError."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise StartError("the registry's address is no URL") from error
    if parsed.drivername == "sqlite":
        return Sqlite(parsed, serving=serving)
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        return Postgres(parsed, serving=serving)
    raise StartError(f"a registry is sqlite:/// or postgresql://, not {parsed.drivername}://")
