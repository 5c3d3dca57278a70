"""Routers by their hash: how they are stored, and checked whenever they are read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import BindParameter, Connection, bindparam, delete, exists, insert, select, update

from polyrex.adapters.errors import FileError, InventoryMismatch
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.router import read_router
from polyrex.adapters.files.task import TaskInfo, TaskVersion
from polyrex.adapters.files.tensor_file import sha256
from polyrex.server.errors import TaskDamaged

from .memory.index import Entry
from .rows import IS_VERSION, version_record
from .schema import routers, versions

_DIGEST: BindParameter[Any] = bindparam("digest")
_DATA = select(routers.c.data).where(routers.c.sha256 == _DIGEST)
_STORED = insert(routers)
_REPAIRED = update(routers).where(routers.c.sha256 == _DIGEST)
_DELETED = delete(versions).where(IS_VERSION).returning(versions.c.router_sha256)
_UNUSED_DELETED = delete(routers).where(
    routers.c.sha256 == _DIGEST, ~exists().where(versions.c.router_sha256 == _DIGEST)
)
_VERSION_WITH_DATA = (
    select(versions, routers.c.data)
    .select_from(versions.outerjoin(routers, routers.c.sha256 == versions.c.router_sha256))
    .where(IS_VERSION)
)


def store_router(connection: Connection, data: bytes) -> bool:
    """Store a router's bytes; False where they were there already, undamaged."""
    digest = bytes.fromhex(sha256(data))
    found = connection.execute(_DATA, {"digest": digest}).scalar_one_or_none()
    if found == data:
        return False
    if found is None:
        connection.execute(_STORED, {"sha256": digest, "data": data})
    else:
        connection.execute(_REPAIRED, {"digest": digest, "data": data})
    return True


def delete_versions(connection: Connection, task_id: int, numbers: Iterable[int]) -> None:
    """Delete versions of a task, and the routers that no version has any more."""
    for number in numbers:
        is_it = {"of_task": task_id, "number": number}
        digest = connection.execute(_DELETED, is_it).scalar_one()
        connection.execute(_UNUSED_DELETED, {"digest": digest})


def read_version(
    connection: Connection, entry: Entry, number: int, inventory: Inventory
) -> TaskVersion | None:
    """A version of a task with its router; None where the task has no such version.

    Raises InventoryMismatch where it was made for another inventory, TaskDamaged where its bytes
    are not those that were registered.
    """
    is_it = {"of_task": entry.id, "number": number}
    row = connection.execute(_VERSION_WITH_DATA, is_it).one_or_none()
    if row is None:
        return None
    about = version_record(row)
    if about.inventory_sha256 != inventory.sha256:
        raise InventoryMismatch(
            f"this version was made for inventory {about.inventory_sha256}, "
            f"this server has {inventory.sha256}"
        )
    if row.data is None or sha256(row.data) != about.router_sha256:
        raise TaskDamaged("the task's router is damaged; registering it again repairs it")
    info = TaskInfo(
        name=entry.name,
        version=number,
        router_sha256=about.router_sha256,
        size_bytes=about.size_bytes,
        created=about.created,
        description=about.description,
        provenance=about.provenance,
        scores=about.scores,
        tenant=entry.tenant,
    )
    try:
        return TaskVersion(info, read_router(row.data, f"router of task {entry.name}", inventory))
    except FileError as error:
        raise TaskDamaged(f"the task's router cannot be read: {error}") from error
