"""Takes over a state folder of before there was a database.

`<name>@<version>.safetensors` was a task's version, `<name>.dropped` hid a task that came with the
inventory. What the database has moves to the folder's sub-folder `taken-over`. A crash at any point
loses nothing: the next start does again what is not done.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import and_, insert, select, update

from polyrex.adapters.errors import FileError
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.router import Router, read_router, size_limit
from polyrex.adapters.files.tensor_file import PARTIAL_SUFFIX
from polyrex.adapters.task_name import TASK_NAME
from polyrex.server.registry.database import Change, Database
from polyrex.server.registry.principal import DEFAULT_TENANT, OPERATOR
from polyrex.server.registry.registration import Registration, check_text, version_row
from polyrex.server.registry.routers import store_router
from polyrex.server.registry.rows import TaskRow, load_version
from polyrex.server.registry.schema import audit, tasks, tenants, versions
from polyrex.server.registry.storage.private import check_private

logger = logging.getLogger(__name__)

TAKEN_OVER = "taken-over"
"""The sub-folder of files that the database has."""

_ROUTER = re.compile(rf"({TASK_NAME.pattern})(?:@([1-9][0-9]{{0,8}}))?\.safetensors")
_DROPPED = re.compile(rf"({TASK_NAME.pattern})\.dropped")
_AT_ONCE = 100  # tasks in one transaction

Rejected = dict[str, str]
"""Files that could not be taken over: path -> reason."""


@dataclass(frozen=True)
class _File:
    """A router's file that can be used."""

    version: int
    path: Path
    data: bytes
    router: Router
    created: float


@dataclass
class _Task:
    """The files of one task."""

    name: str
    paths: list[tuple[int, Path]] = field(default_factory=list)
    dropped: Path | None = None
    files: list[_File] = field(default_factory=list)


def take_over(database: Database, inventory: Inventory, folder: Path) -> Rejected:
    """Import a state folder into the default tenant; returns the files that had to stay.

    They stay as they are, and their versions' numbers are not used again. Raises StorageError, or
    StartError where every user may write to the folder.
    """
    if folder.exists():
        check_private(folder)
    for leftover in folder.glob(f".*{PARTIAL_SUFFIX}"):
        leftover.unlink(missing_ok=True)
    rejected: Rejected = {}
    found = list(_find(folder, rejected).values())
    for start in range(0, len(found), _AT_ONCE):
        some = found[start : start + _AT_ONCE]
        for task in some:
            task.files = list(_usable(task, inventory, rejected))
        done: list[Path] = []
        with database.change(OPERATOR) as change:
            for task in some:
                done += _import(change, task, rejected)
        _move(done, folder / TAKEN_OVER)
    for path, reason in rejected.items():
        logger.error("not registered: %s: %s", path, reason)
    return rejected


def read_file(path: Path, inventory: Inventory) -> tuple[bytes, Router]:
    """A router's file that may be hostile; raises FileError, or FileNotFoundError."""
    try:
        with path.open("rb") as file:
            data = file.read(size_limit(inventory) + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    router = read_router(data, str(path), inventory)
    check_text(router, str(path))
    return data, router


def _find(folder: Path, rejected: Rejected) -> Mapping[str, _Task]:
    """The files of a folder by task, in the order of their names."""
    found: dict[str, _Task] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if match := _ROUTER.fullmatch(path.name):
            task = found.setdefault(match[1], _Task(match[1]))
            task.paths.append((int(match[2] or 1), path))
        else:
            reason = f"the name must be that of a task, {TASK_NAME.pattern}"
            rejected[str(path)] = reason
    for path in sorted(folder.glob("*.dropped")):
        if match := _DROPPED.fullmatch(path.name):
            found.setdefault(match[1], _Task(match[1])).dropped = path
    return found


def _usable(task: _Task, inventory: Inventory, rejected: Rejected) -> Iterator[_File]:
    for version, path in sorted(task.paths):
        try:
            data, router = read_file(path, inventory)
            yield _File(version, path, data, router, path.stat().st_mtime)
        except FileNotFoundError:
            continue  # another server with this folder has just taken it over
        except FileError as error:
            rejected[str(path)] = str(error)


def _import(change: Change, task: _Task, rejected: Rejected) -> list[Path]:
    """Bring a task into the database; returns the files that can go."""
    row = _row(change, task)
    revision, done, added = row.changed, [], []
    for file in task.files:
        known = load_version(change.connection, row.id, file.version)
        if known is None and not _was_used(change, row.id, file.version):
            revision = _add(change, row.id, file)
            added.append(file.version)
        elif known is None or known.router_sha256 != file.router.sha256:
            reason = f"version {file.version} of task {task.name} is taken from elsewhere"
            rejected[str(file.path)] = reason
            continue
        done.append(file.path)
    values = _values(task, row, added)
    if values:
        if not added:
            revision = change.record("reserve", "task", row.id)
        is_it = tasks.c.id == row.id
        change.connection.execute(update(tasks).where(is_it).values(**values, changed=revision))
    return [*done, task.dropped] if task.dropped else done


def _values(task: _Task, row: TaskRow, added: Sequence[int]) -> dict[str, Any]:
    """What changes in the task's row, by the numbers of the versions that were added."""
    last = max([row.last_version, *(version for version, _ in task.paths)])
    values: dict[str, Any] = {}
    if row.deleted is None:
        if added and (row.current_version is None or added[-1] > row.last_version):
            values["current_version"] = added[-1]
        elif task.dropped is not None and row.current_version is None:
            values["deleted"] = time.time()
            last = max(last, 1)  # that of the router that came with the inventory
    if last > row.last_version:
        values["last_version"] = last
    return values


def _row(change: Change, task: _Task) -> TaskRow:
    """The task's row, made if there is none."""
    owner = select(tenants.c.id).where(tenants.c.name == DEFAULT_TENANT)
    tenant_id = change.connection.execute(owner).scalar_one()
    is_it = and_(tasks.c.tenant_id == tenant_id, tasks.c.name == task.name)
    found = change.connection.execute(select(tasks).where(is_it)).one_or_none()
    if found is not None:
        return found
    created = min((file.created for file in task.files), default=time.time())
    values = {"tenant_id": tenant_id, "name": task.name, "created": created, "labels": {}}
    inserted = insert(tasks).values(values | {"changed": 0, "last_version": 0}).returning(tasks)
    return change.connection.execute(inserted).one()


def _was_used(change: Change, task_id: int, version: int) -> bool:
    """Whether a version was registered that is not kept any more."""
    is_it = and_(
        audit.c.subject == "task",
        audit.c.subject_id == str(task_id),
        audit.c.version == version,
    )
    return change.connection.execute(select(audit.c.revision).where(is_it)).first() is not None


def _add(change: Change, task_id: int, file: _File) -> int:
    """Insert a version; returns the revision."""
    name = file.path.name
    wanted = Registration(DEFAULT_TENANT, name, file.data, file.router)
    store_router(change.connection, file.data)
    row = version_row(task_id, file.version, wanted) | {"created": file.created}
    change.connection.execute(insert(versions), row)
    digest = bytes.fromhex(file.router.sha256)
    return change.record(
        "take_over", "task", task_id, version=file.version, router_sha256=digest, detail=name
    )


def _move(paths: Sequence[Path], folder: Path) -> None:
    """Move files that the database has; where that fails, the next start tries again."""
    if not paths:
        return
    try:
        folder.mkdir(exist_ok=True)
        for path in paths:
            if path.exists():
                os.replace(path, folder / path.name)
    except OSError as error:
        logger.warning("%s: taken over, but cannot be moved: %s", folder, error.strerror)
