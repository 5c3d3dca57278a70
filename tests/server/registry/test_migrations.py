"""The schema that migrations make is the one that the code uses, and a newer one is refused."""

from __future__ import annotations

from contextlib import closing

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from polyrex.server.errors import StartError
from polyrex.server.registry.database import Database
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.schema import metadata
from polyrex.server.registry.storage.migrate import VERSION_TABLE


def differences(database: Database) -> list[object]:
    """What Alembic would change to make the database's schema that of schema.py."""
    with database.read() as connection:
        options = {"version_table": VERSION_TABLE, "compare_type": True}
        context = MigrationContext.configure(connection, opts=options)
        found: list[object] = compare_metadata(context, metadata)
        return found


def test_migrations_make_the_schema_of_the_code(database_url: str) -> None:
    with closing(Database(database_url)) as database:
        assert differences(database) == []


@pytest.mark.parametrize(
    "statement",
    ["ALTER TABLE tasks ADD COLUMN colour INTEGER", "DROP INDEX ix_audit_change"],
)
def test_a_schema_that_differs_is_seen(database_url: str, statement: str) -> None:
    with closing(Database(database_url)) as database:
        with database.change(OPERATOR) as change:
            change.connection.execute(text(statement))
            change.record("create", "tenant", 1)
        assert len(differences(database)) == 1


def test_a_newer_schema_is_refused_and_left_as_it_is(database_url: str) -> None:
    database = Database(database_url)
    with database.change(OPERATOR) as change:
        change.connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
        change.record("create", "tenant", 1)
    database.close()
    address = database_url.removeprefix("sqlite:///").rpartition("@")[2]  # without a password
    for serving in (True, False):
        with pytest.raises(StartError, match=r"schema \(9999\) is newer than this polyrex") as told:
            Database(database_url, serving=serving)
        assert address in str(told.value)


def test_an_older_schema_is_migrated_by_a_server_and_by_nothing_else(postgres_url: str) -> None:
    with pytest.raises(StartError, match="it has no registry"):
        Database(postgres_url, serving=False)
    Database(postgres_url).close()
    with closing(Database(postgres_url, serving=False)) as database:
        assert differences(database) == []


def test_another_programs_tables_are_not_taken_over(postgres_url: str) -> None:
    import psycopg

    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE tasks (id INTEGER)")
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('theirs')")
    with pytest.raises(StartError, match="tables of the same names that are not a registry's"):
        Database(postgres_url)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP TABLE tasks")
    with closing(Database(postgres_url)) as database, database.read() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "theirs"
