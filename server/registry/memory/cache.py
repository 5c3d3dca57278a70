"""The task versions that were used last, with their routers."""

from __future__ import annotations

import threading

from cachetools import LRUCache

from polyrex.adapters.files.task import TaskVersion

_CACHE_BYTES = 64 << 20
_OVERHEAD = 2048  # bytes of a version's objects beside its numbers, about


class VersionCache:
    """The versions used last, by task id and number, up to a number of bytes."""

    def __init__(self, most_bytes: int = _CACHE_BYTES) -> None:
        self._lock = threading.Lock()
        self._versions: LRUCache[tuple[int, int], TaskVersion] = LRUCache(most_bytes, _size)

    def get(self, task_id: int, number: int) -> TaskVersion | None:
        """The version, if it is here."""
        with self._lock:
            return self._versions.get((task_id, number))

    def put(self, task_id: int, version: TaskVersion) -> None:
        """Keep a version; one that is too large is not kept."""
        with self._lock:
            if _size(version) <= self._versions.maxsize:
                self._versions[task_id, version.info.version] = version

    def forget(self, task_id: int, number: int | None = None) -> None:
        """Forget one version of a task, or all."""
        with self._lock:
            for key in [key for key in self._versions if key[0] == task_id]:
                if number in (None, key[1]):
                    del self._versions[key]


def _size(version: TaskVersion) -> int:
    return version.router.logits.nbytes + version.router.weights.nbytes + _OVERHEAD
