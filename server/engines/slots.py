"""Which row of the routing table holds which router."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

from polyrex.adapters.files.registry import TaskVersion


class SlotCache:
    """Rows of the routing table, known by the sha256 of the router that they hold.

    A slot in use by a running request stays; one that no request uses keeps its router until a
    new one needs the place, the longest unused first. Slot 0 is the base model's.
    """

    def __init__(self, slots: int, write: Callable[[int, TaskVersion], None]) -> None:
        """`slots` rows, the base model's included; `write` puts a task's weights into one."""
        self._write = write
        self._free = list(range(slots - 1, 0, -1))
        self._slots: OrderedDict[str, int] = OrderedDict()  # the longest unused first
        self._users: Counter[str] = Counter()

    @property
    def used(self) -> int:
        """How many slots running requests use."""
        return len(self._users)

    def acquire(self, task: TaskVersion) -> int | None:
        """The slot of a task version for one more request; None while all are in use."""
        sha256 = task.info.router_sha256
        if sha256 not in self._slots:
            slot = self._vacant()
            if slot is None:
                return None
            try:
                self._write(slot, task)
            except Exception:
                self._free.append(slot)
                raise
            self._slots[sha256] = slot
        self._slots.move_to_end(sha256)
        self._users[sha256] += 1
        return self._slots[sha256]

    def release(self, task: TaskVersion) -> None:
        """A request that acquired the task's slot is done with it."""
        sha256 = task.info.router_sha256
        self._users[sha256] -= 1
        if not self._users[sha256]:
            del self._users[sha256]

    def _vacant(self) -> int | None:
        if self._free:
            return self._free.pop()
        unused = next((sha256 for sha256 in self._slots if sha256 not in self._users), None)
        return None if unused is None else self._slots.pop(unused)
