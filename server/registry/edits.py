"""Changes to registered tasks other than a new router: which version is current, names, sharing.

Every change is one transaction with one row of the audit table, and is known here when it returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Table, and_, delete, func, insert, select, update

from polyrex.adapters.errors import InventoryMismatch, UnknownTask
from polyrex.server.errors import InvalidRequest, UnknownTenant

from .database import Change
from .names import ALIAS, Reference, check_labels, check_tenant_name
from .principal import OPERATOR, Principal, Role
from .records import TaskRecord, VersionRecord
from .registration import check_tasks_quota
from .registry import TaskRegistry
from .routers import delete_versions
from .rows import Expected, TaskRow, check_expected, load_task, load_version, own_task
from .schema import aliases, idempotency, shares, tasks, tenants, versions

MOST_ALIASES = 100
MOST_SHARES = 1000
"""The most aliases of one task, and the most tenants that it is shared with."""

_PURGED_AT_ONCE = 100
"""Tasks that one transaction purges, so that others need not wait long for their turn."""

Fields = Mapping[str, Any]
"""New values of columns of `tasks`."""

Edit = Callable[[Change, TaskRow], Fields | None]
"""Changes a task within a transaction, and returns further columns to set; None: as it was."""


class TaskEdits:
    """Changes tasks in the registry's database; every method may be called from any thread.

    Each names a task as requests do, without a version, and returns it as it stands afterwards.
    What is so already stays as it is, without a new revision. All of them raise UnknownTask where
    there is no such task or version, or the asker may not change it; PreconditionFailed where the
    task is not as `expected`; StorageError.
    """

    def __init__(self, registry: TaskRegistry) -> None:
        self._registry = registry

    def drop(self, asker: Principal, name: str, expected: Expected = None) -> TaskRecord:
        """Take a task out of service; it keeps all it has until it is purged."""
        return self._edit(asker, name, expected, "drop", lambda *_: {"deleted": time.time()})

    def undelete(self, asker: Principal, name: str, expected: Expected = None) -> TaskRecord:
        """Take back a drop. Raises QuotaExceeded where the tenant has no room left for the task."""

        def edit(change: Change, task: TaskRow) -> Fields | None:
            if task.deleted is None:
                return None
            owner = select(tenants).where(tenants.c.id == task.tenant_id)
            tenant = change.connection.execute(owner).one()
            check_tasks_quota(change.connection, tenant.id, tenant.quotas)
            return {"deleted": None}

        return self._edit(asker, name, expected, "undelete", edit, deleted=True)

    def select(
        self, asker: Principal, name: str, version: int | None, expected: Expected = None
    ) -> TaskRecord:
        """Make a version the current one; without a number, the last kept one before the current.

        A canary of that version ends: all requests go to it now. Raises InventoryMismatch where
        the version was made for another inventory, InvalidRequest where no earlier one is kept.
        """

        def edit(change: Change, task: TaskRow) -> Fields | None:
            number = _previous(change, task) if version is None else version
            if number == task.current_version:
                return None
            self._servable(change, task, number)
            ended = {"canary_version": None, "canary_share": None}
            return {"current_version": number} | (ended if number == task.canary_version else {})

        return self._edit(asker, name, expected, "select", edit)

    def set_alias(
        self, asker: Principal, name: str, alias: str, version: int, expected: Expected = None
    ) -> TaskRecord:
        """Give a version another name, or move that name to it; raises InvalidRequest."""
        if not ALIAS.fullmatch(alias):
            raise InvalidRequest(f"an alias matches {ALIAS.pattern}, got {alias!r:.80}", "alias")

        def edit(change: Change, task: TaskRow) -> Fields | None:
            _version(change, task, version)
            where = and_(aliases.c.task_id == task.id, aliases.c.name == alias)
            found = change.connection.execute(select(aliases.c.version).where(where)).scalar()
            if found == version:
                return None
            if found is not None:
                change.connection.execute(update(aliases).where(where).values(version=version))
                return {}
            _check_room(change, task, aliases, MOST_ALIASES, "alias")
            row = {"task_id": task.id, "name": alias, "version": version}
            change.connection.execute(insert(aliases), row)
            return {}

        return self._edit(asker, name, expected, "set_alias", edit, f"{alias}: {version}")

    def remove_alias(
        self, asker: Principal, name: str, alias: str, expected: Expected = None
    ) -> TaskRecord:
        """Take a version's other name away; raises UnknownTask where there is none."""

        def edit(change: Change, task: TaskRow) -> Fields:
            where = and_(aliases.c.task_id == task.id, aliases.c.name == alias)
            if not change.connection.execute(delete(aliases).where(where)).rowcount:
                raise UnknownTask
            return {}

        return self._edit(asker, name, expected, "remove_alias", edit, alias)

    def set_canary(
        self,
        asker: Principal,
        name: str,
        version: int,
        share: float,
        expected: Expected = None,
    ) -> TaskRecord:
        """Let another version answer a share of the task's requests, from 0 to 1.

        Raises InventoryMismatch where the version was made for another inventory, InvalidRequest
        where it is the current one.
        """

        def edit(change: Change, task: TaskRow) -> Fields | None:
            self._servable(change, task, version)
            if version == task.current_version:
                raise InvalidRequest(f"version {version} is the current one", "version")
            if (version, share) == (task.canary_version, task.canary_share):
                return None
            return {"canary_version": version, "canary_share": share}

        return self._edit(asker, name, expected, "set_canary", edit, f"{version}: {share}")

    def remove_canary(self, asker: Principal, name: str, expected: Expected = None) -> TaskRecord:
        """Let the current version answer every request again; raises UnknownTask without canary."""

        def edit(_change: Change, task: TaskRow) -> Fields:
            if task.canary_version is None:
                raise UnknownTask
            return {"canary_version": None, "canary_share": None}

        return self._edit(asker, name, expected, "remove_canary", edit)

    def share(
        self, asker: Principal, name: str, tenant: str, expected: Expected = None
    ) -> TaskRecord:
        """Let another tenant use a task; raises InvalidRequest where it is the owner.

        Only a server admin is told that there is no such tenant (UnknownTenant). Anybody else may
        share with a name that no tenant has yet, and so does not learn which tenants there are.
        """
        check_tenant_name(tenant, "tenant")

        def edit(change: Change, task: TaskRow) -> Fields | None:
            if asker.role is Role.server_admin and not _is_tenant(change, tenant):
                raise UnknownTenant
            if tenant == task.tenant:
                raise InvalidRequest("the task is this tenant's own", "tenant")
            row = {"task_id": task.id, "tenant": tenant}
            where = and_(shares.c.task_id == task.id, shares.c.tenant == tenant)
            if change.connection.execute(select(shares).where(where)).first():
                return None
            _check_room(change, task, shares, MOST_SHARES, "tenant")
            change.connection.execute(insert(shares), row)
            return {}

        return self._edit(asker, name, expected, "share", edit, tenant)

    def unshare(
        self, asker: Principal, name: str, tenant: str, expected: Expected = None
    ) -> TaskRecord:
        """Take back a share; raises UnknownTask where the task is not shared with the tenant."""

        def edit(change: Change, task: TaskRow) -> Fields:
            where = and_(shares.c.task_id == task.id, shares.c.tenant == tenant)
            if not change.connection.execute(delete(shares).where(where)).rowcount:
                raise UnknownTask
            return {}

        return self._edit(asker, name, expected, "unshare", edit, tenant)

    def set_labels(
        self, asker: Principal, name: str, labels: Mapping[str, str], expected: Expected = None
    ) -> TaskRecord:
        """Replace a task's labels; raises InvalidRequest where no task may have them."""
        check_labels(labels)

        def edit(_change: Change, task: TaskRow) -> Fields | None:
            return None if labels == task.labels else {"labels": dict(labels)}

        return self._edit(asker, name, expected, "set_labels", edit)

    def purge(self, dropped_before: float) -> int:
        """Delete for good what tasks had that were dropped before this unix time; returns how many.

        Their rows stay, so that no version number of theirs is ever used again.
        """
        due = and_(tasks.c.deleted < dropped_before, tasks.c.current_version.is_not(None))
        statement = select(tasks.c.id).where(due).order_by(tasks.c.id).limit(_PURGED_AT_ONCE)
        purged = 0
        while True:
            with self._registry.database.read() as connection:  # nothing to do takes no lock
                found = connection.execute(statement).first()
            if found is None:
                return purged
            with self._registry.change(OPERATOR) as change:
                ids = list(change.connection.execute(statement).scalars())
                for task_id in ids:
                    _purge(change, task_id)
            purged += len(ids)

    def _edit(
        self,
        asker: Principal,
        name: str,
        expected: Expected,
        action: str,
        edit: Edit,
        detail: str | None = None,
        *,
        deleted: bool = False,
    ) -> TaskRecord:
        """Change a task in one transaction, with a row of the audit table."""
        reference = Reference.parse(name)
        if reference.selector is not None:  # these are changes to a task, not to a version
            raise UnknownTask
        with self._registry.database.read() as connection:  # a guess holds up nobody's changes
            own_task(connection, asker, reference, deleted=deleted)
        with self._registry.change(asker) as change:
            task = own_task(change.connection, asker, reference, deleted=deleted)
            check_expected(expected, task.changed)
            fields = edit(change, task)
            if fields is not None:
                number = fields.get("current_version")
                revision = change.record(action, "task", task.id, version=number, detail=detail)
                values = {**fields, "changed": revision}
                change.connection.execute(update(tasks).where(tasks.c.id == task.id).values(values))
            record = load_task(change.connection, task.id)
        assert record is not None  # own_task gives only tasks that have a current version
        return record

    def _servable(self, change: Change, task: TaskRow, number: int) -> None:
        """Raise UnknownTask without such a version, InventoryMismatch if it cannot answer here."""
        found = _version(change, task, number)
        served = self._registry.inventory.sha256
        if found.inventory_sha256 != served:
            raise InventoryMismatch(
                f"version {number} was made for the inventory {found.inventory_sha256}, "
                f"and the server has {served}"
            )


