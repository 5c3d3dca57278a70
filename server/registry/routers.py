"""Routers by their hash: how they are stored, and checked whenever they are read."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, and_, delete, exists, insert, select, update

from polyrex.adapters.errors import FileError, InventoryMismatch
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.router import read_router
from polyrex.adapters.files.task import TaskInfo, TaskVersion
from polyrex.adapters.files.tensor_file import sha256
from polyrex.server.errors import TaskDamaged

from .memory.index import Entry
from .rows import version_record
from .schema import routers, versions


def store_router(connection: Connection, data: bytes) -> bool:
    """Store a router's bytes; False where they were there already, undamaged."""
    digest = bytes.fromhex(sha256(data))
    is_it = routers.c.sha256 == digest
    found = connection.execute(select(routers.c.data).where(is_it)).scalar_one_or_none()
    if found == data:
        return False
    if found is None:
        connection.execute(insert(routers), {"sha256": digest, "data": data})
    else:
        connection.execute(update(routers).where(is_it).values(data=data))
    return True


def delete_versions(connection: Connection, task_id: int, numbers: Iterable[int]) -> None:
    """Delete versions of a task, and the routers that no version has any more."""
    for number in numbers:
        is_it = and_(versions.c.task_id == task_id, versions.c.version == number)
        digest = connection.execute(select(versions.c.router_sha256).where(is_it)).scalar_one()
        connection.execute(delete(versions).where(is_it))
        in_use = exists().where(versions.c.router_sha256 == digest)
        connection.execute(delete(routers).where(routers.c.sha256 == digest, ~in_use))


def read_version(
    connection: Connection, entry: Entry, number: int, inventory: Inventory
) -> TaskVersion | None:
    """A version of a task with its router; None where the task has no such version.

    Raises InventoryMismatch where it was made for another inventory, TaskDamaged where its bytes
    are not those that were registered.
    """
    is_it = and_(versions.c.task_id == entry.id, versions.c.version == number)
    joined = versions.outerjoin(routers, routers.c.sha256 == versions.c.router_sha256)
    statement = select(versions, routers.c.data).select_from(joined).where(is_it)
    row = connection.execute(statement).one_or_none()
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
