"""A registry in one SQLite file, which one server has at a time."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError

from polyrex.server.errors import StartError, StorageError

from .failures import OUTCOME_UNKNOWN
from .migrate import check_schema, upgrade
from .private import check_private

APPLICATION_ID = 0x504C5852
"""Stands in the header of every registry's file: ASCII of PLXR."""

_WAIT_SECONDS = 10  # for a writer in another process, such as an import
_WRITES = "sqlite_writes"

# A write failed: the transaction's last frame, which commits it, is not whole.
_LOG_IS_CUT = ("SQLITE_FULL", "SQLITE_IOERR_WRITE")

# What is set on every connection, and what SQLite says when it is asked: it can fail to set the
# first of them without an error.
_SETTINGS = {
    "journal_mode": ("WAL", "wal"),
    "synchronous": ("FULL", 2),
    "wal_autocheckpoint": (1000, 1000),
    "foreign_keys": ("ON", 1),
}


_DAMAGED = "the registry cannot be used"
_ADVICE = (
    "move the file and those of the same name with -wal and -shm away, then put a backup in its "
    "place or begin with an empty registry"
)


class Sqlite:
    """An open file; `serving` creates and migrates it, and keeps other servers out."""

    reading: Mapping[str, Any] = {}
    writing: Mapping[str, Any] = {_WRITES: True}

    def __init__(self, url: URL, *, serving: bool) -> None:
        """Raises StartError, with the file's name, where it cannot be used."""
        if not url.database or url.query or url.host or url.database == ":memory:":
            raise StartError(f"{url}: name a file, as in sqlite:////var/lib/polyrex/registry.db")
        path = _resolved(url.database)
        self.engine = make_engine(path)
        self._lock = _lock(path) if serving else None
        try:
            if serving and not path.exists():
                _create(path)
            elif not path.is_file():
                raise StartError("there is no such file")
            _check_names(path)
            _check(self.engine, path, serving=serving)
        except (StartError, StorageError) as error:
            self.close()
            raise StartError(f"{path}: {error}") from error

    def announce(self, connection: Connection, revision: int) -> None:
        """Nobody else follows a file."""

    def settle(self, connection: Connection, change: str, error: DBAPIError) -> bool:
        """Overwrite what the failed transaction wrote to the write-ahead log.

        The log may hold all of it, with valid checksums: whoever opened the file after this process
        was killed would take it for committed. The next transaction overwrites its beginning, so
        there is one at once, which needs no fsync. It has to be on this connection: opening another
        could read the log anew.
        """
        raw: Any = connection.connection.driver_connection
        try:
            raw.rollback()  # SQLite does so itself after some errors, not after all
            if getattr(error.orig, "sqlite_errorname", None) not in _LOG_IS_CUT:
                _overwrite(raw)
        except (sqlite3.Error, StorageError):
            connection.invalidate()  # it may not wait for the disk: nobody must get it
            raise StorageError(OUTCOME_UNKNOWN) from error
        return False

    def touch(self, connection: Connection) -> None:
        """Change a number in the file's header that nobody reads."""
        _touch(connection.exec_driver_sql)

    def close(self) -> None:
        """Close the file, and let another server have it."""
        self.engine.dispose()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _resolved(name: str) -> Path:
    """The file itself: its lock and its log lie beside it, whatever link leads to it."""
    path = Path(os.path.realpath(name))
    if path.is_symlink():
        raise StartError(f"{path}: symbolic links lead in a circle")
    return path


def _check_names(path: Path) -> None:
    """Raise StartError where a file has another name, under which it would have another log."""
    count = path.stat().st_nlink
    if count > 1:
        raise StartError(f"the file has {count} names (hard links); delete all but this one")


