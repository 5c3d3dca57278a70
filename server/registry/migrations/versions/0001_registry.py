"""The registry's first tables; schema.py says what they are for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.types import TypeEngine

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table."""
    _create_state()
    _create_tenants()
    _create_tasks()
    _create_versions()
    _create_audit()


def _create_state() -> None:
    op.create_table(
        "state",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("secret", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_state")),
    )


def _create_tenants() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", _name(63), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("quotas", sa.JSON, nullable=False),
        sa.Column("disabled", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenants")),
        sa.UniqueConstraint("name", name=op.f("uq_tenants_name")),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("tenant_id", sa.Integer, nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("label", sa.String(256), nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float),
        sa.Column("revoked", sa.Float),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keys")),
        _references_tenants("keys"),
    )


def _create_tasks() -> None:
    op.create_table(
        "tasks",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("tenant_id", sa.Integer, nullable=False),
        sa.Column("name", _name(64), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("changed", sa.BigInteger, nullable=False),
        sa.Column("last_version", sa.Integer, nullable=False),
        sa.Column("current_version", sa.Integer),
        sa.Column("canary_version", sa.Integer),
        sa.Column("canary_share", sa.Float),
        sa.Column("labels", sa.JSON, nullable=False),
        sa.Column("deleted", sa.Float),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
        _references_tenants("tasks"),
        sa.UniqueConstraint("tenant_id", "name", name=op.f("uq_tasks_tenant_id")),
    )
    op.create_table(
        "aliases",
        sa.Column("task_id", sa.Integer, nullable=False),
        sa.Column("name", _name(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("task_id", "name", name=op.f("pk_aliases")),
        _references_tasks("aliases"),
    )
    op.create_table(
        "shares",
        sa.Column("task_id", sa.Integer, nullable=False),
        sa.Column("tenant", _name(63), nullable=False),
        sa.PrimaryKeyConstraint("task_id", "tenant", name=op.f("pk_shares")),
        _references_tasks("shares"),
    )
    op.create_table(
        "idempotency",
        sa.Column("tenant_id", sa.Integer, nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("task_id", sa.Integer, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("created_task", sa.Boolean, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "key", name=op.f("pk_idempotency")),
        _references_tenants("idempotency"),
        _references_tasks("idempotency"),
    )
    op.create_index(op.f("ix_idempotency_at"), "idempotency", ["at"])


def _create_versions() -> None:
    op.create_table(
        "routers",
        sa.Column("sha256", sa.LargeBinary, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_routers")),
    )
    op.create_table(
        "versions",
        sa.Column("task_id", sa.Integer, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("router_sha256", sa.LargeBinary, nullable=False),
        sa.Column("inventory_sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.Integer, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("shipped", sa.Boolean, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("template", sa.Text),
        sa.Column("provenance", sa.JSON, nullable=False),
        sa.Column("scores", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("task_id", "version", name=op.f("pk_versions")),
        _references_tasks("versions"),
    )
    op.create_index(op.f("ix_versions_router_sha256"), "versions", ["router_sha256"])


def _create_audit() -> None:
    op.create_table(
        "audit",
        sa.Column("revision", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("change", sa.String(32), nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("key", sa.String(32)),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("subject", sa.String(8), nullable=False),
        sa.Column("subject_id", sa.String(32), nullable=False),
        sa.Column("version", sa.Integer),
        sa.Column("router_sha256", sa.LargeBinary),
        sa.Column("detail", sa.Text),
        sa.PrimaryKeyConstraint("revision", name=op.f("pk_audit")),
    )
    op.create_index(op.f("ix_audit_change"), "audit", ["change"])


def _name(length: int) -> TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def _references_tenants(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["tenant_id"], ["tenants.id"], name=op.f(f"fk_{table}_tenant_id")
    )


def _references_tasks(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name=op.f(f"fk_{table}_task_id"))
