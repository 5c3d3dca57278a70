"""Whether a registry is whole: what its tables say of each other, and every router's bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, exists, func, select

from polyrex.server.registry.database import Database
from polyrex.server.registry.schema import (
    aliases,
    audit,
    routers,
    state,
    tasks,
    tenants,
    versions,
)

_ROWS_AT_ONCE = 200


def check(database: Database) -> tuple[str, ...]:
    """What is wrong with a registry, a sentence each. Raises StorageError."""
    with database.read() as connection:
        return (*check_tasks(connection), *_check_history(connection))


def check_tasks(connection: Connection) -> tuple[str, ...]:
    """What is wrong with the tasks of a registry, or of an export."""
    return (
        *_check_file(connection),
        *_check_routers(connection),
        *_check_versions(connection),
    )


def _check_file(connection: Connection) -> Iterator[str]:
    """Of SQLite's file; PostgreSQL looks after its own."""
    if connection.dialect.name != "sqlite":
        return
    for (found,) in connection.exec_driver_sql("PRAGMA integrity_check"):
        if found != "ok":
            yield f"the file is damaged: {found}"
    for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        yield f"row {row} of {table} refers to a row of {parent} that is missing"


def _check_routers(connection: Connection) -> Iterator[str]:
    options = {"yield_per": _ROWS_AT_ONCE}
    damaged = [
        row.sha256
        for row in connection.execute(select(routers), execution_options=options)
        if hashlib.sha256(row.data).digest() != row.sha256
    ]
    for digest in damaged:
        for name in _names(connection, versions.c.router_sha256 == digest):
            yield f"the router of {name} is damaged; registering it again repairs it"
    missing = ~exists().where(routers.c.sha256 == versions.c.router_sha256)
    for name in _names(connection, missing):
        yield f"the router of {name} is missing; registering it again repairs it"


def _check_versions(connection: Connection) -> Iterator[str]:
    for name in _names(connection, versions.c.version > tasks.c.last_version):
        yield f"{name} is beyond the last version of its task"
    for row in connection.execute(_absent(tasks.c.current_version)):
        yield f"{row.tenant}:{row.name} has no version {row.version}, which is its current one"
    for row in connection.execute(_absent(tasks.c.canary_version)):
        yield f"{row.tenant}:{row.name} has no version {row.version}, which is its canary"
    named = _absent(aliases.c.version).join_from(tasks, aliases, aliases.c.task_id == tasks.c.id)
    for row in connection.execute(named.add_columns(aliases.c.name.label("alias"))):
        yield f"{row.tenant}:{row.name} has no version {row.version}, which is {row.alias}"
    newer = tasks.c.changed > select(state.c.revision).scalar_subquery()
    for row in connection.execute(_tasks(tasks.c.changed).where(newer)):
        yield f"{row.tenant}:{row.name} changed in revision {row.version}, which is to come"


def _check_history(connection: Connection) -> Iterator[str]:
    revision = connection.scalars(select(state.c.revision)).one()
    counted = select(func.count(), func.min(audit.c.revision), func.max(audit.c.revision))
    count, first, last = connection.execute(counted).one()
    if (count, first or 1, last or 0) != (revision, 1, revision):
        found = f"{count} from {first} to {last}" if count else "none"
        yield f"the history has not every revision from 1 to {revision}: {found}"


def _names(connection: Connection, condition: ColumnElement[bool]) -> list[str]:
    """The names of the versions that meet a condition, as requests spell them."""
    of_task = and_(versions.c.task_id == tasks.c.id, condition)
    found = connection.execute(_tasks(versions.c.version).join(versions, of_task))
    return [f"{row.tenant}:{row.name}@{row.version}" for row in found]


def _absent(number: ColumnElement[int | None]) -> Select[Any]:
    """The tasks that name a version which is not there."""
    there = exists().where(versions.c.task_id == tasks.c.id, versions.c.version == number)
    return _tasks(number).where(number.is_not(None), ~there)


def _tasks(number: ColumnElement[int | None]) -> Select[Any]:
    """The statement that gives tasks with their tenants, and a number as `version`."""
    return (
        select(tenants.c.name.label("tenant"), tasks.c.name, number.label("version"))
        .select_from(tasks.join(tenants, tasks.c.tenant_id == tenants.c.id))
        .order_by(tenants.c.name, tasks.c.name)
    )
