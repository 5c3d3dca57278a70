"""The slots of the routing table, and the tasks that use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from polyrex.adapters.files.task import TaskVersion
from polyrex.kernels.places import Places


class SlotCache:
    """Gives task versions slots, which are rows of the routing table.

    A task version is known by the sha256 of its router. It keeps its slot while requests use it,
    and then until another one needs the slot; the longest unused slot is taken first. Slot 0 is the
    base model's.
    """

    def __init__(self, slots: int, write: Callable[[int, TaskVersion], None]) -> None:
        """`slots` includes the base model's; `write` puts a task's weights into a slot."""
        self._write = write
        self._places = Places[str](slots - 1)
        self._users: Counter[str] = Counter()

    @property
    def used(self) -> int:
        """The number of slots that running requests use."""
        return len(self._users)

    def acquire(self, task: TaskVersion) -> int | None:
        """The slot of a task version for one more request; None while all are in use."""
        sha256 = task.info.router_sha256
        known = sha256 in self._places
        if not known and self.used == self._places.capacity:
            return None
        slot = 1 + self._places.take(sha256, keep=self._users).number
        if not known:
            try:
                self._write(slot, task)
            except Exception:
                self._places.give_back(sha256)
                raise
        self._users[sha256] += 1
        return slot

    def release(self, task: TaskVersion) -> None:
        """Give up the slot that one request acquired for the task."""
        sha256 = task.info.router_sha256
        self._users[sha256] -= 1
        if not self._users[sha256]:
            del self._users[sha256]
