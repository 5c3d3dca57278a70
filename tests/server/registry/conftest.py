"""Registries on a new database, SQLite and PostgreSQL in turn, and small routers for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import insert

from polyrex.adapters.files.inventory import Inventory, read_inventory, write_inventory
from polyrex.adapters.files.router import RouterMetadata, router_bytes
from polyrex.adapters.spec import AdapterSpec
from polyrex.server.config import RegistryConfig
from polyrex.server.registry.database import Database
from polyrex.server.registry.principal import OPERATOR, Principal, Role
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.registry.schema import tenants
from support.random_inventory import random_adapted
from support.registry.makers import AddTenant, MakeRouter, OpenRegistry


@pytest.fixture(scope="session")
def small_inventory(tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    """A TensorPoly-I inventory of a random model."""
    path: Path = tmp_path_factory.mktemp("small") / "inventory.safetensors"
    spec = AdapterSpec("tensorpoly-1", rank=3, experts=4)
    write_inventory(path, random_adapted(spec, torch.device("cpu")))
    return read_inventory(path)


@pytest.fixture(scope="session")
def make_small_router(small_inventory: Inventory) -> MakeRouter:
    """Makes the file of a random router for the small inventory."""

    def make(seed: int = 0, description: str = "a task", **provenance: object) -> bytes:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(small_inventory.routing_shape, generator=generator)
        metadata = RouterMetadata(
            small_inventory.sha256,
            f"task-{seed}",
            description,
            {"rows": 32} | provenance,
            {"accuracy": 0.5},
        )
        return router_bytes(logits, small_inventory.spec, metadata)

    return make


@pytest.fixture
def open_registry(database_url: str, small_inventory: Inventory) -> Iterator[OpenRegistry]:
    """Opens registries on the test's database; they are closed at its end, or before."""
    with ExitStack() as opened:

        def open_one(inventory: Inventory = small_inventory, **config: Any) -> TaskRegistry:
            database = Database(database_url)
            registry = TaskRegistry(database, inventory, RegistryConfig(**config))
            return opened.enter_context(closing(registry))

        yield open_one


@pytest.fixture
def pair(postgres_url: str, small_inventory: Inventory) -> Iterator[list[TaskRegistry]]:
    """Two registries on one PostgreSQL database; nobody follows it yet."""
    with ExitStack() as opened:
        yield [
            opened.enter_context(
                closing(TaskRegistry(Database(postgres_url), small_inventory, RegistryConfig()))
            )
            for _ in range(2)
        ]


@pytest.fixture
def registry(open_registry: OpenRegistry) -> TaskRegistry:
    """A registry without tasks."""
    return open_registry()


@pytest.fixture
def add_tenant() -> AddTenant:
    """Adds tenants to a registry's database."""

    def add(registry: TaskRegistry, name: str, **quotas: int) -> Principal:
        with registry.database.change(OPERATOR) as change:
            row = {"name": name, "created": time.time(), "quotas": quotas}
            made = change.connection.execute(insert(tenants).values(row).returning(tenants.c.id))
            change.record("create", "tenant", made.scalar_one())
        return Principal(name, Role.task_admin)

    return add
