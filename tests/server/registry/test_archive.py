"""Backups, exports and imports of a registry, and the check that it is whole."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Table, insert, select, text

from polyrex.adapters.errors import FileError
from polyrex.server.errors import StartError
from polyrex.server.registry.archive.checking import check
from polyrex.server.registry.archive.copying import backup, export
from polyrex.server.registry.archive.importing import Imported, import_file
from polyrex.server.registry.database import Change, Database
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.schema import (
    aliases,
    audit,
    idempotency,
    keys,
    metadata,
    routers,
    shares,
    state,
    tasks,
    tenants,
    versions,
)
from support.storage.postgres import Cluster


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A registry with two tenants, whose tasks have all that a task can have."""
    with Database(database_url) as opened:
        with opened.change(OPERATOR) as change:
            team = add_tenant(change, "team")
            add_task(change, 1, "plain", [b"one"])
            live = add_task(change, team, "live", [b"two", b"three", b"one"], current_version=2)
            add_task(change, team, "deleted", [b"four"], deleted=17.0)
            add_task(change, team, "purged", [], last_version=4, current_version=None)
            canary = {"canary_version": 3, "canary_share": 0.25, "labels": {"of": "us"}}
            change.connection.execute(
                tasks.update().where(tasks.c.id == live).values(changed=change.revision, **canary)
            )
            add(change, aliases, task_id=live, name="prod", version=1)
            add(change, shares, task_id=live, tenant="default")
            digest = bytes(32)
            add(
                change,
                keys,
                id="k",
                tenant_id=team,
                role="inference",
                label="",
                digest=digest,
                created=1.0,
            )
            add(
                change,
                idempotency,
                tenant_id=team,
                key="i",
                digest=digest,
                task_id=live,
                version=1,
                created_task=True,
                at=1.0,
            )
        yield opened


def add(change: Change, table: Table, **values: Any) -> None:
    change.connection.execute(insert(table).values(**values))


def add_tenant(change: Change, name: str) -> int:
    row = insert(tenants).values(name=name, created=1.0, quotas={"tasks": 9})
    number: int = change.connection.execute(row.returning(tenants.c.id)).scalar_one()
    change.record("create", "tenant", number)
    return number


def add_task(change: Change, tenant: int, name: str, contents: list[bytes], **columns: Any) -> int:
    """Add a task with a version of each of these contents, from 1 on; the last is current."""
    row = {
        "tenant_id": tenant,
        "name": name,
        "created": 2.0,
        "changed": change.revision + 1,
        "last_version": len(contents),
        "current_version": len(contents),
        "labels": {},
        **columns,
    }
    added = insert(tasks).values(**row).returning(tasks.c.id)
    number: int = change.connection.execute(added).scalar_one()
    change.record("register", "task", number)
    there = set(change.connection.scalars(select(routers.c.sha256)))
    for version, data in enumerate(contents, 1):
        digest = hashlib.sha256(data).digest()
        if digest not in there:
            add(change, routers, sha256=digest, data=data)
            there.add(digest)
        add(
            change,
            versions,
            task_id=number,
            version=version,
            router_sha256=digest,
            inventory_sha256="ab" * 32,
            size_bytes=len(data),
            created=3.0,
            shipped=False,
            description=f"version {version}",
            template=None,
            provenance={"by": ["hand"]},
            scores={"exact": 0.5},
        )
    return number


def rows(database: Database, table: Table) -> list[dict[str, Any]]:
    with database.read() as connection:
        found = connection.execute(select(table).order_by(*table.primary_key)).mappings()
        return [dict(row) for row in found]


def described(database: Database) -> dict[str, dict[str, Any]]:
    """Every task under its name, with all that it has, and no number that differs elsewhere."""
    tenant = {row["id"]: row["name"] for row in rows(database, tenants)}
    data = {row["sha256"]: row["data"] for row in rows(database, routers)}
    return {
        f"{tenant[task['tenant_id']]}:{task['name']}": {
            **{name: task[name] for name in task if name not in ("id", "tenant_id", "changed")},
            "versions": [
                (data[row["router_sha256"]], *(v for k, v in row.items() if k != "task_id"))
                for row in rows(database, versions)
                if row["task_id"] == task["id"]
            ],
            "aliases": [
                (row["name"], row["version"])
                for row in rows(database, aliases)
                if row["task_id"] == task["id"]
            ],
            "shares": [
                row["tenant"] for row in rows(database, shares) if row["task_id"] == task["id"]
            ],
        }
        for task in rows(database, tasks)
    }


