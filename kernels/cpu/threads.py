"""Threads of OpenMP: how many there are, and how long they spin while they wait for each other.

A thread that waits spins before it sleeps; by default for milliseconds. Beside other busy processes
it so spins for one that has no core, uses up its own share of the cores, and every parallel region
of every layer waits for the scheduler: a request took six times as long. A thousand turns are
long enough for the regions of a model that has the cores to itself, and no more than some tens of
microseconds (`make bench-neighbours`).

OpenMP reads its variables as it is loaded, which is when torch is imported: this module imports
nothing that is slow, and is asked before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

SPINS = 1000
_CGROUP = Path("/sys/fs/cgroup")


def thread_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of OpenMP to set, for a process with this environment.

    What the environment sets already stays as it is. There are as many threads as cores; where a
    cgroup grants fewer than there are, as many as it grants.
    """
    found = {}
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        found["GOMP_SPINCOUNT"] = str(SPINS)
    quota, cores = cgroup_cores(), len(os.sched_getaffinity(0))
    if quota is not None and quota < cores and "OMP_NUM_THREADS" not in environment:
        found["OMP_NUM_THREADS"] = str(max(1, int(quota)))
    return found


def describe_threads(environment: Mapping[str, str]) -> str:
    """One line on the cores that were found, and on how threads use them in this environment."""
    environment = {**environment, **thread_variables(environment)}
    quota, cores = cgroup_cores(), len(os.sched_getaffinity(0))
    granted = "" if quota is None else f", {quota:.3g} granted by cgroup"
    threads = environment.get("OMP_NUM_THREADS", str(cores))
    policy, spins = (environment.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    waits = f"GOMP_SPINCOUNT={spins}" if spins else f"OMP_WAIT_POLICY={policy}"
    return f"{cores} cores{granted}: {threads} threads, which wait by {waits}"


def cgroup_cores() -> float | None:
    """The cores that cgroups grant, v2 or v1; None where there is no quota."""
    words = _words(_CGROUP / "cpu.max")
    if not words:
        words = [
            *_words(_CGROUP / "cpu" / "cpu.cfs_quota_us"),
            *_words(_CGROUP / "cpu" / "cpu.cfs_period_us"),
        ]
    if len(words) != 2 or words[0] in ("max", "-1"):
        return None
    return int(words[0]) / int(words[1])


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
