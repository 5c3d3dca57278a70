"""Registers a router as the next version of a task, inside one change of the database."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Connection,
    Row,
    Select,
    and_,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)

from polyrex.adapters.errors import MalformedFile, TaskExists, UnknownTask
from polyrex.adapters.files.router import Router
from polyrex.server.errors import IdempotencyMismatch, QuotaExceeded

from .database import Change
from .records import TaskRecord, VersionRecord
from .routers import delete_versions, store_router
from .rows import IS_CURRENT, Expected, check_expected, is_live, load_task, load_version
from .schema import aliases, idempotency, shares, tasks, tenants, versions

_IDEMPOTENCY_SECONDS = 24 * 3600

_FOUND: Select[Any] = (
    select(
        tenants.c.id.label("tenant_id"),
        tenants.c.quotas,
        *(tasks.c[name] for name in ("id", "changed", "last_version", "current_version")),
        tasks.c.deleted,
        tasks.c.labels,
        versions.c.router_sha256,  # of the current version
    )
    .select_from(
        tenants.outerjoin(
            tasks, and_(tasks.c.tenant_id == tenants.c.id, tasks.c.name == bindparam("task"))
        ).outerjoin(versions, IS_CURRENT)
    )
    .where(tenants.c.name == bindparam("tenant"))
)
_NEW_TASK = insert(tasks).returning(tasks.c.id)
_NEW_VERSION = insert(versions)
_SET = update(tasks).where(tasks.c.id == bindparam("task_id"))
_NAMED = select(aliases.c.version).where(aliases.c.task_id == bindparam("task_id"))
_CANARY = select(tasks.c.canary_version).where(
    tasks.c.id == bindparam("task_id"), tasks.c.canary_version.is_not(None)
)
_PRUNABLE = select(versions.c.version).where(
    versions.c.task_id == bindparam("task_id"),
    versions.c.version <= bindparam("last"),
    versions.c.version.not_in(_NAMED),
    versions.c.version.not_in(_CANARY),
)

Found = Row[Any]
"""A tenant, and its task of some name: the columns of `_FOUND`; `id` is None where there is none.
"""


@dataclass(frozen=True)
class Registered:
    """What registering came to: the task as it stands, and the version that was asked for."""

    task: TaskRecord
    version: VersionRecord
    created: bool  # the name was new, or had been dropped


@dataclass(frozen=True)
class Registration:
    """A router that somebody wants to register, already checked."""

    tenant: str
    name: str
    data: bytes
    router: Router
    replace: bool = False
    expected: Expected = None
    labels: Mapping[str, str] | None = None  # None: as they are
    idempotency_key: str | None = None
    keep_versions: int = 1000
    shipped: bool = False

    def digest(self) -> bytes:
        """The sha256 of what is asked for."""
        labels = None if self.labels is None else sorted(self.labels.items())
        asked = [self.name, self.router.sha256, self.replace, labels, str(self.expected)]
        return hashlib.sha256(json.dumps(asked).encode()).digest()


def check_text(router: Router, source: str) -> None:
    """Raise MalformedFile where what a router says of itself cannot be stored as text."""
    # PostgreSQL's text has no NUL; half surrogates are refused where the file is parsed.
    template = router.metadata.provenance.get("instruction")
    for field, value in (("description", router.metadata.description), ("instruction", template)):
        if isinstance(value, str) and "\0" in value:
            raise MalformedFile(f"{source}: {field} holds a NUL character")


def register_in(change: Change, wanted: Registration) -> Registered:
    """Register, as `TaskRegistry.register` describes it."""
    connection = change.connection
    named = {"tenant": wanted.tenant, "task": wanted.name}
    found = connection.execute(_FOUND, named).one_or_none()
    if found is None:
        raise UnknownTask
    if wanted.idempotency_key is not None:
        before = _registered_before(change, found.tenant_id, wanted)
        if before is not None:
            return before
    live = found.current_version is not None and found.deleted is None
    check_expected(wanted.expected, found.changed if live else None)
    if live:
        task_id, number = found.id, _with_live(change, found, wanted)
    else:
        task_id, number = _without_live(change, found, wanted)
    if wanted.idempotency_key is not None:
        _remember(change, found.tenant_id, wanted, (task_id, number, not live))
    return _registered(connection, task_id, number, created=not live)


def check_before(
    connection: Connection,
    tenant: str,
    name: str,
    *,
    replace: bool,
    expected: Expected,
    idempotency_key: str | None,
) -> None:
    """Raise what `register_in` would, as far as it is known before there is a router."""
    found = connection.execute(_FOUND, {"tenant": tenant, "task": name}).one_or_none()
    if found is None:
        raise UnknownTask
    if idempotency_key is not None:
        of_tenant = idempotency.c.tenant_id == found.tenant_id
        came = select(idempotency.c.at).where(of_tenant, idempotency.c.key == idempotency_key)
        if connection.execute(came).first():
            return  # the same router again gets the first answer, whatever has happened since
    live = found.current_version is not None and found.deleted is None
    check_expected(expected, found.changed if live else None)
    if not live:
        check_tasks_quota(connection, found.tenant_id, found.quotas)
    elif not replace:
        raise TaskExists(f"task {name} is there already; send replace to give it a new version")


def _with_live(change: Change, found: Found, wanted: Registration) -> int:
    """Where the task is there: nothing, other labels, or the next version; the version's number."""
    current = found.router_sha256.hex()
    same = current == wanted.router.sha256
    same_labels = wanted.labels is None or dict(wanted.labels) == found.labels
    if not (same and same_labels) and not wanted.replace:
        what = "other labels" if same else f"another router (sha256 {current})"
        raise TaskExists(f"task {wanted.name} exists with {what}")
    if not same:
        return _add_version(change, found, found.id, wanted)
    number: int = found.current_version
    if store_router(change.connection, wanted.data):
        change.record("repair", "task", found.id, version=number)
    if not same_labels:
        changed = change.record("label", "task", found.id)
        values = {"labels": dict(wanted.labels or {}), "changed": changed}
        change.connection.execute(_SET, {"task_id": found.id} | values)
    return number