def break_it(database: Database, statement: str) -> None:
    with database.change(OPERATOR) as change:
        change.connection.execute(text(statement))
        change.record("create", "task", 1)


def test_a_backup_is_the_whole_registry(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "copy" / "registry.db"
    file.parent.mkdir()
    backup(database, file)
    assert [each.name for each in file.parent.iterdir()] == ["registry.db"]
    assert oct(file.stat().st_mode & 0o777) == "0o600"
    with Database(f"sqlite:///{file}") as copy:
        for table in metadata.sorted_tables:
            assert rows(copy, table) == rows(database, table), table.name
        assert check(copy) == ()


def test_a_backup_is_made_while_a_change_is_under_way(database: Database, tmp_path: Path) -> None:
    with database.change(OPERATOR) as change:
        add_tenant(change, "later")
        backup(database, tmp_path / "backup")
    with Database(f"sqlite:///{tmp_path}/backup") as copy:
        assert [row["name"] for row in rows(copy, tenants)] == ["default", "team"]
        assert check(copy) == ()


def test_an_export_has_no_keys_secrets_or_history(database: Database, tmp_path: Path) -> None:
    export(database, tmp_path / "export")
    with sqlite3.connect(tmp_path / "export") as copy:
        counts = {
            table.name: copy.execute(f"SELECT count(*) FROM {table.name}").fetchone()[0]
            for table in metadata.sorted_tables
        }
        secret = copy.execute("SELECT secret FROM state").fetchone()[0]
    copy.close()
    assert [counts[table.name] for table in (keys, audit, idempotency)] == [0, 0, 0]
    assert counts["tasks"] == 4
    assert secret != rows(database, state)[0]["secret"]
    assert rows(database, state)[0]["secret"] not in (tmp_path / "export").read_bytes()


def test_no_file_is_overwritten(database: Database, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for write in (backup, export):
        with pytest.raises(FileError, match="file: is there already"):
            write(database, tmp_path / "file")
        with pytest.raises(FileError, match=r"missing.*No such file"):
            write(database, tmp_path / "missing" / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture(params=["sqlite", "postgresql"])
def other_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of another database than `database`."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/other/registry.db"
    cluster: Cluster = request.getfixturevalue("postgres_cluster")
    return cluster.create_database()


@pytest.mark.parametrize("write", [backup, export])
def test_what_is_exported_is_imported_elsewhere(
    database: Database, tmp_path: Path, other_url: str, write: Any
) -> None:
    write(database, tmp_path / "file")
    with Database(other_url) as other:
        with other.change(OPERATOR) as change:  # numbers differ from those of the file
            add_tenant(change, "first")
            add_task(change, 1, "another", [b"five", b"one"])
        assert import_file(other, tmp_path / "file") == Imported(1, 4, 0)
        found = described(other)
        assert found.pop("default:another")["last_version"] == 2
        assert found == described(database)
        assert check(other) == ()
        assert import_file(other, tmp_path / "file") == Imported(0, 0, 4)
        with other.change(OPERATOR) as change:
            add_task(change, 1, "later", [b"six"])
        assert described(other)["default:later"]["last_version"] == 1


def test_every_imported_task_has_its_revision(database: Database, tmp_path: Path) -> None:
    export(database, tmp_path / "export")
    with Database(f"sqlite:///{tmp_path}/other/registry.db") as other:
        import_file(other, tmp_path / "export")
        history = [(row["action"], row["subject"], row["subject_id"]) for row in rows(other, audit)]
        changed = {str(row["id"]): row["changed"] for row in rows(other, tasks)}
    assert history == [("import", "tenant", "2"), *(("import", "task", each) for each in changed)]
    assert list(changed.values()) == [2, 3, 4, 5]


def test_a_name_with_another_router_stops_the_whole_import(
    database: Database, tmp_path: Path
) -> None:
    export(database, tmp_path / "export")
    with Database(f"sqlite:///{tmp_path}/other/registry.db") as other:
        with other.change(OPERATOR) as change:
            add_task(change, 1, "plain", [b"theirs"])
            team = add_tenant(change, "team")
            add_task(change, team, "live", [b"three"])
        before = {table.name: rows(other, table) for table in metadata.sorted_tables}
        with pytest.raises(FileError, match=r"other tasks of these names: default:plain$"):
            import_file(other, tmp_path / "export")
        assert {table.name: rows(other, table) for table in metadata.sorted_tables} == before


def test_a_purged_name_is_taken_again_and_its_versions_go_on_counting(
    database: Database, tmp_path: Path
) -> None:
    export(database, tmp_path / "export")
    before = described(database)["team:live"]
    with Database(f"sqlite:///{tmp_path}/other/registry.db") as other:
        with other.change(OPERATOR) as change:
            team = add_tenant(change, "team")
            purged = {"last_version": 5, "current_version": None, "deleted": 9.0}
            here = add_task(change, team, "live", [], **purged)
            add_task(change, team, "purged", [], last_version=7, current_version=None)
        assert import_file(other, tmp_path / "export") == Imported(0, 3, 1)
        found = described(other)
        live = found["team:live"]
        assert [row["id"] for row in rows(other, tasks) if row["name"] == "live"] == [here]
        assert found["team:purged"]["last_version"] == 7
        assert check(other) == ()
        assert import_file(other, tmp_path / "export") == Imported(0, 0, 4)
    numbers = ("last_version", "current_version", "canary_version")
    assert [live[name] for name in numbers] == [before[name] + 5 for name in numbers] == [8, 7, 8]
    assert [row[:2] for row in live["versions"]] == [(b"two", 6), (b"three", 7), (b"one", 8)]
    assert (live["aliases"], live["shares"]) == ([("prod", 6)], before["shares"])
    assert (live["deleted"], live["labels"]) == (None, {"of": "us"})


def test_a_dropped_task_stays_dropped_and_is_told(database: Database, tmp_path: Path) -> None:
    export(database, tmp_path / "export")
    with database.change(OPERATOR) as change:
        live = tasks.c.name.in_(["live", "plain"])
        change.connection.execute(tasks.update().where(live).values(deleted=18.0))
        change.record("drop", "task", 1)
    before = described(database)
    done = import_file(database, tmp_path / "export")
    assert done == Imported(0, 0, 2, ("default:plain", "team:live"))
    assert described(database) == before


def test_a_file_that_is_not_whole_is_not_imported(database: Database, tmp_path: Path) -> None:
    export(database, tmp_path / "export")
    copy = sqlite3.connect(tmp_path / "export")
    with copy:
        copy.execute("UPDATE routers SET data = x'00' WHERE data = ?", (b"four",))
    copy.close()
    (tmp_path / "text").write_text("hello" * 999)
    (tmp_path / "half").write_bytes((tmp_path / "export").read_bytes()[:-8192])
    before = described(database)
    for name, reason in {
        "export": "the router of team:deleted@1 is damaged",
        "text": "not a database",
        "half": "malformed|damaged|invalid|disk image|cannot be used",
        "missing": "unable to open",
    }.items():
        with pytest.raises(FileError, match=f"{name}: .*({reason})"):
            import_file(database, tmp_path / name)
    assert described(database) == before


def test_a_server_does_not_take_an_export_for_its_registry(
    database: Database, tmp_path: Path
) -> None:
    export(database, tmp_path / "export")
    with pytest.raises(StartError, match="it is not a registry"):
        Database(f"sqlite:///{tmp_path}/export")


def test_a_whole_registry_has_no_faults(database: Database) -> None:
    assert check(database) == ()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ("UPDATE routers SET data = sha256 WHERE length(data) = 3 AND {one}", "plain@1 is damaged"),
        ("DELETE FROM routers WHERE {one}", "router of default:plain@1 is missing"),
        ("UPDATE tasks SET last_version = 2 WHERE name = 'live'", "team:live@3 is beyond the last"),
        ("UPDATE tasks SET current_version = 9 WHERE name = 'live'", "no version 9, .*its current"),
        ("UPDATE tasks SET canary_version = 9 WHERE name = 'live'", "no version 9, .*its canary"),
        ("UPDATE aliases SET version = 9", "team:live has no version 9, which is prod"),
        ("UPDATE tasks SET changed = 99 WHERE name = 'live'", "live changed in revision 99"),
        ("DELETE FROM audit WHERE revision = 2", "has not every revision from 1 to 6"),
        ("DELETE FROM audit WHERE revision = 1", "has not every revision from 1 to 6"),
    ],
)
def test_every_fault_is_found(database: Database, damage: str, fault: str) -> None:
    one = "sha256 IN (SELECT router_sha256 FROM versions WHERE description = 'version 3')"
    break_it(database, damage.format(one=one))
    assert re.search(fault, "\n".join(check(database)))
