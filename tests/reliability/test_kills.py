"""kill -9 during registration, at the length of `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from reliability.proofs.kills import kills
from support.reliability.ledger import Examiner, Ledger, lose, reading
from support.reliability.planted import ACKNOWLEDGED_FIRST
from support.reliability.small_base import SmallBase

KILLS = 50
ACKNOWLEDGED = 10_000


def test_nothing_acknowledged_is_lost_by_kills(
    small_base: SmallBase, tmp_path: Path, database_url: str
) -> None:
    result = kills(small_base, tmp_path, database_url, kills=KILLS, acknowledged=ACKNOWLEDGED)
    assert result.missed == [], result.remarks
    assert result.figures["kills"] >= KILLS
    assert result.figures["acknowledged"] >= ACKNOWLEDGED


@pytest.mark.parametrize("kind", ["sqlite"])
def test_an_acknowledgement_before_the_commit_is_found(
    small_base: SmallBase, tmp_path: Path, kind: str
) -> None:
    url = f"{kind}:///{tmp_path / 'registry.db'}"
    result = kills(
        small_base, tmp_path, url, kills=5, acknowledged=300, defects=[ACKNOWLEDGED_FIRST]
    )
    assert result.figures["lost"] > 0
    assert not result.passed
