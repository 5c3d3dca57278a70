"""Plans for processes of load (load.py), and what they found."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

LOAD = Path(__file__).with_name("load.py")

REFUSALS = (429, 503)
"""The statuses of a server that has no room now."""


@dataclass(frozen=True)
class Sent:
    """One request, and what became of it; times are in seconds."""

    due: float  # from the start of the load
    status: int  # 0: no answer came
    whole: bool  # the answer ended as it should
    retry_after: bool  # it says when to come again
    first: float | None  # from when it was due to its first event
    end: float | None  # and to its end; None where the load was over before

    @property
    def served(self) -> bool:
        """Whether it has its answer."""
        return self.status == 200 and self.whole

    @property
    def refused(self) -> bool:
        """Whether it was told, as it should be, that there is no room."""
        return self.status in REFUSALS and self.retry_after


@dataclass(frozen=True)
class Found:
    """What one process of load found."""

    flows: Mapping[str, Sequence[Sent]]
    counts: Mapping[str, int]  # of the connections of flows that read nothing
    lag_p99: float  # of the process itself, in seconds

    @classmethod
    def read(cls, text: str) -> Self:
        """What a process has written."""
        found = json.loads(text)
        flows = {
            name: [Sent(*entry) for entry in entries if len(entry) > 1]
            for name, entries in found["found"].items()
        }
        counts = {name: len(entries) for name, entries in found["found"].items()}
        return cls(flows, counts, p99(found["lags"]))


@dataclass(frozen=True)
class Plan:
    """The flows of one process of load (see load.py)."""

    flows: Sequence[Mapping[str, Any]]
    seconds: float
    grace: float = 10.0  # seconds that answers may take after the end


def run_loads(port: int, *plans: Plan) -> list[Found]:
    """Run a process for each plan, all at once; what each found."""
    with ExitStack() as running:
        processes = []
        for plan in plans:
            process = subprocess.Popen(
                [sys.executable, "-I", str(LOAD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            running.enter_context(process)
            running.callback(process.kill)
            processes.append((process, plan))
        for process, plan in processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"port": port, **asdict(plan)}))
            process.stdin.close()
        return [_result(process) for process, _ in processes]


def _result(process: subprocess.Popen[str]) -> Found:
    assert process.stdout is not None
    text = process.stdout.read()
    if process.wait():
        raise RuntimeError(f"a process of load ended with {process.returncode}")
    return Found.read(text)


def p99(values: Sequence[float]) -> float:
    """The 99th percentile; of none, 0."""
    if len(values) < 2:
        return max(values, default=0.0)
    return statistics.quantiles(values, n=100, method="inclusive")[98]
