"""Servers that share a database: what one changes, the others serve."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import Connection, delete, event, text, update
from sqlalchemy.exc import OperationalError

from polyrex.adapters.errors import TaskExists, UnknownTask
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.tensor_file import sha256
from polyrex.server.config import RegistryConfig
from polyrex.server.errors import RevisionNotReached, StorageError
from polyrex.server.registry.database import Database
from polyrex.server.registry.edits import TaskEdits
from polyrex.server.registry.memory import follow, news
from polyrex.server.registry.memory.news import AuditRow
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.registry.schema import audit, state
from support.registry.makers import AddTenant, MakeRouter, OpenRegistry

PATIENCE = 20.0
"""Seconds after which a test gives up; what it waits for takes far less."""


@pytest.fixture
def replicas(pair: list[TaskRegistry]) -> list[TaskRegistry]:
    """Two registries on one PostgreSQL database that follow it."""
    for registry in pair:
        registry.start()
    return pair


def fail_to_commit(connection: Connection) -> None:
    """What happens in place of a commit: the transaction is undone, and the driver says so."""
    driver: Any = connection.connection.driver_connection
    driver.rollback()
    raise OperationalError("COMMIT", {}, Exception("no space is left"))


def test_change_of_one_server_is_served_by_the_other(
    replicas: list[TaskRegistry], make_small_router: MakeRouter
) -> None:
    a, b = replicas
    done = a.register(OPERATOR, "boolq", make_small_router(0))
    b.wait_for(done.task.changed, PATIENCE)
    assert b.pin(OPERATOR, "boolq").router.sha256 == sha256(make_small_router(0))
    done = b.register(OPERATOR, "boolq", make_small_router(1), replace=True)
    a.wait_for(done.task.changed, PATIENCE)
    assert a.pin(OPERATOR, "boolq").info.version == 2
    a.wait_for(TaskEdits(b).drop(OPERATOR, "boolq").changed, PATIENCE)
    with pytest.raises(UnknownTask):
        a.pin(OPERATOR, "boolq")


@pytest.mark.parametrize("silent", ["announce", "poll"])
def test_either_of_notifications_and_asking_is_enough(
    silent: str,
    pair: list[TaskRegistry],
    make_small_router: MakeRouter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = pair
    if silent == "poll":
        monkeypatch.setattr(follow, "_POLL_SECONDS", 2 * PATIENCE)
    else:
        monkeypatch.setattr(type(a.database._backend), "announce", lambda *_: None)
    b.start()
    b.wait_for(a.register(OPERATOR, "warm", make_small_router(0)).task.changed, PATIENCE)
    for seed in range(3):
        done = a.register(OPERATOR, f"task-{seed}", make_small_router(seed))
        b.wait_for(done.task.changed, PATIENCE)
    assert len(b) == 4
    a.register(OPERATOR, "last", make_small_router(0))  # wakes a follower that waits for long


def test_a_server_that_hears_nothing_asks_twice_a_second(
    pair: list[TaskRegistry], make_small_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    waits: list[float] = []
    notifies = psycopg.Connection.notifies

    def noted(connection: psycopg.Connection, *, timeout: float, stop_after: int) -> Iterator[Any]:
        waits.append(timeout)
        return notifies(connection, timeout=timeout, stop_after=stop_after)

    a, b = pair
    monkeypatch.setattr(psycopg.Connection, "notifies", noted)
    monkeypatch.setattr(type(a.database._backend), "announce", lambda *_: None)
    b.start()
    for seed in range(3):
        done = a.register(OPERATOR, "boolq", make_small_router(seed), replace=True)
        b.wait_for(done.task.changed, PATIENCE)
        assert b.pin(OPERATOR, "boolq").info.version == seed + 1
    assert waits
    assert max(waits) <= 0.5


def test_follower_survives_that_its_connections_are_cut(
    replicas: list[TaskRegistry], make_small_router: MakeRouter
) -> None:
    a, b = replicas
    b.wait_for(a.register(OPERATOR, "one", make_small_router(0)).task.changed, PATIENCE)
    others = text(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with a.database.engine.connect() as connection:
        assert connection.execute(others).scalar_one() >= 2
    deadline = threading.Event()
    for _ in range(100):
        try:
            done = a.register(OPERATOR, "two", make_small_router(1))
        except StorageError:  # its own connections were cut as well
            deadline.wait(0.05)
            continue
        break
    b.wait_for(done.task.changed, PATIENCE)
    assert b.pin(OPERATOR, "two").info.version == 1


def test_revision_that_is_not_reached_is_an_error(registry: TaskRegistry) -> None:
    with pytest.raises(RevisionNotReached, match="at revision 0, not at 5 yet"):
        registry.wait_for(5, timeout=0.01)


def test_answer_with_a_revision_can_be_read_through_any_server(
    replicas: list[TaskRegistry], make_small_router: MakeRouter
) -> None:
    a, b = replicas
    for seed in range(30):
        writer, reader = (a, b) if seed % 2 else (b, a)
        done = writer.register(OPERATOR, "boolq", make_small_router(seed), replace=True)
        reader.wait_for(done.task.changed, PATIENCE)
        assert reader.pin(OPERATOR, "boolq").info.version == seed + 1


def test_one_of_many_registrations_through_two_servers_wins(
    replicas: list[TaskRegistry], make_small_router: MakeRouter
) -> None:
    files = [make_small_router(seed) for seed in range(16)]
    for round_number in range(5):
        barrier = threading.Barrier(len(files))

        def attempt(
            number: int, name: str = f"task-{round_number}", barrier: threading.Barrier = barrier
        ) -> bool:
            barrier.wait()
            try:
                return replicas[number % 2].register(OPERATOR, name, files[number]).created
            except TaskExists:
                return False

        with ThreadPoolExecutor(len(files)) as pool:
            assert sum(pool.map(attempt, range(len(files)))) == 1
    for registry in replicas:
        registry.catch_up()
    assert [registry.revision for registry in replicas] == [5, 5]
    pinned = [
        [registry.pin(OPERATOR, f"task-{n}").router.sha256 for n in range(5)]
        for registry in replicas
    ]
    assert pinned[0] == pinned[1]


def test_what_another_server_did_already_is_served_when_it_is_acknowledged(
    pair: list[TaskRegistry], make_small_router: MakeRouter
) -> None:
    a, b = pair  # nobody follows: what b knows it has from its own requests
    done = a.register(OPERATOR, "boolq", make_small_router(0), idempotency_key="k")
    assert not b.register(OPERATOR, "boolq", make_small_router(0)).created
    assert b.pin(OPERATOR, "boolq").router.sha256 == done.version.router_sha256
    TaskEdits(a).set_alias(OPERATOR, "boolq", "prod", 1)
    assert TaskEdits(b).set_alias(OPERATOR, "boolq", "prod", 1).aliases == {"prod": 1}
    assert b.pin(OPERATOR, "boolq@prod").info.version == 1
    a.register(OPERATOR, "other", make_small_router(0), idempotency_key="again")
    b.register(OPERATOR, "other", make_small_router(0), idempotency_key="again")
    assert b.pin(OPERATOR, "other").info.version == 1
    assert a.revision == b.revision == 3


def test_version_that_another_server_pruned_is_followed_by_the_newer_one(
    postgres_url: str, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    config = RegistryConfig(keep_versions=1)
    with (
        closing(TaskRegistry(Database(postgres_url), small_inventory, config)) as a,
        closing(TaskRegistry(Database(postgres_url), small_inventory, config)) as b,
    ):
        a.register(OPERATOR, "boolq", make_small_router(0))
        b.catch_up()
        a.register(OPERATOR, "boolq", make_small_router(1), replace=True)
        assert b.pin(OPERATOR, "boolq").info.version == 2  # b had not heard of it


def test_change_that_fails_is_not_in_the_index(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    first = registry.register(OPERATOR, "boolq", make_small_router(0))
    engine = registry.database.engine
    event.listen(engine, "commit", fail_to_commit)
    with pytest.raises(StorageError):
        registry.register(OPERATOR, "boolq", make_small_router(1), replace=True)
    event.remove(engine, "commit", fail_to_commit)
    assert registry.revision == 1
    assert registry.pin(OPERATOR, "boolq").info.version == 1
    registry.catch_up()
    assert registry.find(OPERATOR, "boolq") == first.task
    again = registry.register(OPERATOR, "boolq", make_small_router(2), replace=True)
    assert (again.version.version, again.task.changed) == (2, 2)


def test_tasks_are_answered_while_the_database_fails(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    registry.register(OPERATOR, "boolq", make_small_router(0))
    registry.register(OPERATOR, "cold", make_small_router(1))
    pinned = registry.pin(OPERATOR, "boolq")

    def fail(*_: object) -> None:
        raise StorageError("the database is away")

    engine = registry.database.engine
    event.listen(engine, "before_cursor_execute", fail)
    assert registry.pin(OPERATOR, "boolq") is pinned
    assert [name for name, _ in registry.models(OPERATOR, None, 9)] == ["boolq", "cold"]
    with pytest.raises(StorageError):
        registry.pin(OPERATOR, "cold")
    with pytest.raises(StorageError):
        registry.catch_up()
    assert not registry.database.health.ok
    event.remove(engine, "before_cursor_execute", fail)
    assert registry.pin(OPERATOR, "cold").info.version == 1


@pytest.mark.parametrize("engine_of", ["sqlite", "postgresql"])
def test_server_notices_that_its_database_works_again(
    engine_of: str,
    request: pytest.FixtureRequest,
    small_inventory: Inventory,
    make_small_router: MakeRouter,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.setattr(follow, "_PROBE_SECONDS", 0.05)
    url = f"sqlite:///{tmp_path_factory.mktemp('healing') / 'registry.db'}"
    if engine_of == "postgresql":
        url = request.getfixturevalue("postgres_url")
    with closing(TaskRegistry(Database(url), small_inventory)) as registry:
        engine = registry.database.engine
        event.listen(engine, "commit", fail_to_commit)
        with pytest.raises(StorageError):
            registry.register(OPERATOR, "boolq", make_small_router(0))
        assert not registry.database.health.ok
        event.remove(engine, "commit", fail_to_commit)
        registry.start()
        pause = threading.Event()
        for _ in range(int(PATIENCE / 0.05)):
            if registry.database.health.ok:
                break
            pause.wait(0.05)
        assert registry.database.health.ok


def test_changes_are_told_before_they_are_acknowledged(
    registry: TaskRegistry, add_tenant: AddTenant, make_small_router: MakeRouter
) -> None:
    told: list[Sequence[AuditRow]] = []
    registry.on_change(told.append)
    registry.register(OPERATOR, "boolq", make_small_router(0))
    assert [(row.action, row.subject, row.version) for row in told[0]] == [("register", "task", 1)]
    add_tenant(registry, "acme")
    registry.catch_up()
    assert [row.subject for row in told[1]] == ["tenant"]
    registry.catch_up()
    assert len(told) == 2


def test_listener_that_fails_is_told_again(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    told: list[Sequence[AuditRow]] = []

    def fails_once(rows: Sequence[AuditRow]) -> None:
        told.append(rows)
        if len(told) == 1:
            raise StorageError("it could not read")

    registry.on_change(fails_once)
    registry.register(OPERATOR, "boolq", make_small_router(0))
    assert registry.pin(OPERATOR, "boolq").info.version == 1
    assert registry.revision == 0  # so that the follower takes it once more
    assert registry.catch_up() == 1
    assert told[0] == told[1]


def test_all_is_read_anew_where_much_has_changed(
    open_registry: OpenRegistry,
    make_small_router: MakeRouter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = open_registry()
    told: list[Sequence[AuditRow]] = []
    registry.on_change(told.append)
    monkeypatch.setattr(news, "_MOST_BEHIND", 2)
    for seed in range(4):
        with registry.database.change(OPERATOR) as change:
            change.record("nothing", "task", seed)
    assert registry.catch_up() == 4
    assert told == [()]
    done = registry.register(OPERATOR, "boolq", make_small_router(0))
    assert (done.task.changed, len(told[1])) == (5, 1)


def test_all_is_read_anew_before_a_change_and_not_within_it(
    registry: TaskRegistry, make_small_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[str]] = []
    registry.on_change(lambda rows: told.append([row.action for row in rows]))
    monkeypatch.setattr(news, "_MOST_BEHIND", 2)
    with registry.database.change(OPERATOR) as change:
        for number in range(4):
            change.record("nothing", "task", number)
    done = registry.register(OPERATOR, "boolq", make_small_router(0))
    assert told == [[], ["register"]]
    assert (done.task.changed, registry.revision) == (5, 5)
    assert registry.pin(OPERATOR, "boolq").info.version == 1


@pytest.mark.parametrize("further", [0, 1, 3])
def test_all_is_read_anew_where_the_database_was_restored(
    further: int, registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    """The copy is of revision 1; `further` changes later, its revisions are others' than ours."""
    registry.register(OPERATOR, "kept", make_small_router(0))
    registry.register(OPERATOR, "kept", make_small_router(1), replace=True)
    assert registry.pin(OPERATOR, "kept").info.version == 2
    _go_back(registry)
    with registry.database.change(OPERATOR) as change:
        for seed in range(further):
            change.record("nothing", "task", seed)
    registry.catch_up()
    assert registry.revision == 1 + further
    assert registry.pin(OPERATOR, "kept").info.version == 1
    done = registry.register(OPERATOR, "kept", make_small_router(2), replace=True)
    assert done.version.version == 2
    assert registry.pin(OPERATOR, "kept").router.sha256 == sha256(make_small_router(2))


def _go_back(registry: TaskRegistry) -> None:
    """Undo the second registration, as a copy of before would be."""
    with registry.database.engine.begin() as connection:
        connection.execute(delete(audit).where(audit.c.revision == 2))
        connection.execute(update(state).values(revision=1))
        connection.execute(text("DELETE FROM versions WHERE version = 2"))
        values = "current_version = 1, last_version = 1, changed = 1"
        connection.execute(text(f"UPDATE tasks SET {values}"))
