"""The embedded engine on the real base model, in float32, and the same model without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyrex.adapters.files.inventory import Inventory, load_experts
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import load_base
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from support.engine_calls import SMALL, MakeEngine, MakeTask, PlainModel
from support.random_inventory import MakeRouter
from support.small_model import write_small_model


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small random model."""
    folder: Path = tmp_path_factory.mktemp("small")
    write_small_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def adapted(base_path: str, random_inventory: Inventory) -> AdaptedModel:
    """The model that all engines of these tests run, though not at the same time."""
    return load_experts(random_inventory, load_base(base_path, torch.float32))


@pytest.fixture(scope="session")
def plain(base_path: str, random_inventory: Inventory) -> PlainModel:
    model = load_experts(random_inventory, load_base(base_path, torch.float32))
    return PlainModel(model, random_inventory)


@pytest.fixture(scope="session")
def make_engine(adapted: AdaptedModel, random_inventory: Inventory) -> MakeEngine:
    """Makes an engine, not started: `make_engine(slots=2)` changes a size."""

    def make(**sizes: Any) -> EmbeddedEngine:
        config = replace(SMALL, **sizes)
        return EmbeddedEngine(adapted, random_inventory, config)

    return make


@pytest.fixture(scope="session")
def engine(make_engine: MakeEngine) -> Iterator[EmbeddedEngine]:
    """One engine, for all tests that leave it as they found it."""
    engine = make_engine()
    asyncio.run(engine.start())
    yield engine
    asyncio.run(engine.stop())


@pytest.fixture(scope="session")
def make_task(make_router: MakeRouter, random_inventory: Inventory) -> MakeTask:
    """Makes a task version with a random router: `make_task(seed)`."""

    def make(seed: int) -> TaskVersion:
        return TaskVersion.from_bytes(f"task-{seed}", make_router(seed), random_inventory)

    return make
