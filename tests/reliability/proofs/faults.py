"""A disk that fails: at every sync of a run in turn, nothing acknowledged is lost."""

from __future__ import annotations

from pathlib import Path

from reliability.result import Result
from support.storage.disk_faults import Result as Found
from support.storage.disk_faults import Sweep, build_shim, run_fault_sweeps

CHANGES = 250
"""Each change syncs at least once, so every failing sync up to 200 is reached."""

_MODES: tuple[dict[str, bool], ...] = ({}, {"lasting": True}, {"until_failure": True})
"""One sync fails; all fail from then on; one fails and the server is killed at once."""


def disk_faults(folder: Path, *, error: str, syncs: int, settling: bool = True) -> Result:
    """Let the first sync of a run fail, then, in a run of its own, the second, and so on.

    `error`: EIO or ENOSPC. Without `settling`, a planted defect, failed transactions stay in
    SQLite's log. Raises SystemExit without gcc.
    """
    shim = build_shim(folder)
    if shim is None:
        raise SystemExit("gcc is not installed")
    calls = tuple(range(1, syncs + 1))
    sweeps = [Sweep("sync", error, calls, CHANGES, settling=settling, **mode) for mode in _MODES]
    found = sum(run_fault_sweeps(folder, shim, sweeps), Found())
    wrong = {
        "acknowledged and lost": found.lost,
        "refused and there": found.invented,
        "gaps": found.gaps,
        "files that could not be opened": found.unusable,
    }
    return Result(
        goal=f"{error} at every sync",
        length=f"{found.runs} runs, each with another failing sync",
        figures={
            "runs": found.runs,
            "runs in which the sync failed": found.failed,
            "acknowledged": found.acknowledged,
            "refused": found.refused,
            "outcome unknown": found.unknown,
            **wrong,
        },
        at_most=dict.fromkeys(wrong, 0),
        at_least={"runs in which the sync failed": len(_MODES) * syncs},
    )
