"""What the registry knows of a task and of its versions, without the routers' bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class VersionRecord:
    """One version of a task: it never changes, and its number is never used again."""

    version: int  # from 1 on, without gaps
    router_sha256: str
    inventory_sha256: str
    size_bytes: int
    created: float  # unix time, in seconds
    description: str = ""
    template: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Canary:
    """A share of a task's requests, from 0 to 1, that another version answers."""

    version: int
    share: float


@dataclass(frozen=True)
class TaskRecord:
    """A task as it stands at one revision of the registry."""

    id: int
    tenant: str
    name: str
    current: VersionRecord
    last_version: int
    created: float
    changed: int  # the revision of the registry in which it changed last
    labels: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, int] = field(default_factory=dict)
    canary: Canary | None = None
    shared_with: tuple[str, ...] = ()  # names of tenants
    deleted: float | None = None  # unix time; it can be undeleted until it is purged


@dataclass(frozen=True)
class TaskPage:
    """Some tasks in the order of their names, and whether more follow."""

    tasks: tuple[TaskRecord, ...]
    has_more: bool
