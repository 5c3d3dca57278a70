"""Inventories, routers and tasks drawn at random, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyrex.adapters.files.inventory import Inventory, read_inventory, write_inventory
from polyrex.adapters.files.router import RouterMetadata, router_bytes
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.model.intuition import Intuition
from polyrex.adapters.spec import AdapterSpec
from support.small_model import random_llama

MakeRouter = Callable[..., bytes]
"""`make_router(seed)`: the bytes of a random router's file."""


def make_inventory(
    path: Path,
    base_path: str,
    spec: AdapterSpec,
    spread: float = 0.3,
    *,
    dtype: torch.dtype = torch.float32,
    intuition: Intuition | None = None,
) -> Inventory:
    """Write random experts for every projection, opened as far as `spread` says."""
    model = load_base(base_path, torch.float32)
    adapted = attach(model, spec, find_targets(model), intuition=intuition)
    _open_adapters(adapted, spread)
    write_inventory(path, adapted, dtype=dtype)
    return read_inventory(path)


def random_adapted(spec: AdapterSpec, device: torch.device) -> AdaptedModel:
    """A random Llama with random experts that contribute, the same on every device."""
    model = random_llama()
    adapted = attach(model, spec, find_targets(model))
    _open_adapters(adapted, 0.3)
    model.to(device)
    return adapted


def _open_adapters(adapted: AdaptedModel, spread: float) -> None:
    """Replace the parameters that start at 0, with which fresh experts contribute nothing.

    A gate becomes `spread`; a B side is drawn with that standard deviation.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted.layers:
            parameters = dict(layer.experts.named_parameters())
            if "gate" in parameters:
                parameters["gate"].fill_(spread)
            else:
                nn.init.normal_(parameters["lora_b"], std=spread, generator=generator)


def random_logits(inventory: Inventory, seed: int) -> Tensor:
    """Routing logits [groups, R], far enough from 0 that tasks differ."""
    logits = torch.randn(inventory.routing_shape, generator=torch.Generator().manual_seed(seed))
    # The static form of T-REX takes the weights themselves.
    return logits if inventory.spec.form == "static" else 6 * logits


def random_router(
    inventory: Inventory, seed: int, task: str | None = None, **metadata: Any
) -> bytes:
    """The bytes of a random router's file; `metadata` are fields of RouterMetadata."""
    about = RouterMetadata(inventory.sha256, task or f"random-{seed}", **metadata)
    return router_bytes(random_logits(inventory, seed), inventory.spec, about)


def make_task(inventory: Inventory, seed: int, name: str | None = None) -> TaskVersion:
    """A task version with a random router; it is in no registry."""
    name = name or f"task-{seed}"
    return TaskVersion.from_bytes(name, random_router(inventory, seed, name), inventory)
