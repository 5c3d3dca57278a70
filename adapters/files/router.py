"""The router: the routing logits of one task for one inventory; one small safetensors file.

It holds one float32 tensor, `routing` [groups, R]. The metadata, all strings:

| key | value |
|---|---|
| format, format_version | `polyrex.router`, `1` |
| method, hyperparameters | as in the inventory |
| inventory_sha256 | the inventory that it routes |
| task, description | the task's name, and a description in words |
| provenance, scores | JSON objects: where the router comes from, how well it does |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyrex.adapters.errors import InventoryMismatch, MalformedFile
from polyrex.adapters.spec import AdapterSpec

from .inventory import Inventory
from .tensor_file import cast_finite, parse, serialise, sha256, write_atomic

FORMAT = "polyrex.router"
_TENSOR = "routing"
_HEADER_LIMIT = 32 << 10  # bytes; our headers have about one thousand


@dataclass(frozen=True)
class RouterMetadata:
    """The metadata of a router's file."""

    inventory_sha256: str
    task: str
    description: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Router:
    """A router that fits its inventory."""

    logits: Tensor  # [groups, R] float32
    weights: Tensor  # [M, W] float32, the row of the routing table that the logits give
    metadata: RouterMetadata
    sha256: str


def router_bytes(logits: Tensor, spec: AdapterSpec, metadata: RouterMetadata) -> bytes:
    """A router's file. logits [groups, R], finite in float32 (else TensorMismatch)."""
    return serialise(
        {_TENSOR: cast_finite(logits.detach().cpu(), torch.float32, f"router {metadata.task}")},
        {
            "format": FORMAT,
            "format_version": "1",
            "method": spec.method,
            "hyperparameters": spec.to_json(),
            "inventory_sha256": metadata.inventory_sha256,
            "task": metadata.task,
            "description": metadata.description,
            "provenance": json.dumps(dict(metadata.provenance), sort_keys=True),
            "scores": json.dumps(dict(metadata.scores), sort_keys=True),
        },
    )


def write_router(path: Path, logits: Tensor, spec: AdapterSpec, metadata: RouterMetadata) -> str:
    """Write a router's file, atomically; returns its sha256."""
    data = router_bytes(logits, spec, metadata)
    write_atomic(path, data)
    return sha256(data)


def size_limit(inventory: Inventory) -> int:
    """The maximum size in bytes of a router of this inventory."""
    groups, logits = inventory.routing_shape
    return 8 + _HEADER_LIMIT + 4 * groups * logits


def read_router(data: bytes, source: str, inventory: Inventory) -> Router:
    """Read and check a router from bytes that may be hostile; `source` names them in errors.

    Raises MalformedFile (too large, truncated, another format, newer version, metadata missing or
    unreadable), InventoryMismatch (made for another inventory or method), or TensorMismatch (name,
    shape, dtype, or values that are not finite, or that give weights that float16 cannot hold).
    """
    limit = size_limit(inventory)
    if len(data) > limit:
        raise MalformedFile(f"{source}: a router has at most {limit} bytes, got {len(data)}")
    file = parse(data, source, FORMAT, _HEADER_LIMIT)
    if file.text("inventory_sha256") != inventory.sha256:
        raise InventoryMismatch(
            f"{source}: made for inventory {file.text('inventory_sha256')!r:.80}, "
            f"this server has {inventory.sha256}"
        )
    for key, expected in (
        ("method", inventory.spec.method),
        ("hyperparameters", inventory.hyperparameters),
    ):
        if file.text(key) != expected:
            raise InventoryMismatch(
                f"{source}: {key} must be {expected}, as in the inventory, "
                f"got {file.text(key)!r:.400}"
            )
    logits = file.checked({_TENSOR: inventory.routing_shape}, ("F32",))[_TENSOR]
    weights = inventory.route(logits)
    # float16 has the narrowest range of the dtypes that models compute in.
    cast_finite(weights, torch.float16, f"{source}: routing weights of {_TENSOR}")
    metadata = RouterMetadata(
        inventory_sha256=inventory.sha256,
        task=file.text("task"),
        description=file.text("description"),
        provenance=file.json_object("provenance"),
        scores=file.json_object("scores"),
    )
    return Router(logits, weights, metadata, sha256(data))
