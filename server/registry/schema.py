"""The tables of the registry, for SQLite and PostgreSQL alike.

`state` has one row, whose revision counts every change: whoever changes anything locks that row
first, so changes happen one after another, and revisions are in the order of their commits.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeEngine

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _name(length: int) -> TypeEngine[str]:
    """A column of names, in the order of their bytes: that of the index in memory."""
    return String(length).with_variant(String(length, collation="C"), "postgresql")


state = Table(
    "state",
    metadata,
    Column("id", Integer, primary_key=True),  # always 1
    Column("revision", BigInteger, nullable=False),
    Column("secret", LargeBinary, nullable=False),  # 32 bytes; salts prefix caches
)

tenants = Table(
    "tenants",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", _name(63), nullable=False, unique=True),
    Column("created", Float, nullable=False),
    Column("quotas", JSON, nullable=False),
    Column("disabled", Boolean, nullable=False, default=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),  # public: it is part of the key
    Column("tenant_id", ForeignKey(tenants.c.id), nullable=False),
    Column("role", String(16), nullable=False),
    Column("label", String(256), nullable=False),
    Column("digest", LargeBinary, nullable=False),  # sha256 of the whole key
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant_id", ForeignKey(tenants.c.id), nullable=False),
    Column("name", _name(64), nullable=False),
    Column("created", Float, nullable=False),
    Column("changed", BigInteger, nullable=False),  # revision
    Column("last_version", Integer, nullable=False),  # survives deletion and purging
    Column("current_version", Integer),  # NULL once purged
    Column("canary_version", Integer),
    Column("canary_share", Float),
    Column("labels", JSON, nullable=False),
    Column("deleted", Float),
    UniqueConstraint("tenant_id", "name"),
)

routers = Table(
    "routers",
    metadata,
    Column("sha256", LargeBinary, primary_key=True),  # of data, 32 bytes
    Column("data", LargeBinary, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    Column("task_id", ForeignKey(tasks.c.id), nullable=False),
    Column("version", Integer, nullable=False),
    Column("router_sha256", LargeBinary, nullable=False),
    Column("inventory_sha256", String(64), nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("created", Float, nullable=False),
    Column("shipped", Boolean, nullable=False, default=False),  # came with an inventory
    Column("description", Text, nullable=False),
    Column("template", Text),
    Column("provenance", JSON, nullable=False),
    Column("scores", JSON, nullable=False),
    PrimaryKeyConstraint("task_id", "version"),
    Index("ix_versions_router_sha256", "router_sha256"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("task_id", ForeignKey(tasks.c.id), nullable=False),
    Column("name", _name(64), nullable=False),
    Column("version", Integer, nullable=False),
    PrimaryKeyConstraint("task_id", "name"),
)

shares = Table(
    "shares",
    metadata,
    Column("task_id", ForeignKey(tasks.c.id), nullable=False),
    # By name: whoever shares a task does not learn whether there is such a tenant.
    Column("tenant", _name(63), nullable=False),
    PrimaryKeyConstraint("task_id", "tenant"),
)

audit = Table(
    "audit",
    metadata,
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("change", String(32), nullable=False),  # the transaction, a random id
    Column("at", Float, nullable=False),
    Column("tenant", String(63), nullable=False),  # of whoever did it
    Column("key", String(32)),
    Column("action", String(32), nullable=False),
    Column("subject", String(8), nullable=False),  # task, tenant or key
    Column("subject_id", String(32), nullable=False),
    Column("version", Integer),
    Column("router_sha256", LargeBinary),
    Column("detail", Text),
    Index("ix_audit_change", "change"),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant_id", ForeignKey(tenants.c.id), nullable=False),
    Column("key", String(255), nullable=False),
    Column("digest", LargeBinary, nullable=False),  # of what was asked for
    Column("task_id", ForeignKey(tasks.c.id), nullable=False),
    Column("version", Integer, nullable=False),
    Column("created_task", Boolean, nullable=False),
    Column("at", Float, nullable=False),
    PrimaryKeyConstraint("tenant_id", "key"),
    Index("ix_idempotency_at", "at"),
)
