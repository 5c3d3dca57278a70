"""Ten times what the server can do, for seconds; how fast it stays is shown at full length."""

from __future__ import annotations

from pathlib import Path

from reliability.proofs.stress.fairness import fairness
from reliability.proofs.stress.overload import overload
from support.reliability.fork_server import ForkServer
from support.reliability.stress.planted import FROZEN

HURRIED = {"header_seconds": 1.0}
"""So that sockets on which a request drips are closed within the seconds of these tests."""


def test_under_overload_everybody_is_answered_or_refused(forks: ForkServer, tmp_path: Path) -> None:
    result = overload(
        forks, tmp_path, seconds=3, dripping=100, afterwards=2, timed=False, settings=HURRIED
    )
    assert result.missed == [], result.figures
    assert result.figures["worst bodies"] > 10
    assert result.figures["readers that stalled"] > 50


def test_a_server_that_freezes_is_found(forks: ForkServer, tmp_path: Path) -> None:
    result = overload(forks, tmp_path, seconds=2, dripping=10, afterwards=1, defects=[FROZEN])
    assert result.finds(["p99 of /livez in ms", "turns of the event loop later than 100 ms"])


def test_a_greedy_tenant_costs_the_modest_one_no_request(forks: ForkServer, tmp_path: Path) -> None:
    result = fairness(forks, tmp_path, seconds=4, timed=False)
    assert result.missed == [], result.figures


def test_a_queue_that_knows_no_tenants_is_found(forks: ForkServer, tmp_path: Path) -> None:
    result = fairness(forks, tmp_path, seconds=4, timed=False, one_tenant=True)
    assert result.finds(["not served of the modest one"])
