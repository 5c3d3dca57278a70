"""A bundle: an inventory's file, with the routers of its tasks in `routers/` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyrex.adapters.errors import FileError
from polyrex.adapters.model.attach import AdaptedModel

from .inventory import Inventory, read_inventory, write_inventory
from .router import Router, RouterMetadata, read_router, write_router
from .task import TaskVersion

INVENTORY = "inventory.safetensors"
ROUTERS = "routers"


@dataclass(frozen=True)
class Bundle:
    """An inventory with the routers that came with it."""

    inventory: Inventory

    @classmethod
    def read(cls, path: Path) -> Bundle:
        """The bundle of an inventory's file, or of the folder that holds one.

        Raises what `read_inventory` raises; routers are read when they are asked for.
        """
        return cls(read_inventory(path / INVENTORY if path.is_dir() else path))

    @property
    def folder(self) -> Path:
        """Where the routers lie; there need not be any."""
        return self.inventory.path.parent / ROUTERS

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks that have a router, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.safetensors"))

    def router_path(self, task: str) -> Path:
        """Where a task's router lies, or would."""
        return self.folder / f"{task}.safetensors"

    def router(self, task: str) -> Router:
        """A task's router; raises FileError where it cannot be read, or is of another inventory."""
        return read_router_file(self.router_path(task), self.inventory)

    def task(self, name: str) -> TaskVersion:
        """A task as a version that is in no registry; raises as `router`."""
        return TaskVersion.from_bytes(name, _bytes(self.router_path(name)), self.inventory)

    def logits(self) -> dict[str, Tensor]:
        """The routing logits [groups, R] of every task."""
        return {task: self.router(task).logits for task in self.tasks}


def read_router_file(path: Path, inventory: Inventory) -> Router:
    """A router from its file; raises FileError where it cannot be read, and as `read_router`."""
    return read_router(_bytes(path), str(path), inventory)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class NewRouter:
    """A router that is not written yet, with its metadata."""

    logits: Tensor  # [groups, R]
    description: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)

    def metadata(self, inventory_sha256: str, task: str) -> RouterMetadata:
        """The metadata of the router's file, for this inventory."""
        return RouterMetadata(
            inventory_sha256, task, self.description, self.provenance, self.scores
        )


def write_bundle(
    folder: Path,
    adapted: AdaptedModel,
    routers: Mapping[str, NewRouter],
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the inventory of an adapted model in `dtype`, and beside it the routers by task.

    Raises TensorMismatch where a value is not finite in `dtype`.
    """
    (folder / ROUTERS).mkdir(parents=True, exist_ok=True)
    sha256 = write_inventory(folder / INVENTORY, adapted, dtype=dtype)
    for task, router in routers.items():
        path = folder / ROUTERS / f"{task}.safetensors"
        write_router(path, router.logits, adapted.spec, router.metadata(sha256, task))
