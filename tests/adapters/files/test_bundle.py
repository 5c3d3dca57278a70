"""An inventory with the routers beside it, and tasks that are in no registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from polyrex.adapters.errors import FileError, InventoryMismatch, TensorMismatch
from polyrex.adapters.files.bundle import Bundle, NewRouter, write_bundle
from polyrex.adapters.files.inventory import Inventory, load_experts
from polyrex.adapters.files.router import read_router
from polyrex.adapters.files.task import TaskVersion

MakeModel = Callable[..., nn.Module]


@pytest.fixture
def folder(small_inventory: Inventory, make_model: MakeModel, tmp_path: Path) -> Path:
    """A bundle of two tasks."""
    adapted = load_experts(small_inventory, make_model())
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(small_inventory.routing_shape, generator=generator) for _ in range(2)]
    routers = {
        "second": NewRouter(logits[0], "two", {"rows": 2}),
        "first": NewRouter(logits[1], scores={"right": 0.5}),
    }
    write_bundle(tmp_path / "bundle", adapted, routers)
    return tmp_path / "bundle"


def test_a_bundle_is_read_by_its_folder_or_its_inventory(folder: Path) -> None:
    by_folder, by_file = Bundle.read(folder), Bundle.read(folder / "inventory.safetensors")
    assert by_folder.inventory.sha256 == by_file.inventory.sha256
    assert by_folder.tasks == ["first", "second"]
    assert by_folder.router("second").metadata.description == "two"
    assert by_folder.router("first").metadata.scores == {"right": 0.5}
    assert not torch.equal(by_folder.logits()["first"], by_folder.logits()["second"])


def test_an_inventory_alone_is_a_bundle_without_tasks(small_inventory: Inventory) -> None:
    bundle = Bundle(small_inventory)
    assert bundle.tasks == []
    with pytest.raises(FileError, match=r"ghost\.safetensors: cannot be read"):
        bundle.router("ghost")


def test_a_router_of_another_inventory_is_refused(
    folder: Path, small_inventory: Inventory, make_model: MakeModel
) -> None:
    adapted = load_experts(small_inventory, make_model())
    with torch.no_grad():
        adapted.layers[0].experts.get_parameter("gate").fill_(0.5)
    write_bundle(folder.with_name("other"), adapted, {})
    router = Bundle.read(folder).router_path("first")
    stray = folder.with_name("other") / "routers" / "first.safetensors"
    stray.write_bytes(router.read_bytes())
    with pytest.raises(InventoryMismatch, match="made for inventory"):
        Bundle.read(folder.with_name("other")).router("first")


def test_an_unregistered_task_has_the_sha256_of_its_file(small_inventory: Inventory) -> None:
    logits = torch.ones(small_inventory.routing_shape)
    task = TaskVersion.unregistered(small_inventory, "mine", logits)
    assert torch.equal(task.router.logits, logits)
    assert task.info.router_sha256 == task.router.sha256
    assert len(task.router.sha256) == 64
    again = TaskVersion.unregistered(small_inventory, "mine", logits)
    other = TaskVersion.unregistered(small_inventory, "mine", 2 * logits)
    assert again.router.sha256 == task.router.sha256 != other.router.sha256


def test_an_unregistered_task_must_be_finite(small_inventory: Inventory) -> None:
    nan = torch.full(small_inventory.routing_shape, float("nan"))
    with pytest.raises(TensorMismatch, match="not finite"):
        TaskVersion.unregistered(small_inventory, "mine", nan)


def test_a_task_of_a_bundle_is_that_of_its_file(folder: Path) -> None:
    bundle = Bundle.read(folder)
    task = bundle.task("second")
    path = bundle.router_path("second")
    router = read_router(path.read_bytes(), str(path), bundle.inventory)
    assert (task.info.name, task.info.version) == ("second", 1)
    assert task.info.router_sha256 == router.sha256
    assert task.info.provenance == {"rows": 2}
