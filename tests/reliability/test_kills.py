"""kill -9 during registration, at the length of `make test`."""

from __future__ import annotations

from pathlib import Path

from reliability.proofs.kills import kills
from support.reliability.fork_server import ForkServer
from support.reliability.planted import ACKNOWLEDGED_FIRST

KILLS = 50
ACKNOWLEDGED = 10_000


def test_nothing_acknowledged_is_lost_by_kills(forks: ForkServer, database_url: str) -> None:
    result = kills(forks, database_url, kills=KILLS, acknowledged=ACKNOWLEDGED)
    assert result.missed == [], result.remarks
    assert result.figures["kills"] >= KILLS
    assert result.figures["acknowledged"] >= ACKNOWLEDGED


def test_an_acknowledgement_before_the_commit_is_found(forks: ForkServer, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    result = kills(forks, url, kills=5, acknowledged=300, defects=[ACKNOWLEDGED_FIRST])
    assert result.figures["lost"] > 0
    assert not result.passed
