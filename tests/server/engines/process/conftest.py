"""Tasks of a small model; the engine's process can import what tests build engines with."""

from __future__ import annotations

import os

import pytest

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.task import TaskVersion
from support.engine_calls import MakeTask
from support.engine_process.hosted import TESTS
from support.random_inventory import make_task as random_task
from support.reliability.small_base import SmallBase


@pytest.fixture(autouse=True)
def importable_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(TESTS), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.fixture(scope="package")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallBase:
    """A small model with an inventory."""
    return SmallBase.write(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="package")
def inventory(small: SmallBase) -> Inventory:
    return small.read_inventory()


@pytest.fixture(scope="package")
def make_task(inventory: Inventory) -> MakeTask:
    """Makes a task version with a random router: `make_task(seed)`."""

    def make(seed: int) -> TaskVersion:
        return random_task(inventory, seed)

    return make
