"""The registry's database: transactions, who may open it, and what it says when it fails."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import Connection, event, insert, select, text, update
from sqlalchemy.exc import OperationalError

from polyrex.server.errors import InvalidRequest, StartError, StorageError
from polyrex.server.registry.database import Database
from polyrex.server.registry.principal import OPERATOR, Principal, Role
from polyrex.server.registry.schema import audit, state, tenants
from polyrex.server.registry.storage import failures


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


def revisions(database: Database) -> list[int]:
    with database.read() as connection:
        return list(connection.scalars(select(audit.c.revision).order_by(audit.c.revision)))


def register(database: Database, name: str) -> None:
    """Add a tenant, as the smallest change there is."""
    with database.change(OPERATOR) as change:
        row = {"name": name, "created": 0.0, "quotas": {}}
        change.connection.execute(insert(tenants), row)
        change.record("create", "tenant", name)


def names(database: Database) -> list[str]:
    with database.read() as connection:
        return list(connection.scalars(select(tenants.c.name).order_by(tenants.c.id)))


def test_a_new_database_has_the_default_tenant_and_a_secret(database: Database) -> None:
    with database.read() as connection:
        row = connection.execute(select(state)).one()
    assert names(database) == ["default"]
    assert (row.revision, len(row.secret)) == (0, 32)


def test_what_is_there_stays_when_it_is_opened_again(database_url: str) -> None:
    first = Database(database_url)
    register(first, "team")
    with first.read() as connection:
        secret = connection.scalar(select(state.c.secret))
    first.close()
    second = Database(database_url)
    with second.read() as connection:
        assert connection.scalar(select(state.c.secret)) == secret
    assert names(second) == ["default", "team"]
    second.close()


def test_a_change_is_recorded_with_who_did_it(database: Database) -> None:
    with database.change(Principal("team", Role.task_admin, "k1")) as change:
        assert change.record("drop", "task", 7, version=3, detail="old") == 1
        assert change.record("drop", "task", 8) == 2
    with database.read() as connection:
        rows = connection.execute(select(audit).order_by(audit.c.revision)).all()
        assert connection.scalar(select(state.c.revision)) == 2
    first = rows[0]
    assert (first.tenant, first.key, first.action) == ("team", "k1", "drop")
    assert (first.subject, first.subject_id) == ("task", "7")
    assert (first.version, first.detail) == (3, "old")
    assert rows[1].change == first.change == change.id


def test_nothing_is_written_where_nothing_was_recorded(database: Database) -> None:
    with database.change(OPERATOR) as change:
        row = {"name": "team", "created": 0.0, "quotas": {}}
        change.connection.execute(insert(tenants), row)
    assert names(database) == ["default"]


def test_an_error_undoes_the_change(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.change(OPERATOR) as change:
        change.record("create", "tenant", 1 // (change.record("create", "tenant", 0) - 1))
    register(database, "team")
    assert revisions(database) == [1]
    assert database.health.ok


def test_changes_of_many_threads_leave_no_gaps(database: Database) -> None:
    threads = [threading.Thread(target=register, args=(database, f"t{n}")) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert revisions(database) == list(range(1, 17))
    assert sorted(names(database)) == sorted(["default", *(f"t{n}" for n in range(16))])


def test_a_read_sees_one_moment(database: Database) -> None:
    with database.read() as connection:
        before = connection.scalar(select(state.c.revision))
        register(database, "team")
        assert connection.scalar(select(state.c.revision)) == before == 0
        assert list(connection.scalars(select(tenants.c.name))) == ["default"]


def test_two_replicas_change_one_database_in_turn(postgres_url: str) -> None:
    first, second = Database(postgres_url), Database(postgres_url)
    threads = [
        threading.Thread(target=register, args=(each, f"{index}-{n}"))
        for index, each in enumerate((first, second))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert revisions(first) == list(range(1, 17))
    first.close()
    second.close()


def test_replicas_that_start_at_once_both_find_the_tables(postgres_url: str) -> None:
    opened: list[Database] = []
    threads = [
        threading.Thread(target=lambda: opened.append(Database(postgres_url))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [names(each) for each in opened] == [["default"]] * 4
    for each in opened:
        each.close()


def test_a_change_on_postgresql_is_announced(postgres_url: str) -> None:
    import psycopg

    database = Database(postgres_url)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("LISTEN polyrex_registry")
        register(database, "team")
        told = [note.payload for note in connection.notifies(timeout=10, stop_after=1)]
    assert told == ["1"]
    database.close()


def test_sqlite_writes_ahead_and_waits_for_the_disk(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/registry.db")
    with database.read() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    database.close()


def test_sqlite_waits_for_the_disk_after_a_commit_that_failed(tmp_path: Path) -> None:
    def fail_to_commit(_connection: Connection) -> None:
        raise OperationalError("COMMIT", {}, sqlite3.OperationalError("disk I/O error"))

    with Database(f"sqlite:///{tmp_path}/registry.db") as database:
        event.listen(database.engine, "commit", fail_to_commit)
        with pytest.raises(StorageError):
            register(database, "team")
        event.remove(database.engine, "commit", fail_to_commit)
        with database.change(OPERATOR) as change:
            synchronous = change.connection.exec_driver_sql("PRAGMA synchronous").scalar()
            change.record("create", "tenant", 1)
        assert synchronous == 2
        assert revisions(database) == [1]


def test_a_setting_that_sqlite_does_not_take_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = "polyrex.server.registry.storage.sqlite._SETTINGS"
    monkeypatch.setattr(settings, {"journal_mode": ("OFF", "wal")})
    with pytest.raises(StartError, match="refuses journal_mode"):
        Database(f"sqlite:///{tmp_path}/registry.db")


def test_reading_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/registry.db")
    with database.change(OPERATOR) as change:
        change.record("create", "tenant", 1)
        assert names(database) == ["default"]
    database.close()


def test_a_second_server_on_one_file_does_not_start(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    first = Database(url)
    with pytest.raises(StartError, match=r"registry\.db: another server uses this registry"):
        Database(url)
    register(first, "team")
    beside = Database(url, serving=False)  # a backup, while the server runs
    assert names(beside) == ["default", "team"]
    beside.close()
    first.close()
    second = Database(url)
    assert names(second) == ["default", "team"]
    second.close()


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_a_second_server_does_not_start_through_a_symbolic_link(
    tmp_path: Path, linked: str
) -> None:
    folder, other = tmp_path / "state", tmp_path / "other"
    folder.mkdir()
    if linked == "folder":
        other.symlink_to(folder)
    else:
        other.mkdir()
        (other / "registry.db").symlink_to(folder / "registry.db")  # not there yet
    with Database(f"sqlite:///{other}/registry.db") as first:
        with pytest.raises(StartError, match=r"registry\.db: another server uses this registry"):
            Database(f"sqlite:///{folder}/registry.db")
        register(first, "team")
    with Database(f"sqlite:///{folder}/registry.db") as second:
        assert names(second) == ["default", "team"]


def test_links_that_lead_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(StartError, match="a: symbolic links lead in a circle"):
        Database(f"sqlite:///{tmp_path}/a")


@pytest.mark.parametrize("serving", [True, False])
def test_a_file_of_two_names_is_refused(tmp_path: Path, serving: bool) -> None:
    with Database(f"sqlite:///{tmp_path}/registry.db") as first:
        (tmp_path / "again.db").hardlink_to(tmp_path / "registry.db")
        with pytest.raises(StartError, match=r"again\.db: the file has 2 names"):
            Database(f"sqlite:///{tmp_path}/again.db", serving=serving)
        register(first, "team")
    (tmp_path / "again.db").unlink()
    with Database(f"sqlite:///{tmp_path}/registry.db") as second:
        assert names(second) == ["default", "team"]


def test_the_folder_and_the_file_are_for_their_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "tasks"
    database = Database(f"sqlite:///{folder}/registry.db")
    register(database, "team")
    modes = {each.name: oct(each.stat().st_mode & 0o777) for each in folder.iterdir()}
    database.close()
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
    assert modes == {
        "registry.db": "0o600",
        "registry.db-shm": "0o600",
        "registry.db-wal": "0o600",
        "registry.db.lock": "0o600",
    }


def test_a_folder_that_everybody_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(StartError, match=r"open: every user may write to this folder"):
        Database(f"sqlite:///{folder}/registry.db")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("damage", ["empty", "short", "text", "another program's", "a page"])
def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "registry.db"
    database = Database(f"sqlite:///{file}")
    for number in range(50):
        register(database, f"team-{number}")
    database.close()
    whole = file.read_bytes()
    if damage == "another program's":
        file.unlink()
        with sqlite3.connect(file) as other:
            other.execute("CREATE TABLE tasks (id)")
        other.close()
    else:
        middle = len(whole) // 2 // 4096 * 4096
        page = whole[:middle] + b"\xff" * 4096 + whole[middle + 4096 :]
        file.write_bytes(
            {"empty": b"", "short": whole[:-8192], "text": b"hello" * 999, "a page": page}[damage]
        )
    found = file.read_bytes()
    with pytest.raises(StartError, match=r"registry\.db: .*cannot be used.*backup"):
        Database(f"sqlite:///{file}")
    assert file.read_bytes() == found


def test_a_log_without_its_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "registry.db-wal").write_bytes(b"frames")
    with pytest.raises(StartError, match=r"registry\.db-wal belongs to a registry"):
        Database(f"sqlite:///{tmp_path}/registry.db")


def test_a_start_that_was_broken_off_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "registry.db.new").write_bytes(b"half")
    (tmp_path / "registry.db.new-wal").write_bytes(b"frames")
    database = Database(f"sqlite:///{tmp_path}/registry.db")
    assert names(database) == ["default"]
    database.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["registry.db", "registry.db.lock"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nonsense", "no URL"),
        ("mysql://host/name", "not mysql://"),
        ("sqlite://", "name a file"),
        ("sqlite:///:memory:", "name a file"),
        ("postgresql://user:hidden@127.0.0.1:9/name", "refused"),
        ("postgresql://user@127.0.0.1:9/name?password=hidden", "refused"),
        ("postgresql://user@127.0.0.1:9/name?sslmode=disable&sslpassword=hidden", "refused"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(url: str, reason: str) -> None:
    with pytest.raises(StartError, match=reason) as caught:
        Database(url)
    assert "hidden" not in str(caught.value)


def test_postgresql_that_does_not_wait_for_its_disk_is_refused(postgres_url: str) -> None:
    import psycopg

    name = postgres_url.rpartition("/")[2]
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = off".encode())
    with pytest.raises(StartError, match="synchronous_commit is off"):
        Database(postgres_url)


@pytest.mark.parametrize("value", ["a\0b", 1 << 40])
def test_a_value_that_postgresql_cannot_hold_is_the_requests_fault(
    postgres_url: str, value: object
) -> None:
    column = tenants.c.name if isinstance(value, str) else tenants.c.id
    with Database(postgres_url) as database:
        with (
            pytest.raises(InvalidRequest, match="cannot be stored") as caught,
            database.change(OPERATOR) as change,
        ):
            change.connection.execute(update(tenants).values({column: value}))
        assert "UPDATE" not in str(caught.value)
        assert database.health.ok
        assert names(database) == ["default"]


def test_an_error_of_the_database_tells_no_secrets(database: Database) -> None:
    with pytest.raises(StorageError) as caught, database.read() as connection:
        connection.execute(text("SELECT * FROM missing WHERE 'secret' = :value"), {"value": "v"})
    assert str(caught.value) == "the registry's database does not work now; nothing has changed"


def test_health_turns_and_heals_with_one_line_each(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    assert (database.health.ok, database.health.reason) == (True, "")
    for now in (1.0, 2.0, 3.0):
        monkeypatch.setattr(failures, "time", SimpleNamespace(time=lambda now=now: now))
        with pytest.raises(StorageError), database.read() as connection:
            connection.execute(text("SELECT * FROM missing"))
    assert (database.health.ok, database.health.since) == (False, 1.0)
    assert database.health.reason.startswith("the registry cannot be read: ")
    database.probe()
    assert (database.health.ok, database.health.since) == (True, 3.0)
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


def test_a_failed_write_heals_by_a_write_and_not_by_reading(database: Database) -> None:
    with pytest.raises(StorageError), database.change(OPERATOR) as change:
        change.connection.execute(text("SELECT * FROM missing"))
    assert names(database) == ["default"]
    assert database.health.reason.startswith("the registry cannot be written: ")
    database.probe()
    assert database.health.ok
    assert revisions(database) == []
