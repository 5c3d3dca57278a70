"""Adds the tenants and tasks of another registry, from its export or its backup: all, or none."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy import Connection, Row, Select, Table, and_, insert, select, update
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
_NUMBERS = frozenset(("version", "current_version", "canary_version", "last_version"))


@dataclass(frozen=True)
class Imported:
    """How many tenants and tasks came, and how many tasks were there already.

    `dropped` are the names of those that are dropped here, and not in the file: they stay so.
    """

    tenants: int
    tasks: int
    unchanged: int
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Sorted:
    """The tasks of a file: those that are to come, and the others."""

    new: Mapping[int, Row[Any] | None]  # number in the file -> the purged task of that name here
    unchanged: int
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class _Added:
    """A task that came: its number here, and by how much its versions' numbers are greater."""

    task_id: int
    shift: int


def import_file(database: Database, path: Path) -> Imported:
    """Add the tenants and tasks of a file by their names; what a task has comes along.

    A task that is there with the same current router is left alone, dropped or not. A name that was
    purged goes on counting: the file's version 1 comes after the last one that was ever here.
    Raises FileError, and changes nothing, where a task has another router, or the file is not
    whole; StorageError.
    """
    with _opened(path) as source, database.change(OPERATOR) as change:
        found = _sort(source, change.connection, path)
        before = change.revision
        tenant_ids = _add_tenants(source, change)
        tenants_added = change.revision - before
        added = _add_tasks(source, change, found.new, tenant_ids)
        for table in (versions, aliases, shares):
            _add_rows(source, change.connection, table, added)
        _add_routers(source, change.connection)
        return Imported(tenants_added, len(added), found.unchanged, found.dropped)


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


def _sort(source: Connection, target: Connection, path: Path) -> _Sorted:
    """Compare the tasks of the file with those here; raises FileError where names collide."""
    there = {(row.tenant, row.name): row for row in target.execute(_current_routers())}
    new: dict[int, Row[Any] | None] = {}
    others: list[str] = []
    dropped: list[str] = []
    unchanged = 0
    for row in source.execute(_current_routers()):
        found = there.get((row.tenant, row.name))
        if found is None:
            new[row.id] = None
        elif row.current_version is None:  # purged: it has nothing that could come
            unchanged += 1
        elif found.current_version is None:
            new[row.id] = found
        elif row.router_sha256 != found.router_sha256:
            others.append(f"{row.tenant}:{row.name}")
        elif found.deleted is not None and row.deleted is None:
            dropped.append(f"{row.tenant}:{row.name}")
        else:
            unchanged += 1
    if others:
        names = some_names(others)
        raise FileError(f"{path}: the registry has other tasks of these names: {names}")
    return _Sorted(new, unchanged, tuple(dropped))


def some_names(names: Sequence[str]) -> str:
    """Names for a message, of which there may be too many."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _current_routers() -> Select[Any]:
    """The statement that gives every task with its tenant's name and its current router."""
    current = and_(versions.c.task_id == tasks.c.id, versions.c.version == tasks.c.current_version)
    return (
        select(
            *(tasks.c[name] for name in ("id", "name", "last_version", "current_version")),
            tasks.c.deleted,
            tenants.c.name.label("tenant"),
            versions.c.router_sha256,
        )
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
    source: Connection,
    change: Change,
    new: Mapping[int, Row[Any] | None],
    tenant_ids: Mapping[int, int],
) -> dict[int, _Added]:
    """Add the tasks that are new; returns what became of them by their numbers in the file."""
    added: dict[int, _Added] = {}
    for row in source.execute(select(tasks).order_by(tasks.c.id)):
        if row.id not in new:
            continue
        purged = new[row.id]
        shift = 0 if purged is None else purged.last_version  # no number is used twice
        values = _shifted(_values(row), shift) | {
            "tenant_id": tenant_ids[row.tenant_id],
            "changed": change.revision + 1,
        }
        if purged is None:
            task_id = _insert(change, tasks, values)
        else:
            task_id = purged.id
            change.connection.execute(update(tasks).where(tasks.c.id == task_id).values(**values))
        change.record("import", "task", task_id, version=values["current_version"])
        added[row.id] = _Added(task_id, shift)
    return added


def _shifted(values: Mapping[str, Any], by: int) -> dict[str, Any]:
    """A row's columns, with other numbers of versions."""
    return {
        name: value + by if name in _NUMBERS and value is not None else value
        for name, value in values.items()
    }


def _add_rows(
    source: Connection,
    target: Connection,
    table: Table,
    added: Mapping[int, _Added],
) -> None:
    """Add what a table has of the new tasks."""
    for rows in source.execute(select(table)).partitions(_ROWS_AT_ONCE):
        values = [
            _shifted(dict(row._mapping), to.shift) | {"task_id": to.task_id}
            for row in rows
            if (to := added.get(row.task_id)) is not None
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
