"""The examiner of a registry's database finds everything that a proof must not overlook."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, delete, update

from polyrex.server.registry.database import Database
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.registry.schema import audit, routers, state
from support.reliability.ledger import Examiner, Ledger, lose
from support.reliability.small_base import Routers, SmallBase


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def engine(small_base: SmallBase, tmp_path: Path, ledger: Ledger) -> Iterator[Engine]:
    """A registry with three versions of each of two tasks, all acknowledged."""
    inventory = small_base.read_inventory()
    make = Routers(inventory)
    registry = TaskRegistry(Database(f"sqlite:///{tmp_path / 'registry.db'}"), inventory)
    for number in range(6):
        name, router = f"task-{number % 2}", make(number)
        sha256 = ledger.send(name, router)
        version = registry.register(OPERATOR, name, router, replace=True).version.version
        ledger.acknowledge(name, version, sha256)
    yield registry.database.engine
    registry.close()


def examined(ledger: Ledger, engine: Engine) -> dict[str, int]:
    examiner = Examiner(ledger)
    examiner.follow(engine)
    examiner.read_bytes(engine)
    return {kind: len(lines) for kind, lines in examiner.found.items() if lines}


def test_a_whole_registry_is_found_to_be_whole(ledger: Ledger, engine: Engine) -> None:
    examiner = Examiner(ledger)
    examiner.follow(engine)
    assert examiner.read_bytes(engine) == 6
    assert dict(examiner.found) == {}
    assert examiner.current["task-1"] == (3, ledger.acknowledged["task-1", 3])
    assert examiner.unacknowledged() == 0


def test_lost_changes_are_found(ledger: Ledger, engine: Engine) -> None:
    lose(engine, 2)
    assert examined(ledger, engine)["lost"] == 2


def test_an_acknowledgement_of_two_routers_as_one_version_is_found(
    ledger: Ledger, engine: Engine
) -> None:
    ledger.acknowledge("task-1", 3, hashlib.sha256(b"another").hexdigest())
    assert examined(ledger, engine)["lost"] == 2


def test_what_nobody_sent_is_found(ledger: Ledger, engine: Engine) -> None:
    ledger.sent.popitem()
    assert examined(ledger, engine) == {"invented": 1}


def test_a_gap_in_the_revisions_is_found(ledger: Ledger, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(delete(audit).where(audit.c.revision == 3))
    assert examined(ledger, engine)["gaps"] > 0


def test_a_registry_ahead_of_its_audit_is_found(ledger: Ledger, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(update(state).values(revision=7))
    assert examined(ledger, engine) == {"gaps": 1}


def test_torn_bytes_are_found(ledger: Ledger, engine: Engine) -> None:
    torn = bytes.fromhex(ledger.acknowledged["task-0", 2])
    with engine.begin() as connection:
        connection.execute(update(routers).where(routers.c.sha256 == torn).values(data=b"half"))
    assert examined(ledger, engine) == {"torn": 1}


def test_a_second_look_sees_everything_again(ledger: Ledger, engine: Engine) -> None:
    examiner = Examiner(ledger)
    examiner.follow(engine)
    lose(engine, 1)
    examiner.follow_again(engine)
    assert len(examiner.found["lost"]) == 1
