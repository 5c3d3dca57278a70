"""Copies of a registry, each one file of SQLite: of all that there is, or of its tasks alone."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, delete, insert, select, update
from sqlalchemy.exc import DBAPIError

from polyrex.adapters.errors import FileError
from polyrex.server.registry.database import Database
from polyrex.server.registry.schema import audit, idempotency, keys, metadata, state
from polyrex.server.registry.storage.sqlite import Sqlite, create_tables, make_engine

EXPORT_ID = 0x504C5845
"""Stands in the header of every export; a server does not take one for its registry."""

_NOT_EXPORTED = (keys, audit, idempotency)
_ROWS_AT_ONCE = 200


def backup(database: Database, path: Path) -> None:
    """Write the whole registry, as of one moment, to a new file that can take its place.

    A server may use the registry meanwhile. Raises FileError, StorageError.
    """
    with _new_file(path) as new:
        if database.engine.dialect.name == "sqlite":
            _copy_file(database, new)
        else:
            create_tables(new)
            with database.read() as source, _filling(new) as target:
                _copy_rows(source, target, metadata.sorted_tables)


def export(database: Database, path: Path) -> None:
    """Write tenants and tasks to a new file, without keys, secrets and history.

    A server may use the registry meanwhile. Raises FileError, StorageError.
    """
    with _new_file(path) as new:
        create_tables(new)
        with database.read() as source, _filling(new) as target:
            secret = target.execute(select(state.c.secret)).scalar_one()
            tables = [table for table in metadata.sorted_tables if table not in _NOT_EXPORTED]
            _copy_rows(source, target, tables)
            target.execute(update(state).values(secret=secret))
            target.exec_driver_sql(f"PRAGMA application_id={EXPORT_ID}")


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A file to write, which gets its name and is on the disk when the context ends."""
    if path.exists():
        raise FileError(f"{path}: is there already")
    new = path.with_name(path.name + ".new")
    try:
        os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise FileError(f"{new}: {error.strerror}") from error
    try:
        yield new
        for name in (new, path.parent):
            descriptor = os.open(name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        new.rename(path)
    except (OSError, DBAPIError, sqlite3.Error) as error:
        reason = error.orig if isinstance(error, DBAPIError) else error
        raise FileError(f"{path}: the copy failed: {reason}") from error
    finally:
        for rest in path.parent.glob(f"{new.name}*"):
            rest.unlink()


def _copy_file(database: Database, new: Path) -> None:
    with database.read() as connection, closing(sqlite3.connect(new)) as target:
        raw: Any = connection.connection.driver_connection
        raw.backup(target)


@contextmanager
def _filling(new: Path) -> Iterator[Connection]:
    """A connection to a registry without rows; they are in its one file when the context ends."""
    engine = make_engine(new)
    try:
        with engine.connect().execution_options(**Sqlite.writing) as connection:
            for table in reversed(metadata.sorted_tables):
                if table is not state:
                    connection.execute(delete(table))
            yield connection
            connection.commit()
        with engine.connect() as connection:
            raw: Any = connection.connection.driver_connection
            raw.execute("PRAGMA journal_mode=DELETE").fetchone()
    finally:
        engine.dispose()


def _copy_rows(source: Connection, target: Connection, tables: Iterable[Table]) -> None:
    target.execute(delete(state))
    for table in tables:
        result = source.execute(select(table), execution_options={"yield_per": _ROWS_AT_ONCE})
        for rows in result.mappings().partitions():
            target.execute(insert(table), [dict(row) for row in rows])