def _without_live(change: Change, found: Found, wanted: Registration) -> tuple[int, int]:
    """A new task, or a deleted one that begins again; its id, and its version's number."""
    connection = change.connection
    if not wanted.shipped:
        check_tasks_quota(connection, found.tenant_id, found.quotas)
    fresh = {"created": time.time(), "labels": dict(wanted.labels or {})}
    task_id: int
    if found.id is None:
        named = {"tenant_id": found.tenant_id, "name": wanted.name, "last_version": 0, "changed": 0}
        task_id = connection.execute(_NEW_TASK, named | fresh).scalar_one()
    else:
        task_id = found.id
        for table in (aliases, shares):
            connection.execute(delete(table).where(table.c.task_id == task_id))
        cleared = {"deleted": None, "canary_version": None, "canary_share": None}
        connection.execute(_SET, {"task_id": task_id} | cleared | fresh)
    return task_id, _add_version(change, found, task_id, wanted)


def _add_version(change: Change, found: Found, task_id: int, wanted: Registration) -> int:
    """Insert the next version of a task and make it the current one; returns its number."""
    connection = change.connection
    if not wanted.shipped:
        _check_bytes_quota(connection, found, len(wanted.data))
    store_router(connection, wanted.data)
    number: int = (found.last_version or 0) + 1
    digest = bytes.fromhex(wanted.router.sha256)
    connection.execute(_NEW_VERSION, version_row(task_id, number, wanted))
    changed = change.record("register", "task", task_id, version=number, router_sha256=digest)
    values: dict[str, Any] = {"current_version": number, "last_version": number}
    values["changed"] = changed
    if wanted.labels is not None:
        values["labels"] = dict(wanted.labels)
    connection.execute(_SET, {"task_id": task_id} | values)
    _prune(change, task_id, number - wanted.keep_versions)
    return number


