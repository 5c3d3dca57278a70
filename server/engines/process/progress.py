"""Whether an engine makes progress, judged by what its process says of itself."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path

_PROC = Path("/proc")


class Progress:
    """Counts the turns in which an engine stood still.

    Time is counted in turns of whoever asks, not by a clock: where the server itself was stopped,
    or the whole machine, nobody was there to see the engine stand still.
    """

    def __init__(self) -> None:
        self.still = 0  # turns in a row
        self._begun = False  # has it said anything yet
        self._heard = self._moved = False
        self._mark: Hashable = None

    def hear(self, mark: Hashable) -> None:
        """The process has said how far it is; another mark than the last one is progress."""
        self._begun = self._heard = True
        self._moved = self._moved or mark != self._mark
        self._mark = mark

    def turn(self, *, busy: bool) -> None:
        """Count a turn, in which the engine had requests if `busy`: then it has to move on."""
        well = self._heard and (self._moved or not busy)
        self.still = 0 if well or not self._begun else self.still + 1
        self._heard = self._moved = False


def processes_of(session: int) -> tuple[int, ...]:
    """The ids of the processes of a session, where the system tells."""
    found = (int(path.name) for path in _PROC.glob("[0-9]*"))
    return tuple(pid for pid in found if _stat(pid)[3:4] == [str(session)])


def any_stopped(pids: Iterable[int]) -> bool:
    """Whether a signal has stopped one of these processes (a debugger's stop does not count)."""
    return any(_stat(pid)[:1] == ["T"] for pid in pids)


def _stat(pid: int) -> list[str]:
    """What /proc tells of a process, from its state on: state, parent, group, session, ..."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return []
