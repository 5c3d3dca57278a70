"""Two replicas on one PostgreSQL registry, at the length of `make test`.

Where a replica has a second to learn of a change, these tests give it ten: what they show must not
depend on how busy a machine is.
"""

from __future__ import annotations

import pytest

from reliability.proofs.history import history
from reliability.proofs.one_killed import one_killed
from reliability.proofs.updates import updates
from support.reliability.fork_server import ForkServer
from support.reliability.planted import DEAF, HURRIED, MUTE, UNPINNED
from support.storage.postgres import Cluster

PATIENCE = 10.0
TRIES = 5


def test_every_answer_is_that_of_a_version_that_was_current(
    forks: ForkServer, postgres_url: str
) -> None:
    result = updates(forks, postgres_url, updates=200, routers=50, within=PATIENCE)
    assert result.missed == [], result.remarks
    assert result.figures["updates"] == 200


def test_without_notifications_a_replica_follows_by_asking(
    forks: ForkServer, postgres_url: str
) -> None:
    result = updates(forks, postgres_url, updates=40, routers=20, within=PATIENCE, defects=[MUTE])
    assert result.missed == [], result.remarks
    assert result.figures["updates"] == 40


def test_answers_of_two_versions_in_one_are_found(
    forks: ForkServer, postgres_cluster: Cluster
) -> None:
    mixed = 0.0
    for _ in range(TRIES):  # an update has to come in the middle of an answer
        result = updates(
            forks,
            postgres_cluster.create_database(),
            updates=60,
            routers=20,
            within=PATIENCE,
            defects=[UNPINNED],
        )
        if mixed := result.figures["answers of no version"]:
            break
    assert mixed > 0
    assert result.finds(["answers of no version"])


def test_a_replica_that_does_not_follow_is_found(forks: ForkServer, postgres_url: str) -> None:
    result = updates(forks, postgres_url, updates=20, routers=20, within=1.0, defects=[DEAF])
    assert result.figures["replicas that do not serve the last version"] > 0
    assert not result.passed


@pytest.mark.parametrize("with_revisions", [True, False], ids=["revisions", "none"])
def test_histories_are_linearisable(
    forks: ForkServer, postgres_url: str, with_revisions: bool
) -> None:
    result = history(
        forks,
        postgres_url,
        operations=800,
        with_revisions=with_revisions,
        within=PATIENCE,
    )
    assert result.missed == [], result.remarks
    assert result.figures["operations"] >= 800


def test_a_replica_that_does_not_wait_for_a_revision_is_found(
    forks: ForkServer, postgres_url: str
) -> None:
    result = history(
        forks,
        postgres_url,
        operations=800,
        with_revisions=True,
        defects=[DEAF, HURRIED],
    )
    assert result.figures["tasks with no possible order"] > 0
    assert not result.passed


def test_a_killed_replica_takes_nothing_with_it_but_what_it_ran(
    forks: ForkServer, postgres_url: str
) -> None:
    result = one_killed(forks, postgres_url, registrations=400)
    assert result.missed == [], result.remarks
    assert result.figures["acknowledged"] >= 400
    assert result.figures["broken off on the killed replica"] > 0


def test_a_lost_registration_is_found(forks: ForkServer, postgres_url: str) -> None:
    result = one_killed(forks, postgres_url, registrations=40, forget=5)
    assert result.figures["lost"] > 0
    assert not result.passed
