"""Reads tasks and versions from the database, and decides in SQL who sees which.

index.py decides the same from memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    bindparam,
    exists,
    select,
)

from polyrex.adapters.errors import UnknownTask
from polyrex.server.errors import PreconditionFailed

from .names import Reference
from .principal import Principal, Role
from .records import Canary, TaskRecord, VersionRecord
from .schema import aliases, shares, tasks, tenants, versions

TaskRow = Row[Any]
"""A row of `tasks` with all its columns, and `tenant`, its owner's name."""


# Statements that every registration runs are built once: building one takes as long as running it.
# Tasks are given to them as `ids`, a version as `of_task` and `number`.
OF_IDS: BindParameter[Any] = bindparam("ids", expanding=True)
ALIASES = select(aliases.c.task_id, aliases.c.name, aliases.c.version).order_by(aliases.c.name)
ALIASES_OF = ALIASES.where(aliases.c.task_id.in_(OF_IDS))
SHARES = select(shares.c.task_id, shares.c.tenant).order_by(shares.c.tenant)
SHARES_OF = SHARES.where(shares.c.task_id.in_(OF_IDS))
IS_CURRENT = and_(versions.c.task_id == tasks.c.id, versions.c.version == tasks.c.current_version)
_CURRENT_OF = select(versions).join(tasks, IS_CURRENT).where(tasks.c.id.in_(OF_IDS))
IS_VERSION = (versions.c.task_id == bindparam("of_task")) & (
    versions.c.version == bindparam("number")
)
_VERSION = select(versions).where(IS_VERSION)


class Existence(Enum):
    """What a client may expect of a task without knowing its revision."""

    present = "present"  # If-Match: *
    absent = "absent"  # If-None-Match: *


Expected = int | Existence | None
"""What a client expects of a task: the revision in which it changed last, whether it is there, or
nothing."""


def check_expected(expected: Expected, changed: int | None) -> None:
    """Raise PreconditionFailed unless a task that last changed in this revision was expected.

    `changed` is None where there is no such task.
    """
    if expected is None:
        return
    if expected is Existence.absent:
        met = changed is None
    elif expected is Existence.present:
        met = changed is not None
    else:
        met = changed == expected
    if not met:
        raise PreconditionFailed("the task is not as the request's condition says; look at it anew")


def is_live() -> ColumnElement[bool]:
    """The condition that a row of `tasks` has a current version and is not deleted."""
    return and_(tasks.c.current_version.is_not(None), tasks.c.deleted.is_(None))


def visible_task(
    connection: Connection, asker: Principal, reference: Reference, *, deleted: bool = False
) -> TaskRow:
    """The row of a task that the asker may use; with `deleted`, also one that he can undelete.

    Raises UnknownTask where there is none, or it is not for him to know.
    """
    owner = reference.tenant or asker.tenant
    owned = _owns(asker, owner)
    named = {"owner": owner, "task": reference.name}
    # One statement whatever there is: nobody learns from the time it takes which names others use.
    if owned:
        row = connection.execute(_NAMED, named).one_or_none()
    else:
        row = connection.execute(_SHARED, named | {"guest": asker.tenant}).one_or_none()
    if row is None or not (_is_live(row) or (deleted and _is_deleted(row) and owned)):
        raise UnknownTask
    return row


def own_task(
    connection: Connection, asker: Principal, reference: Reference, *, deleted: bool = False
) -> TaskRow:
    """The row of a task that the asker may change; raises UnknownTask as `visible_task`."""
    if not _owns(asker, reference.tenant or asker.tenant):
        raise UnknownTask
    return visible_task(connection, asker, reference, deleted=deleted)


def select_task() -> Select[Any]:
    """The statement that gives rows of `tasks`, each with its owner's name as `tenant`."""
    return select(tasks, tenants.c.name.label("tenant")).join_from(
        tasks, tenants, tasks.c.tenant_id == tenants.c.id
    )


