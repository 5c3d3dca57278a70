"""A task: a name with versions; a version is a router with what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .inventory import Inventory
from .router import Router, RouterMetadata, read_router, router_bytes


@dataclass(frozen=True)
class TaskInfo:
    """A task version as it is listed."""

    name: str
    version: int
    router_sha256: str
    size_bytes: int
    created: float  # unix time, in seconds
    description: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    tenant: str = "default"


@dataclass(frozen=True)
class TaskVersion:
    """A task version with its router: valid for whoever holds it, whatever becomes of the task.

    A registry hands them out; `unregistered` makes one that no registry knows.
    """

    info: TaskInfo
    router: Router

    @classmethod
    def from_bytes(cls, name: str, data: bytes, inventory: Inventory) -> TaskVersion:
        """Version 1 of a task from its router's file; raises what `read_router` raises."""
        router = read_router(data, f"router of task {name}", inventory)
        about = router.metadata
        info = TaskInfo(
            name=name,
            version=1,
            router_sha256=router.sha256,
            size_bytes=len(data),
            created=0.0,
            description=about.description,
            provenance=about.provenance,
            scores=about.scores,
        )
        return cls(info, router)

    @classmethod
    def unregistered(cls, inventory: Inventory, name: str, logits: Tensor) -> TaskVersion:
        """A task that is in no registry, routed by logits [groups, R].

        Raises TensorMismatch where they are not finite.
        """
        data = router_bytes(logits, inventory.spec, RouterMetadata(inventory.sha256, name))
        return cls.from_bytes(name, data, inventory)
