"""How many requests each version of a task with a canary answers, on this server."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Set

from .index import Entry


class CanaryCounts:
    """Counts requests that leave the choice between the current version and a canary to us."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_tasks: dict[int, Counter[int]] = {}
        self._totals: Counter[str] = Counter(current=0, canary=0)

    def count(self, entry: Entry, version: int) -> None:
        """Count a request that a version answers."""
        assert entry.canary is not None
        with self._lock:
            self._of_tasks.setdefault(entry.id, Counter())[version] += 1
            self._totals["canary" if version == entry.canary.version else "current"] += 1

    def of(self, task_id: int) -> Mapping[int, int]:
        """The requests of a task by version, since it has its canary."""
        with self._lock:
            return dict(self._of_tasks.get(task_id, {}))

    def totals(self) -> Mapping[str, int]:
        """The requests of all tasks, those that current versions answered and those of canaries."""
        with self._lock:
            return dict(self._totals)

    def forget(self, task_ids: Set[int]) -> None:
        """Forget tasks that have no canary any more."""
        with self._lock:
            for task_id in task_ids & self._of_tasks.keys():
                del self._of_tasks[task_id]