def _lock(path: Path) -> int:
    """A descriptor that locks the registry against other servers while it is open."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(path.parent)
        name = path.with_name(path.name + ".lock")
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"{path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StartError(f"{path}: another server uses this registry") from error
    return descriptor


def _create(path: Path) -> None:
    """Make the file of an empty registry. It gets its name when it is whole."""
    log = path.with_name(path.name + "-wal")
    if log.exists():  # SQLite would take it for the new file's
        raise StartError(f"{log} belongs to a registry that is not here; move it away, too")
    new = path.with_name(path.name + ".new")
    try:
        for rest in path.parent.glob(new.name + "*"):  # of a start that was broken off
            rest.unlink()
        os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        create_tables(new)
        new.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, DBAPIError, sqlite3.Error) as error:
        raise StartError(f"it cannot be created: {_reason(error)}") from error


def create_tables(path: Path) -> None:
    """Make an empty file an empty registry. Raises DBAPIError."""
    engine = make_engine(path)
    try:
        with engine.connect().execution_options(**Sqlite.writing) as connection:
            connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
            upgrade(connection)
            connection.commit()
        with engine.connect() as connection:
            # Closing does this, too, but says nothing where it fails.
            raw: Any = connection.connection.driver_connection
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        engine.dispose()


def make_engine(path: Path) -> Engine:
    """SQLAlchemy's engine for a file; nothing is opened yet."""
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        connect_args={"timeout": _WAIT_SECONDS},
        hide_parameters=True,
        pool_size=8,
        max_overflow=32,
    )
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", _begin)
    return engine


def _set_up(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where SQLAlchemy says so
    # SQLite's own knows ASCII alone.
    connection.create_function("lower", 1, str.lower, deterministic=True)
    _set(connection)


def _set(raw: Any) -> None:
    for name, (value, expected) in _SETTINGS.items():
        raw.execute(f"PRAGMA {name}={value}").fetchone()
        found = raw.execute(f"PRAGMA {name}").fetchone()[0]
        if found != expected:
            raise StorageError(f"the registry's database refuses {name}={value}")


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _check(engine: Engine, path: Path, *, serving: bool) -> None:
    """Look whether the file is a whole registry; when serving, bring its schema to this version."""
    try:
        check_file(path, (APPLICATION_ID,))
        if serving:
            path.chmod(0o600)
            with engine.connect().execution_options(**Sqlite.writing) as connection:
                upgrade(connection)
                connection.commit()
        else:
            with engine.connect() as connection:
                check_schema(connection)
    except (OSError, DBAPIError) as error:
        raise StartError(_reason(error)) from error


def check_file(path: Path, application_ids: Collection[int]) -> None:
    """Raise StartError unless a file is whole and has one of these ids; it is not changed."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as raw:
            found = raw.execute("PRAGMA application_id").fetchone()[0]
            if found not in application_ids:
                raise StartError(f"{_DAMAGED} (it is not a registry of polyrex); {_ADVICE}")
            result = str(raw.execute("PRAGMA quick_check(1)").fetchone()[0])
            if result != "ok":
                raise StartError(f"{_DAMAGED} ({result.splitlines()[-1]}); {_ADVICE}")
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorname not in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
            raise StartError(str(error)) from error
        raise StartError(f"{_DAMAGED} ({error}); {_ADVICE}") from error


def _reason(error: OSError | DBAPIError | sqlite3.Error) -> str:
    if isinstance(error, DBAPIError):
        return str(error.orig)
    return str(error.strerror if isinstance(error, OSError) else error)


def _overwrite(raw: Any) -> None:
    """Commit something that needs no fsync, and leave the connection as it was set up."""
    raw.execute("PRAGMA synchronous=OFF")
    raw.execute("PRAGMA wal_autocheckpoint=0").fetchone()  # that would need an fsync
    raw.execute("BEGIN IMMEDIATE")
    try:
        _touch(raw.execute)
        raw.execute("COMMIT")
    finally:
        raw.rollback()  # no setting changes within a transaction
        _set(raw)


def _touch(execute: Callable[[str], Any]) -> None:
    count = execute("PRAGMA user_version").fetchone()[0]
    execute(f"PRAGMA user_version={(count + 1) % (1 << 31)}")
