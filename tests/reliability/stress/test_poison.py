"""Poisons amid streams, at the embedded engine."""

from __future__ import annotations

from pathlib import Path

from reliability.proofs.stress.poison import poison_embedded
from support.reliability.fork_server import ForkServer
from support.reliability.stress.planted import POISONED
from support.reliability.stress.poison import poisons


def test_the_table_holds_three_hundred_poisons_with_names_of_their_own() -> None:
    names = [poison.name for poison in poisons()]
    assert len(names) >= 300
    assert len(set(names)) == len(names)


def test_no_poison_breaks_a_stream(forks: ForkServer, tmp_path: Path) -> None:
    result = poison_embedded(forks, f"sqlite:///{tmp_path}/registry.db", count=320)
    assert result.missed == [], result.remarks
    assert result.figures["refused with a 4xx"] > 150


def test_a_poison_that_breaks_streams_is_found(forks: ForkServer, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    result = poison_embedded(forks, url, count=60, defects=[POISONED])
    assert result.finds(["streams that broke", "poisons: leaks"])
