"""Alembic runs this to migrate: on the connection, and in the transaction, that it is given."""

from __future__ import annotations

from alembic import context

from polyrex.server.registry.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
    target_metadata=metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