def _purge(change: Change, task_id: int) -> None:
    """Delete all that a task has but its row, and the routers that no version has any more."""
    execute = change.connection.execute
    of_task = versions.c.task_id == task_id
    numbers = execute(select(versions.c.version).where(of_task)).scalars().all()
    delete_versions(change.connection, task_id, numbers)
    for table in (aliases, shares, idempotency):
        execute(delete(table).where(table.c.task_id == task_id))
    gone: dict[str, Any] = {
        "current_version": None,
        "canary_version": None,
        "canary_share": None,
        "labels": {},
    }
    revision = change.record("purge", "task", task_id)
    execute(update(tasks).where(tasks.c.id == task_id).values(**gone, changed=revision))


def _version(change: Change, task: TaskRow, number: int) -> VersionRecord:
    found = load_version(change.connection, task.id, number)
    if found is None:
        raise UnknownTask
    return found


def _previous(change: Change, task: TaskRow) -> int:
    """The number of the last version before the current one; raises InvalidRequest if none."""
    earlier = and_(versions.c.task_id == task.id, versions.c.version < task.current_version)
    found = change.connection.execute(select(func.max(versions.c.version)).where(earlier)).scalar()
    if found is None:
        raise InvalidRequest("no version before the current one is kept", "version")
    return int(found)


def _check_room(change: Change, task: TaskRow, table: Table, most: int, param: str) -> None:
    """Raise InvalidRequest where a table has as many rows of a task as it may have."""
    count = select(func.count()).select_from(table).where(table.c.task_id == task.id)
    if change.connection.execute(count).scalar_one() >= most:
        raise InvalidRequest(f"a task has at most {most} {table.name}", param)


def _is_tenant(change: Change, name: str) -> bool:
    named = select(tenants.c.id).where(tenants.c.name == name)
    return change.connection.execute(named).first() is not None
