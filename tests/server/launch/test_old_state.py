"""A state folder that the code of commit 5e719e6 wrote is taken over, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from polyrex.adapters.files.bundle import Bundle
from polyrex.adapters.files.inventory import read_inventory
from polyrex.server.config import RegistryConfig
from polyrex.server.errors import StartError
from polyrex.server.launch.loading import open_registry
from polyrex.server.registry.database import Database
from polyrex.server.registry.files.takeover import take_over
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.registry import TaskRegistry

OLD = Path(__file__).parents[2] / "fixtures" / "old_files"
POLY = OLD / "inventories" / "poly" / "inventory.safetensors"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())


@contextmanager
def taken_over(state: Path) -> Iterator[tuple[list[dict[str, Any]], TaskRegistry]]:
    """The tasks that a registry finds in a state folder, without the times of the files."""
    bundle = Bundle(read_inventory(POLY))
    with closing(open_registry(RegistryConfig(), state, bundle)) as registry:
        infos = [registry.pin(OPERATOR, task.name).info for task in registry.page(OPERATOR).tasks]
        tasks = [asdict(info) for info in infos]
        for task in tasks:
            del task["created"]
            assert task.pop("tenant") == "default"
        yield tasks, registry


def test_registry_takes_a_state_folder_over(tmp_path: Path) -> None:
    """Versions, a dropped shipped task, damaged files, and what a crash left behind."""
    state = Path(shutil.copytree(OLD / "state", tmp_path / "state"))
    expected = EXPECTED["state"]
    with taken_over(state) as (tasks, registry):
        assert tasks == expected["tasks"]
        check_taken_over(state, tasks, registry)
    taken = {path.name for path in (state / "taken-over").iterdir()}
    left = {path.name for path in state.glob("*.safetensors")}
    assert sorted(taken | left) == sorted([*expected["left"], "added@2.safetensors"])
    assert left == expected["rejected"].keys()


def check_taken_over(
    state: Path, tasks: Sequence[Mapping[str, Any]], registry: TaskRegistry
) -> None:
    """What is rejected, and that versions go on counting where the files ended."""
    expected = EXPECTED["state"]
    rejected = {Path(path).name: reason for path, reason in registry.rejected.items()}
    assert rejected.keys() == expected["rejected"].keys()
    assert "no complete safetensors file" in rejected["damaged@2.safetensors"]
    assert "made for inventory" in rejected["foreign@1.safetensors"]
    for task in tasks:
        file = state / "taken-over" / f"{task['name']}@{task['version']}.safetensors"
        done = registry.register(OPERATOR, task["name"], file.read_bytes())
        assert done.version.version == task["version"]
        assert done.version.router_sha256 == task["router_sha256"]
    damaged = (state / "damaged@2.safetensors").read_bytes()
    fitting = POLY.parent / "routers" / "first.safetensors"
    assert registry.register(OPERATOR, "damaged", fitting.read_bytes()).version.version == 3
    assert (state / "damaged@2.safetensors").read_bytes() == damaged


@pytest.mark.parametrize("lost", ["second.dropped", "first@2.safetensors", "added@3.safetensors"])
def test_state_folder_without_one_of_its_files_is_another_state(lost: str, tmp_path: Path) -> None:
    state = Path(shutil.copytree(OLD / "state", tmp_path / "state"))
    (state / lost).unlink()
    with taken_over(state) as (tasks, _):
        assert tasks != EXPECTED["state"]["tasks"]


def test_a_folder_that_everybody_may_write_to_is_not_believed(
    tmp_path: Path, postgres_url: str
) -> None:
    """Wherever the registry lies."""
    state = Path(shutil.copytree(OLD / "state", tmp_path / "state"))
    bundle = Bundle(read_inventory(POLY))
    state.chmod(0o777)
    for url in (f"sqlite:///{tmp_path}/elsewhere.db", postgres_url):
        with (
            closing(Database(url)) as database,
            pytest.raises(StartError, match=r"state: every user may write to this folder"),
        ):
            take_over(database, bundle.inventory, state)
    state.chmod(0o700)
    with closing(open_registry(RegistryConfig(url=postgres_url), state, bundle)) as registry:
        assert len(registry) == len(EXPECTED["state"]["tasks"])
