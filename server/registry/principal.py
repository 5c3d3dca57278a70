"""Who asks: a tenant, in a role."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

DEFAULT_TENANT = "default"
"""The tenant of whoever runs a server for himself, and of the tasks that ship with an inventory."""


class Role(StrEnum):
    """What a key may do; http/access.py says which routes each role may use."""

    inference = "inference"
    task_admin = "task-admin"
    server_admin = "server-admin"
    metrics = "metrics"


@dataclass(frozen=True)
class Principal:
    """The tenant and role of a request; `key` is the id of the API key that it came with."""

    tenant: str = DEFAULT_TENANT
    role: Role = Role.server_admin
    key: str | None = None


OPERATOR = Principal()
"""Whoever started the server: a request without a key, where none is asked for, and an old file."""