def version_row(task_id: int, number: int, wanted: Registration) -> dict[str, Any]:
    """The row of `versions` for a new version."""
    about = wanted.router.metadata
    template = about.provenance.get("instruction")
    return {
        "task_id": task_id,
        "version": number,
        "router_sha256": bytes.fromhex(wanted.router.sha256),
        "inventory_sha256": about.inventory_sha256,
        "size_bytes": len(wanted.data),
        "created": time.time(),
        "shipped": wanted.shipped,
        "description": about.description,
        "template": template if isinstance(template, str) else None,
        "provenance": dict(about.provenance),
        "scores": dict(about.scores),
    }


def _prune(change: Change, task_id: int, last: int) -> None:
    """Delete the versions up to a number, but those that something names."""
    if last < 1:
        return
    connection = change.connection
    prunable = connection.execute(_PRUNABLE, {"task_id": task_id, "last": last}).scalars().all()
    for number in prunable:
        delete_versions(connection, task_id, [number])
        change.record("prune", "task", task_id, version=number)


def check_tasks_quota(
    connection: Connection, tenant_id: int, quotas: Mapping[str, int | None]
) -> None:
    """Raise QuotaExceeded where a tenant has no room for another task."""
    most = quotas.get("tasks")
    if most is None:
        return
    counted = select(func.count()).where(tasks.c.tenant_id == tenant_id, is_live())
    if connection.execute(counted).scalar_one() >= most:
        raise QuotaExceeded(f"the tenant has as many tasks as it may have, {most}")


def _check_bytes_quota(connection: Connection, found: Found, size: int) -> None:
    most = found.quotas.get("bytes")
    if most is None:
        return
    summed = (
        select(func.coalesce(func.sum(versions.c.size_bytes), 0))
        .join_from(versions, tasks, versions.c.task_id == tasks.c.id)
        .where(tasks.c.tenant_id == found.tenant_id)
    )
    if connection.execute(summed).scalar_one() + size > most:
        raise QuotaExceeded(f"the tenant's versions may have {most} bytes together")


def _registered_before(change: Change, tenant_id: int, wanted: Registration) -> Registered | None:
    """What the request with this Idempotency-Key came to; None where none has come.

    Its router is repaired. Raises IdempotencyMismatch where it was another request, or what it
    registered is not served any more.
    """
    connection = change.connection
    is_it = and_(idempotency.c.tenant_id == tenant_id, idempotency.c.key == wanted.idempotency_key)
    found = connection.execute(select(idempotency).where(is_it)).one_or_none()
    if found is None:
        return None
    if found.digest != wanted.digest():
        raise IdempotencyMismatch("this Idempotency-Key came before, with another request")
    try:
        before = _registered(connection, found.task_id, found.version, created=found.created_task)
    except LookupError as error:
        raise IdempotencyMismatch(
            "what this Idempotency-Key registered is gone; send another key"
        ) from error
    if before.task.deleted is not None:
        raise IdempotencyMismatch(
            "the task that this Idempotency-Key registered was dropped since; undelete it, or send "
            "another key"
        )
    if store_router(connection, wanted.data):
        change.record("repair", "task", found.task_id, version=found.version)
    return before


def _remember(
    change: Change, tenant_id: int, wanted: Registration, outcome: tuple[int, int, bool]
) -> None:
    """Note what a request with an Idempotency-Key came to, and forget those of long ago."""
    task_id, number, created = outcome
    if not change.recorded:
        change.record("confirm", "task", task_id, version=number)
    now = time.time()
    old = idempotency.c.at < now - _IDEMPOTENCY_SECONDS
    change.connection.execute(delete(idempotency).where(old))
    row = {
        "tenant_id": tenant_id,
        "key": wanted.idempotency_key,
        "digest": wanted.digest(),
        "task_id": task_id,
        "version": number,
        "created_task": created,
        "at": now,
    }
    change.connection.execute(insert(idempotency), row)


def _registered(connection: Connection, task_id: int, number: int, *, created: bool) -> Registered:
    task = load_task(connection, task_id)
    if task is None:
        raise LookupError
    is_current = task.current.version == number
    version = task.current if is_current else load_version(connection, task_id, number)
    if version is None:
        raise LookupError
    return Registered(task, version, created)
