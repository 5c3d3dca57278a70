"""The registered tasks: a folder of router files, each task a name with a version.

`<name>@<version>.safetensors` is a task version, byte for byte as it was registered. An inventory
may come with tasks of its own, `<name>.safetensors` in its `routers/` folder, which is never
written to: `<name>.dropped` in the registry's folder hides one of them. Every change is one rename
or one deletion, so a crash leaves the state before or after it.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from bisect import bisect_right, insort
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from polyrex.adapters.errors import FileError, InvalidTaskName, TaskExists, UnknownTask

from .inventory import Inventory
from .router import Router, read_router, size_limit
from .task import TaskInfo, TaskVersion
from .tensor_file import PARTIAL_SUFFIX, stage, sync_folder, write_atomic

logger = logging.getLogger(__name__)

TASK_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_FILE_NAME = re.compile(rf"({TASK_NAME.pattern})(?:@([1-9][0-9]{{0,8}}))?\.safetensors")


TaskPage = list[TaskInfo]


class _Entry(NamedTuple):
    """The part of a task that stays in memory; the rest is read from its file on demand."""

    path: str
    version: int
    sha256: str
    size_bytes: int
    created: float


class TaskRegistry:
    """The tasks of one inventory; every method may be called from any thread.

    `shipped` is a folder of routers that came with the inventory. A file that is corrupt, or that
    does not fit the inventory, stays where it is, is logged, and is listed in `rejected`.
    """

    def __init__(self, folder: Path, inventory: Inventory, shipped: Path | None = None) -> None:
        self._folder = folder
        self.inventory = inventory
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._rejected: dict[str, str] = {}
        self._rejected_versions: dict[str, int] = {}  # their files stay, and are not overwritten
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f".*{PARTIAL_SUFFIX}"):
            leftover.unlink()
        if shipped is not None:
            self._scan(shipped)
        self._shipped = frozenset(self._entries)
        for name in self._shipped:
            if self._tombstone(name).exists():
                del self._entries[name]
        self._scan(folder)
        self._names = sorted(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def rejected(self) -> Mapping[str, str]:
        """The files that were rejected at start: path -> reason."""
        return MappingProxyType(self._rejected)

    def register(self, name: str, data: bytes, *, replace: bool = False) -> tuple[TaskInfo, bool]:
        """Register a router's file under a name; returns the task, and whether the name is new.

        The same bytes again change nothing. Raises InvalidTaskName, FileError where the router is
        not one of this inventory, TaskExists where the name has another router and not `replace`.
        """
        if not TASK_NAME.fullmatch(name):
            raise InvalidTaskName(f"a task name matches {TASK_NAME.pattern}, got {name!r:.80}")
        router = read_router(data, f"router of task {name}", self.inventory)
        with self._lock:
            if same := self._same(name, router, replace):
                return _info(name, same, router), False
        # Waits for the disk without holding the lock.
        staged = stage(self._folder / name, data)
        try:
            with self._lock:
                if same := self._same(name, router, replace):
                    return _info(name, same, router), False
                entry, new = self._put(name, staged, router)
        finally:
            staged.unlink(missing_ok=True)
        sync_folder(self._folder)
        return _info(name, entry, router), new

    def pin(self, name: str) -> TaskVersion:
        """The task's current version, its router read from disk.

        Raises UnknownTask, or FileError where the file was damaged after it was registered.
        """
        with self._lock:  # also while reading: a replacement deletes the file
            entry = self._entry(name)
            router = self._read(Path(entry.path))
        if router.sha256 != entry.sha256:
            raise FileError(f"{entry.path}: the file has changed since it was registered")
        return TaskVersion(_info(name, entry, router), router)

    def info(self, name: str) -> TaskInfo:
        """The task's current version without its router; raises as `pin` does."""
        return self.pin(name).info

    def drop(self, name: str) -> None:
        """Forget a task; raises UnknownTask. Whoever has pinned a version goes on with it."""
        with self._lock:
            entry = self._entry(name)
            if name in self._shipped:
                write_atomic(self._tombstone(name), b"")
            if Path(entry.path).parent == self._folder:
                os.unlink(entry.path)
            del self._entries[name]
            self._names.remove(name)
        sync_folder(self._folder)

    def list(self, after: str | None = None, limit: int = 100) -> TaskPage:
        """Up to `limit` tasks in the order of their names, beginning behind the name `after`."""
        with self._lock:
            start = 0 if after is None else bisect_right(self._names, after)
            names = self._names[start : start + limit]
            entries = [(name, self._entries[name]) for name in names]
        page = []
        for name, entry in entries:
            try:
                page.append(self.info(name))
            except UnknownTask:
                continue  # dropped since
            except FileError as error:
                logger.error("task %s: %s", name, error)
                page.append(_info(name, entry, None, description=str(error)))
        return page

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise UnknownTask(f"no task {name!r:.80}")
        return self._entries[name]

    def _same(self, name: str, router: Router, replace: bool) -> _Entry | None:
        """The name's entry where it has this very router; raises TaskExists for another one."""
        entry = self._entries.get(name)
        if entry is None or entry.sha256 == router.sha256:
            return entry
        if not replace:
            raise TaskExists(f"task {name} exists with another router (sha256 {entry.sha256})")
        return None

    def _put(self, name: str, staged: Path, router: Router) -> tuple[_Entry, bool]:
        previous = self._entries.get(name)
        version = 1 + max(previous.version if previous else 0, self._rejected_versions.get(name, 0))
        path = self._folder / f"{name}@{version}.safetensors"
        os.replace(staged, path)
        entry = self._entries[name] = _new_entry(path, version, router)
        if previous is None:
            insort(self._names, name)
        elif Path(previous.path).parent == self._folder:
            os.unlink(previous.path)
        return entry, previous is None

    def _scan(self, folder: Path) -> None:
        """Take the newest version of every task in a folder; it replaces one taken before."""
        files = []
        for path in folder.glob("*.safetensors"):
            if match := _FILE_NAME.fullmatch(path.name):
                files.append((int(match[2] or 1), match[1], path))
            else:
                self._reject(path, f"the name must be that of a task, {TASK_NAME.pattern}")
        taken: dict[str, int] = {}
        for version, name, path in sorted(files, reverse=True):
            try:
                router = self._read(path)
            except FileError as error:
                self._reject(path, str(error))
                known = self._rejected_versions.get(name, 0)
                self._rejected_versions[name] = max(known, version)
                continue
            if name not in taken:
                taken[name] = version
                self._entries[name] = _new_entry(path, version, router)
            elif version < taken[name] and folder == self._folder:
                path.unlink()  # the process ended between writing a version and deleting this one
            else:
                self._reject(path, f"version {taken[name]} of task {name} is taken from elsewhere")

    def _reject(self, path: Path, reason: str) -> None:
        logger.error("not registered: %s: %s", path, reason)
        self._rejected[str(path)] = reason

    def _read(self, path: Path) -> Router:
        try:
            with path.open("rb") as file:
                data = file.read(size_limit(self.inventory) + 1)
        except OSError as error:
            raise FileError(f"{path}: cannot be read: {error.strerror}") from error
        return read_router(data, str(path), self.inventory)

    def _tombstone(self, name: str) -> Path:
        return self._folder / f"{name}.dropped"


def _new_entry(path: Path, version: int, router: Router) -> _Entry:
    stat = path.stat()
    return _Entry(str(path), version, router.sha256, stat.st_size, stat.st_mtime)


def _info(name: str, entry: _Entry, router: Router | None, description: str = "") -> TaskInfo:
    metadata = router.metadata if router else None
    return TaskInfo(
        name=name,
        version=entry.version,
        router_sha256=entry.sha256,
        size_bytes=entry.size_bytes,
        created=entry.created,
        description=metadata.description if metadata else description,
        provenance=metadata.provenance if metadata else {},
        scores=metadata.scores if metadata else {},
    )
