"""The registry's database: transactions on SQLite or PostgreSQL, and what they do when it fails."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, select, update

from .principal import DEFAULT_TENANT, Principal
from .schema import audit, metadata, state, tenants


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
        self.connection.execute(insert(audit), row)
        return self.revision


class Database:
    """One database; every method may be called from any thread."""

    def __init__(self, url: str) -> None:
        """Open it. Raises StartError where that fails, or another server has its file."""
        self.engine: Engine = create_engine(url)
        self._writing = threading.Lock()
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _sqlite_connect)
            event.listen(self.engine, "begin", _sqlite_begin)
        metadata.create_all(self.engine)
        with self.engine.begin() as connection:
            if connection.execute(select(state.c.id)).first() is None:
                first = {"id": 1, "revision": 0, "secret": secrets.token_bytes(32)}
                connection.execute(insert(state), first)
                now = time.time()
                connection.execute(
                    insert(tenants), {"id": 1, "name": DEFAULT_TENANT, "created": now, "quotas": {}}
                )

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction: a consistent view. Raises StorageError."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def change(self, principal: Principal) -> Iterator[Change]:
        """A write transaction, one at a time in all processes; durable when the context ends.

        Nothing is written where nothing was recorded. Raises StorageError, or StorageFull; what
        was told as failed is undone for good.
        """
        with self._writing, self.engine.connect() as connection:
            with connection.begin() as transaction:
                locked = select(state.c.revision).where(state.c.id == 1).with_for_update()
                change = Change(connection, principal, connection.execute(locked).scalar_one())
                yield change
                if change.recorded:
                    connection.execute(update(state).values(revision=change.revision))
                else:
                    transaction.rollback()

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def _sqlite_connect(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where SQLAlchemy says so
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").fetchone()


def _sqlite_begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
