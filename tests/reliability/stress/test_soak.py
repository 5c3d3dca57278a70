"""Two thousand mixed requests leave nothing behind; clients that leave, neither."""

from __future__ import annotations

from pathlib import Path

from reliability.proofs.stress.disconnects import GENERATED, disconnects
from reliability.proofs.stress.soak import soak
from support.reliability.fork_server import ForkServer
from support.reliability.stress.planted import HEAPING, UNREAPED


def test_mixed_requests_leave_nothing_open(forks: ForkServer, tmp_path: Path) -> None:
    result = soak(forks, f"sqlite:///{tmp_path}/registry.db", requests=2000, sloped=False)
    assert result.missed == [], result.remarks


def test_a_server_that_heaps_up_is_found(forks: ForkServer, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    result = soak(forks, url, requests=600, sloped=False, defects=[HEAPING])
    assert result.finds(["asyncio tasks left", "descriptors left"])


def test_what_clients_had_that_left_is_free_again(forks: ForkServer, tmp_path: Path) -> None:
    result = disconnects(forks, f"sqlite:///{tmp_path}/registry.db", count=150, timed=False)
    assert result.missed == [], result.figures


def test_an_engine_that_goes_on_for_nobody_is_found(forks: ForkServer, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    result = disconnects(forks, url, count=150, defects=[UNREAPED])
    assert result.finds([GENERATED])
