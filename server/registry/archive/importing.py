"""Adds the tenants and tasks of another registry, from its export or its backup: all, or none."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import Connection, Row, Select, Table, and_, insert, select
from sqlalchemy.exc import DBAPIError

from polyrex.adapters.errors import FileError
from polyrex.server.errors import StartError
from polyrex.server.registry.database import Change, Database
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.schema import aliases, routers, shares, tasks, tenants, versions
from polyrex.server.registry.storage.migrate import upgrade
from polyrex.server.registry.storage.sqlite import APPLICATION_ID, Sqlite, check_file, make_engine

from .checking import check_tasks
from .copying import EXPORT_ID

_ROWS_AT_ONCE = 200
_NAMES_SHOWN = 20


@dataclass(frozen=True)
class Imported:
    """How many tenants and tasks came, and how many tasks were there already."""

    tenants: int
    tasks: int
    unchanged: int


def import_file(database: Database, path: Path) -> Imported:
    """Add the tenants and tasks of a file by their names; what a task has comes along.

    A task that is there with the same current router is left alone. Raises FileError, and changes
    nothing, where one has another, or the file is not whole; StorageError.
    """
    with _opened(path) as source, database.change(OPERATOR) as change:
        new, unchanged = _sort(source, change.connection, path)
        before = change.revision
        tenant_ids = _add_tenants(source, change)
        added = change.revision - before
        task_ids = _add_tasks(source, change, new, tenant_ids)
        for table in (versions, aliases, shares):
            _add_rows(source, change.connection, table, task_ids)
        _add_routers(source, change.connection)
        return Imported(added, len(new), unchanged)


@contextmanager
def _opened(path: Path) -> Iterator[Connection]:
    """A copy of the file, with this version's schema and nothing wrong in it."""
    with TemporaryDirectory(prefix="polyrex-import-") as folder:
        copy = Path(folder) / "registry.db"
        engine = make_engine(copy)
        try:
            try:
                _copy_whole(path, copy)
                with engine.connect().execution_options(**Sqlite.writing) as connection:
                    upgrade(connection)
                    connection.commit()
            except (StartError, DBAPIError, sqlite3.Error) as error:
                reason = error.orig if isinstance(error, DBAPIError) else error
                raise FileError(f"{path}: {reason}") from error
            with engine.connect() as connection:
                wrong = check_tasks(connection)
                if wrong:
                    raise FileError(f"{path}: {wrong[0]}; {len(wrong)} faults in all")
                yield connection
        finally:
            engine.dispose()


def _copy_whole(path: Path, copy: Path) -> None:
    """Copy a file with what still lies in its write-ahead log; raises StartError, sqlite3.Error."""
    check_file(path.absolute(), (APPLICATION_ID, EXPORT_ID))
    with (
        closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as source,
        closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)


def _sort(source: Connection, target: Connection, path: Path) -> tuple[set[int], int]:
    """The tasks of the file that are new, and how many are there; raises FileError for others."""
    there = {(row.tenant, row.name): row for row in target.execute(_current_routers())}
    new: set[int] = set()
    others: list[str] = []
    unchanged = 0
    for row in source.execute(_current_routers()):
        found = there.get((row.tenant, row.name))
        if found is None:
            new.add(row.id)
        elif row.router_sha256 in (None, found.router_sha256):  # None: purged, nothing is left
            unchanged += 1
        else:
            others.append(f"{row.tenant}:{row.name}")
    if others:
        more = len(others) - _NAMES_SHOWN
        names = ", ".join(others[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
        raise FileError(f"{path}: the registry has other tasks of these names: {names}")
    return new, unchanged


def _current_routers() -> Select[Any]:
    """The statement that gives every task with its tenant's name and its current router."""
    current = and_(versions.c.task_id == tasks.c.id, versions.c.version == tasks.c.current_version)
    return (
        select(tasks.c.id, tenants.c.name.label("tenant"), tasks.c.name, versions.c.router_sha256)
        .select_from(tasks.join(tenants, tasks.c.tenant_id == tenants.c.id))
        .outerjoin(versions, current)
        .order_by(tenants.c.name, tasks.c.name)
    )


def _add_tenants(source: Connection, change: Change) -> dict[int, int]:
    """Add the tenants that are not there; returns the numbers here by those in the file."""
    found = change.connection.execute(select(tenants.c.name, tenants.c.id))
    there = {row.name: row.id for row in found}
    ids: dict[int, int] = {}
    for row in source.execute(select(tenants).order_by(tenants.c.id)):
        ids[row.id] = there.get(row.name) or _insert(change, tenants, _values(row))
        if row.name not in there:
            change.record("import", "tenant", ids[row.id], detail=row.name)
    return ids


def _add_tasks(
    source: Connection, change: Change, new: set[int], tenant_ids: Mapping[int, int]
) -> dict[int, int]:
    """Add the tasks that are new; returns their numbers here by those in the file."""
    ids: dict[int, int] = {}
    for row in source.execute(select(tasks).order_by(tasks.c.id)):
        if row.id in new:
            values = _values(row) | {
                "tenant_id": tenant_ids[row.tenant_id],
                "changed": change.revision + 1,
            }
            ids[row.id] = _insert(change, tasks, values)
            change.record("import", "task", ids[row.id], version=row.current_version)
    return ids


def _add_rows(
    source: Connection,
    target: Connection,
    table: Table,
    task_ids: Mapping[int, int],
) -> None:
    """Add what a table has of the new tasks."""
    for rows in source.execute(select(table)).partitions(_ROWS_AT_ONCE):
        values = [
            dict(row._mapping) | {"task_id": task_ids[row.task_id]}
            for row in rows
            if row.task_id in task_ids
        ]
        if values:
            target.execute(insert(table), values)


def _add_routers(source: Connection, target: Connection) -> None:
    """Add the routers that versions have now, and that are not there."""
    there = select(routers.c.sha256)
    wanted = select(versions.c.router_sha256).distinct().except_(there)
    missing = set(target.execute(wanted).scalars())
    options = {"yield_per": _ROWS_AT_ONCE}
    for rows in source.execute(select(routers), execution_options=options).partitions():
        values = [dict(row._mapping) for row in rows if row.sha256 in missing]
        if values:
            target.execute(insert(routers), values)


def _insert(change: Change, table: Table, values: Mapping[str, Any]) -> int:
    """Insert a row, and return the number that the database gives it."""
    statement = insert(table).values(**values).returning(table.c.id)
    number: int = change.connection.execute(statement).scalar_one()
    return number


def _values(row: Row[Any]) -> dict[str, Any]:
    """The columns of a row but its number, which is another in every database."""
    return {name: value for name, value in row._mapping.items() if name != "id"}
