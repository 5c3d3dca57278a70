"""Disks that fail, databases that end, connections that break off: nothing told is untrue."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from sqlalchemy import insert, make_url, select, text

from polyrex.server.errors import StorageError, StorageFull
from polyrex.server.registry.database import Database
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.schema import audit, routers, tenants
from polyrex.server.registry.storage.failures import OUTCOME_UNKNOWN
from support.storage.disk_faults import Result, Sweep, build_shim, every_sweep, run_fault_sweeps
from support.storage.postgres import NOT_INSTALLED, Cluster, find_binaries, running_cluster

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
