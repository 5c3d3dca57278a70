"""`polyrex registry`, on the database itself."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text, update

from polyrex.server.registry.database import Database, folder_url
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.schema import routers, tasks, tenants, versions
from support.command_line import polyrex


def add_tenant(database: Database, name: str) -> None:
    with database.change(OPERATOR) as change:
        row = {"name": name, "created": 0.0, "quotas": {}}
        change.connection.execute(insert(tenants), row)
        change.record("create", "tenant", name)


def names(url: str) -> list[str]:
    with Database(url) as database, database.read() as connection:
        return list(connection.scalars(select(tenants.c.name).order_by(tenants.c.id)))


def test_migrate_makes_the_tables(database_url: str) -> None:
    before = polyrex("registry", "check", "--registry", database_url)
    assert before.exit_code == 1
    assert before.stderr.startswith("polyrex registry: ")
    assert polyrex("registry", "migrate", "--registry", database_url).exit_code == 0
    after = polyrex("registry", "check", "--registry", database_url)
    assert (after.exit_code, after.stdout) == (0, "the registry is whole\n")


def test_a_registry_is_carried_to_another_database(database_url: str, tmp_path: Path) -> None:
    with Database(database_url) as database:
        add_tenant(database, "team")
    there = tmp_path / "there"
    for written, extra in (("backup", 1), ("export", 0)):
        file = tmp_path / written
        assert polyrex("registry", written, file, "--registry", database_url).exit_code == 0
        done = polyrex("registry", "import", file, "--tasks-dir", there)
        assert done.exit_code == 0, done.output
        assert done.stdout == f"0 tasks and {extra} tenants added, 0 tasks unchanged\n"
    assert names(folder_url(there)) == ["default", "team"]
    assert names(f"sqlite:///{tmp_path}/backup") == ["default", "team"]


def test_copies_and_checks_are_made_beside_a_server(tmp_path: Path) -> None:
    with Database(folder_url(tmp_path)) as database:
        add_tenant(database, "team")
        copy = tmp_path / "copy"
        for words in (("check",), ("backup", copy / "b"), ("export", copy / "e")):
            copy.mkdir(exist_ok=True)
            assert polyrex("registry", *words, "--tasks-dir", tmp_path).exit_code == 0
        for words in (("migrate",), ("import", copy / "e")):
            done = polyrex("registry", *words, "--tasks-dir", tmp_path)
            assert done.exit_code == 1
            assert "another server uses this registry" in done.stderr


def test_check_prints_what_is_wrong(database_url: str) -> None:
    with Database(database_url) as database, database.change(OPERATOR) as change:
        change.record("create", "tenant", 1)
        change.record("create", "tenant", 2)
        change.connection.execute(text("DELETE FROM audit WHERE revision = 1"))
    done = polyrex("registry", "check", "--registry", database_url)
    assert done.exit_code == 1
    assert done.stdout.startswith("the history has not every revision from 1 to 2")


def test_the_registry_is_the_one_that_the_servers_environment_names(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Database(database_url).close()
    Database(folder_url(tmp_path / "folder")).close()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "none"))
    assert polyrex("registry", "check").exit_code == 1
    for variable, value in {
        "POLYREX_SERVE_REGISTRY": database_url,
        "POLYREX_SERVE_REGISTRY_URL": database_url,
        "POLYREX_SERVE_TASKS_DIR": str(tmp_path / "folder"),
    }.items():
        with monkeypatch.context() as environment:
            environment.setenv(variable, value)
            assert polyrex("registry", "check").exit_code == 0, variable


def test_import_names_the_tasks_that_stay_dropped(database_url: str, tmp_path: Path) -> None:
    task = {"tenant_id": 1, "name": "one", "created": 0.0, "changed": 1, "labels": {}}
    router = {"sha256": hashlib.sha256(b"router").digest(), "data": b"router"}
    version = {
        **{"task_id": 1, "version": 1, "router_sha256": router["sha256"], "size_bytes": 6},
        **{"inventory_sha256": "ab" * 32, "created": 0.0, "description": ""},
        **{"provenance": {}, "scores": {}},
    }
    with Database(database_url) as database, database.change(OPERATOR) as change:
        change.connection.execute(insert(routers), router)
        counted = {"last_version": 1, "current_version": 1}
        change.connection.execute(insert(tasks), task | counted)
        change.connection.execute(insert(versions), version)
        change.record("register", "task", 1)
    file = tmp_path / "export"
    assert polyrex("registry", "export", file, "--registry", database_url).exit_code == 0
    with Database(database_url) as database, database.change(OPERATOR) as change:
        change.connection.execute(update(tasks).values(deleted=1.0))
        change.record("drop", "task", 1)
    done = polyrex("registry", "import", file, "--registry", database_url)
    assert done.stdout == (
        "0 tasks and 0 tenants added, 0 tasks unchanged\ndropped here, and left so: default:one\n"
    )
