"""Registers the routers that come with an inventory, as tasks of the default tenant."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, and_, func, select, update

from polyrex.adapters.errors import FileError, InvalidTaskName
from polyrex.adapters.files.inventory import Inventory
from polyrex.server.registry.database import Change, Database
from polyrex.server.registry.names import check_task_name
from polyrex.server.registry.principal import DEFAULT_TENANT, OPERATOR
from polyrex.server.registry.registration import Registration, register_in
from polyrex.server.registry.schema import tasks, tenants, versions

from .takeover import Rejected, read_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Step:
    """What a shipped router asks for: to be registered, or to be selected where it is known."""

    wanted: Registration
    task_id: int = 0
    known: int | None = None  # the version that has this router already


def register_shipped(database: Database, inventory: Inventory, folder: Path) -> Rejected:
    """Register the routers of a folder; returns the files that cannot be used.

    A router is registered where the tenant never had a task of its name, or where the current
    version came with an inventory too, and this router is new. A task that was dropped, or
    replaced, is left alone. Raises StorageError.
    """
    rejected: Rejected = {}
    found = _read(folder, inventory, rejected)
    with database.read() as connection:
        begun = bool(_steps(connection, found, inventory))
    if begun:
        with database.change(OPERATOR) as change:
            # Asked again: another server may have done it meanwhile.
            for step in _steps(change.connection, found, inventory):
                _take(change, step)
    for path, reason in rejected.items():
        logger.error("not registered: %s: %s", path, reason)
    return rejected


def _read(folder: Path, inventory: Inventory, rejected: Rejected) -> list[Registration]:
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            check_task_name(path.stem)
            data, router = read_file(path, inventory)
            wanted = Registration(
                DEFAULT_TENANT, path.stem, data, router, replace=True, shipped=True
            )
            found.append(wanted)
        except (FileError, InvalidTaskName) as error:
            rejected[str(path)] = str(error)
    return found


def _steps(
    connection: Connection, found: Sequence[Registration], inventory: Inventory
) -> list[_Step]:
    steps = (_step(connection, wanted, inventory) for wanted in found)
    return [step for step in steps if step is not None]


def _step(connection: Connection, wanted: Registration, inventory: Inventory) -> _Step | None:
    is_owner = and_(tasks.c.tenant_id == tenants.c.id, tenants.c.name == wanted.tenant)
    named = select(tasks).join(tenants, is_owner).where(tasks.c.name == wanted.name)
    task = connection.execute(named).one_or_none()
    if task is None or (task.deleted is None and task.current_version is None):
        return _Step(wanted)
    of_task = versions.c.task_id == task.id
    is_current = and_(of_task, versions.c.version == task.current_version)
    current = connection.execute(select(versions).where(is_current)).one_or_none()
    digest = bytes.fromhex(wanted.router.sha256)
    if task.deleted is not None or current is None or not current.shipped:
        return None
    if current.router_sha256 == digest:
        return None
    has_router = and_(of_task, versions.c.router_sha256 == digest)
    known = connection.execute(select(func.max(versions.c.version)).where(has_router)).scalar()
    if known is None:
        return _Step(wanted)
    # An older release, or a roll back, is not undone; another inventory's router is of no use here.
    if current.inventory_sha256 == inventory.sha256:
        return None
    return _Step(wanted, task.id, known)


def _take(change: Change, step: _Step) -> None:
    if step.known is None:
        register_in(change, step.wanted)
        return
    changed = change.record("select", "task", step.task_id, version=step.known)
    values = {"current_version": step.known, "changed": changed}
    change.connection.execute(update(tasks).where(tasks.c.id == step.task_id).values(values))