_TASKS_OF = select_task().where(tasks.c.id.in_(OF_IDS))
_NAMED = select_task().where(
    tenants.c.name == bindparam("owner"), tasks.c.name == bindparam("task")
)
_SHARED = _NAMED.where(
    exists().where(shares.c.task_id == tasks.c.id, shares.c.tenant == bindparam("guest"))
)


def _is_live(row: TaskRow) -> bool:
    return row.current_version is not None and row.deleted is None


def _is_deleted(row: TaskRow) -> bool:
    return row.current_version is not None and row.deleted is not None


def _owns(asker: Principal, tenant: str) -> bool:
    return asker.role is Role.server_admin or asker.tenant == tenant


def load_task(connection: Connection, task_id: int) -> TaskRecord | None:
    """A task as it stands, deleted or not; None where it has no current version."""
    found = load_tasks(connection, connection.execute(_TASKS_OF, {"ids": [task_id]}).all())
    return found[0] if found else None


def load_tasks(connection: Connection, rows: Sequence[TaskRow]) -> list[TaskRecord]:
    """The tasks of rows in their order, without those that have no current version.

    It asks as often for a thousand rows as for one.
    """
    ids = [row.id for row in rows]
    of_ids = connection.execute(_CURRENT_OF, {"ids": ids})
    current = {row.task_id: version_record(row) for row in of_ids}
    named: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for alias in connection.execute(ALIASES_OF, {"ids": ids}):
        named[alias.task_id][alias.name] = alias.version
    shared: defaultdict[int, list[str]] = defaultdict(list)
    for share in connection.execute(SHARES_OF, {"ids": ids}):
        shared[share.task_id].append(share.tenant)
    return [
        _task(row, current[row.id], named[row.id], tuple(shared[row.id]))
        for row in rows
        if row.id in current
    ]


def load_version(connection: Connection, task_id: int, version: int) -> VersionRecord | None:
    """One version of a task; None where it never was, or is gone."""
    wanted = {"of_task": task_id, "number": version}
    row = connection.execute(_VERSION, wanted).one_or_none()
    return None if row is None else version_record(row)


def load_versions(connection: Connection, task_id: int) -> list[VersionRecord]:
    """The versions of a task that are kept, in the order of their numbers."""
    is_of_task = versions.c.task_id == task_id
    statement = select(versions).where(is_of_task).order_by(versions.c.version)
    return [version_record(row) for row in connection.execute(statement)]


def selected_version(connection: Connection, row: TaskRow, reference: Reference) -> VersionRecord:
    """The version that a reference selects of its task; raises UnknownTask where there is none."""
    number = row.current_version
    if isinstance(reference.selector, int):
        number = reference.selector
    elif reference.selector is not None:
        wanted = and_(aliases.c.task_id == row.id, aliases.c.name == reference.selector)
        number = connection.execute(select(aliases.c.version).where(wanted)).scalar_one_or_none()
    found = None if number is None else load_version(connection, row.id, number)
    if found is None:
        raise UnknownTask
    return found


def version_record(row: Row[Any]) -> VersionRecord:
    """A row of `versions` as a record."""
    return VersionRecord(
        version=row.version,
        router_sha256=row.router_sha256.hex(),
        inventory_sha256=row.inventory_sha256,
        size_bytes=row.size_bytes,
        created=row.created,
        description=row.description,
        template=row.template,
        provenance=row.provenance,
        scores=row.scores,
    )


def _task(
    row: TaskRow, current: VersionRecord, named: Mapping[str, int], shared_with: tuple[str, ...]
) -> TaskRecord:
    canary = row.canary_version
    return TaskRecord(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        current=current,
        last_version=row.last_version,
        created=row.created,
        changed=row.changed,
        labels=row.labels,
        aliases=dict(named),
        canary=None if canary is None else Canary(canary, row.canary_share),
        shared_with=shared_with,
        deleted=row.deleted,
    )
