"""Disks that fail, databases that end, connections that break off: nothing told is untrue."""

from __future__ import annotations

import logging
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from threading import Semaphore
from typing import Any

import pytest
from sqlalchemy import Connection, event, insert, make_url, select, text
from sqlalchemy.exc import OperationalError

from polyrex.server.errors import StorageError, StorageFull
from polyrex.server.registry.database import Database
from polyrex.server.registry.memory.news import AuditRow
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.registry.schema import audit, routers, tenants
from polyrex.server.registry.storage.failures import OUTCOME_UNKNOWN
from support.registry.makers import MakeRouter
from support.storage.disk_faults import Result, Sweep, build_shim, every_sweep, run_fault_sweeps
from support.storage.postgres import NOT_INSTALLED, Cluster, find_binaries, running_cluster

PATIENCE = 20.0
"""Seconds after which a test gives up; what it waits for takes far less."""

SETTLE_SECONDS = "polyrex.server.registry.storage.postgres._SETTLE_SECONDS"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = build_shim(tmp_path_factory.mktemp("shim"))
    if library is None:
        pytest.skip("gcc is not installed")
    return library


SWEEPS = every_sweep(syncs=12, writes=30)


@pytest.fixture(scope="module")
def results(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The result of each sweep by its name."""
    found = run_fault_sweeps(tmp_path_factory.mktemp("sweeps"), shim, SWEEPS)
    return dict(zip(map(str, SWEEPS), found, strict=True))


@pytest.mark.parametrize("sweep", SWEEPS, ids=str)
def test_no_failing_call_loses_or_invents_a_change(
    results: dict[str, Result], sweep: Sweep
) -> None:
    result = results[str(sweep)]
    assert result.runs == result.failed == len(sweep.calls)
    assert (result.lost, result.invented, result.gaps, result.unusable) == (0, 0, 0, 0)
    assert result.unknown == 0


def test_the_sweep_finds_transactions_that_are_left_in_the_log(tmp_path: Path, shim: Path) -> None:
    sweeps = [
        Sweep("sync", "EIO", [3, 4, 5], changes=8, settling=False, lasting=True),
        Sweep("sync", "EIO", [3, 4, 5], changes=8, settling=False, until_failure=True),
    ]
    found = run_fault_sweeps(tmp_path, shim, sweeps)
    assert [result.invented for result in found] == [3, 3]


def add(database: Database, name: str) -> None:
    with database.change(OPERATOR) as change:
        row = {"name": name, "created": 0.0, "quotas": {}}
        change.connection.execute(insert(tenants), row)
        change.record("create", "tenant", name)


def names(database: Database) -> list[str]:
    with database.read() as connection:
        return list(connection.scalars(select(tenants.c.name).order_by(tenants.c.id)))


def revisions(database: Database) -> list[int]:
    with database.read() as connection:
        return list(connection.scalars(select(audit.c.revision).order_by(audit.c.revision)))


def fail_to_commit(_connection: Connection) -> None:
    raise OperationalError("COMMIT", {}, sqlite3.OperationalError("disk I/O error"))


def _refuse_full(_action: int, name: str | None, value: str | None, *_: object) -> int:
    wrong = (name, value) == ("synchronous", "FULL")
    return sqlite3.SQLITE_DENY if wrong else sqlite3.SQLITE_OK


@pytest.mark.parametrize("fails", ["overwriting", "setting back"])
def test_a_connection_that_could_not_settle_is_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fail_to_touch(execute: Any) -> None:
        execute("PRAGMA user_version=9")
        raise sqlite3.OperationalError("disk I/O error")

    with Database(f"sqlite:///{tmp_path}/registry.db") as database:
        with database.read() as connection:
            raw: Any = connection.connection.driver_connection
        event.listen(database.engine, "commit", fail_to_commit)
        if fails == "overwriting":
            monkeypatch.setattr("polyrex.server.registry.storage.sqlite._touch", fail_to_touch)
        else:
            raw.set_authorizer(_refuse_full)
        with pytest.raises(StorageError) as caught:
            add(database, "team")
        event.remove(database.engine, "commit", fail_to_commit)
        assert str(caught.value) == OUTCOME_UNKNOWN
        with database.change(OPERATOR) as change:
            assert change.connection.connection.driver_connection is not raw
            assert change.connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
            change.record("create", "tenant", 1)
        assert revisions(database) == [1]


def add_router(database: Database, size: int) -> None:
    with database.change(OPERATOR) as change:
        change.connection.execute(text("PRAGMA max_page_count=1"))  # no more than there are
        change.connection.execute(insert(routers), {"sha256": bytes(32), "data": bytes(size)})
        change.record("register", "task", 1)


def test_a_full_disk_is_told_apart(tmp_path: Path) -> None:
    with Database(f"sqlite:///{tmp_path}/registry.db") as database:
        with pytest.raises(StorageFull) as caught:
            add_router(database, 1 << 20)
        assert str(caught.value) == "the registry's database is full; nothing has changed"
        assert database.health.reason == "the registry cannot be written: no space is left"
        assert names(database) == ["default"]


class Line:
    """A line to PostgreSQL that breaks off at the next COMMIT: before it, after it, or for good."""

    def __init__(self, url: str) -> None:
        target = make_url(url)
        self._server = (target.host, target.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port: int = self._listener.getsockname()[1]
        self.url = target.set(port=port).render_as_string(hide_password=False)
        self.breaks: str | None = None
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def close(self) -> None:
        """Break every connection off, and let none in any more."""
        for each in self._sockets:
            _shut(each)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=function, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                server = socket.create_connection(self._server)
                self._sockets.append(server)
                self._start(self._carry, client, server)
                self._start(self._carry, server, client)

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self.breaks and b"COMMIT\0" in data:  # the server's answer is broken off, too
                    breaks, self.breaks = self.breaks, None
                    _shut(self._listener if breaks == "for good" else source)
                    if breaks == "after":
                        target.sendall(data)
                    break
                target.sendall(data)
        _shut(source)
        _shut(target)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def line(postgres_url: str) -> Iterator[Line]:
    with closing(Line(postgres_url)) as opened:
        yield opened


def test_a_commit_whose_answer_is_lost_is_found(line: Line) -> None:
    with Database(line.url) as database:
        line.breaks = "after"
        add(database, "team")
        assert line.breaks is None
        assert names(database) == ["default", "team"]
        add(database, "next")
        assert revisions(database) == [1, 2]
        assert database.health.ok


def test_a_commit_that_is_lost_is_an_error_and_stays_one(line: Line) -> None:
    with Database(line.url) as database:
        line.breaks = "before"
        with pytest.raises(StorageError, match="nothing has changed"):
            add(database, "team")
        assert line.breaks is None
        assert names(database) == ["default"]
        add(database, "team")
        assert revisions(database) == [1]


def commit_and_fail(connection: Connection) -> None:
    driver: Any = connection.connection.driver_connection
    driver.commit()
    raise OperationalError("COMMIT", {}, Exception("no answer"))


def test_what_became_of_a_commit_is_found_where_no_connection_is_free(postgres_url: str) -> None:
    with Database(postgres_url) as database, ExitStack() as held:
        for _ in range(11):  # all that a replica may have, but that of the change
            held.enter_context(database.engine.connect())
        event.listen(database.engine, "commit", commit_and_fail)
        add(database, "team")
        held.close()
        assert names(database) == ["default", "team"]


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """A server that a test may end."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip(NOT_INSTALLED)
    with running_cluster(binaries) as cluster:
        yield cluster


def test_a_commit_that_nobody_can_tell_of_is_said_to_be_unknown(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SETTLE_SECONDS, 0.5)
    with Database(line.url) as database:
        line.breaks = "for good"
        with pytest.raises(StorageError) as caught:
            add(database, "team")
        assert str(caught.value) == OUTCOME_UNKNOWN
        assert not database.health.ok


def crash_within(database: Database, cluster: Cluster) -> None:
    with database.change(OPERATOR) as change:
        change.record("create", "tenant", 1)
        cluster.stop(signal.SIGQUIT)
        change.record("create", "tenant", 2)


def test_a_server_that_crashes_and_comes_back_loses_nothing_acknowledged(
    own_cluster: Cluster,
) -> None:
    with Database(own_cluster.create_database()) as database:
        for number in range(5):
            add(database, f"team-{number}")
        with pytest.raises(StorageError, match="nothing has changed"):
            crash_within(database, own_cluster)
        with pytest.raises(StorageError):
            names(database)
        assert not database.health.ok
        own_cluster.start()
        database.probe()
        assert database.health.ok
        assert names(database) == ["default", *(f"team-{number}" for number in range(5))]
        add(database, "team-5")
        assert revisions(database) == [1, 2, 3, 4, 5, 6]


def test_server_that_cannot_follow_says_so_once_and_recovers(
    pair: list[TaskRegistry], make_small_router: MakeRouter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "polyrex.server.registry")
    a, b = pair
    attempts = Semaphore(0)
    broken = True

    def listener(_rows: Sequence[AuditRow]) -> None:
        if broken:
            attempts.release()
            raise KeyError("private")

    b.on_change(listener)
    b.start()
    done = a.register(OPERATOR, "boolq", make_small_router(0))
    for _ in range(3):
        assert attempts.acquire(timeout=PATIENCE)
    health = b.database.health
    assert (health.ok, health.reason) == (False, "the registry cannot be followed: KeyError")
    broken = False
    b.wait_for(done.task.changed, PATIENCE)
    b.wait_for(a.register(OPERATOR, "next", make_small_router(1)).task.changed, PATIENCE)
    assert b.database.health.ok
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


def test_server_that_cannot_listen_asks(
    pair: list[TaskRegistry],
    make_small_router: MakeRouter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import psycopg

    caplog.set_level(logging.INFO, "polyrex.server.registry")
    a, b = pair
    attempts = Semaphore(0)
    notifies = psycopg.Connection.notifies
    broken = True

    def fail(connection: Any, **how: Any) -> Iterator[Any]:
        attempts.release()
        if broken:
            raise RuntimeError("nothing is heard")
        return notifies(connection, **how)

    monkeypatch.setattr(psycopg.Connection, "notifies", fail)
    b.start()
    for seed in range(2):
        done = a.register(OPERATOR, f"task-{seed}", make_small_router(seed))
        b.wait_for(done.task.changed, PATIENCE)
        assert attempts.acquire(timeout=PATIENCE)
    assert b.database.health.ok
    broken = False
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.05)):
        if "are heard" in caplog.text:
            break
        pause.wait(0.05)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
