"""kill -9 during registration, at the length of `make test`."""

from __future__ import annotations

from pathlib import Path

from reliability.proofs.kills import kills
from support.reliability.fork_server import ForkServer
from support.reliability.planted import ACKNOWLEDGED_FIRST

KILLS = 100
ACKNOWLEDGED = 20_000
TRIES = 5


def test_nothing_acknowledged_is_lost_by_kills(forks: ForkServer, database_url: str) -> None:
    result = kills(forks, database_url, kills=KILLS, acknowledged=ACKNOWLEDGED)
    assert result.missed == [], result.remarks
    assert result.figures["kills"] >= KILLS
    assert result.figures["kills with requests in flight"] > KILLS // 2
    assert result.figures["acknowledged"] >= ACKNOWLEDGED


def test_an_acknowledgement_before_the_commit_is_found(forks: ForkServer, tmp_path: Path) -> None:
    lost = 0.0
    for number in range(TRIES):  # a kill has to come in those few milliseconds
        url = f"sqlite:///{tmp_path / str(number)}.db"
        result = kills(forks, url, kills=5, acknowledged=300, defects=[ACKNOWLEDGED_FIRST])
        if lost := result.figures["lost"]:
            break
    assert lost > 0
    assert result.finds(["lost"])
