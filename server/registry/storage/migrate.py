"""Creates the tables of a registry, and brings those of an older version to this one's."""

from __future__ import annotations

import logging
import secrets
import time
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, insert, inspect, select

from polyrex.server.errors import StartError
from polyrex.server.registry.principal import DEFAULT_TENANT
from polyrex.server.registry.schema import metadata, state, tenants

VERSION_TABLE = "registry_schema"
"""Where Alembic keeps the schema's version: a name that another program's tables do not have."""

_MIGRATIONS = Path(__file__).parent.parent / "migrations"


def upgrade(connection: Connection) -> None:
    """Bring the schema to this version within a transaction, from any older one or from nothing.

    Raises StartError where the schema is newer, or its tables are not a registry's.
    """
    # Its logger tells of every step, also where there is none to take.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    current = _current(connection)
    if current == _head():
        return
    if current is None and _has_tables(connection):
        raise StartError("it has tables of the same names that are not a registry's")
    command.upgrade(_config(connection), "head")
    if connection.execute(select(state.c.id)).first() is None:
        first = {"id": 1, "revision": 0, "secret": secrets.token_bytes(32)}
        connection.execute(insert(state), first)
        values = {"name": DEFAULT_TENANT, "created": time.time(), "quotas": {}}
        connection.execute(insert(tenants), values)


def check_schema(connection: Connection) -> None:
    """Raise StartError unless the schema is of this version."""
    current = _current(connection)
    if current is None:
        raise StartError("it has no registry")
    if current != _head():
        raise StartError("its schema is of an older version: run polyrex registry migrate")


def _current(connection: Connection) -> str | None:
    """The schema's version, None where there is none; raises StartError where it is newer."""
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    current = context.get_current_revision()
    known = {script.revision for script in _scripts().walk_revisions()}
    if current is not None and current not in known:
        raise StartError(f"its schema ({current}) is newer than this polyrex: install a newer one")
    return current


def _head() -> str | None:
    return _scripts().get_current_head()


def _has_tables(connection: Connection) -> bool:
    return bool(set(inspect(connection).get_table_names()) & set(metadata.tables))


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(_MIGRATIONS))


def _config(connection: Connection) -> Config:
    config = Config(attributes={"connection": connection, "version_table": VERSION_TABLE})
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config
