"""The task registry: what is registered survives, whatever happens in between."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polyrex.adapters.errors import (
    FileError,
    InvalidTaskName,
    InventoryMismatch,
    MalformedFile,
    TaskExists,
    UnknownTask,
)
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.registry import TaskRegistry
from polyrex.adapters.files.router import RouterMetadata, read_router, router_bytes
from polyrex.adapters.files.tensor_file import sha256

MakeRouter = Callable[..., bytes]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tasks"


@pytest.fixture
def shipped(tmp_path: Path, make_small_router: MakeRouter) -> Path:
    """A folder of routers as it stands next to an inventory, with `boolq` and `piqa`."""
    folder = tmp_path / "routers"
    folder.mkdir()
    (folder / "boolq.safetensors").write_bytes(make_small_router(100))
    (folder / "piqa.safetensors").write_bytes(make_small_router(101))
    return folder


@pytest.fixture
def registry(folder: Path, small_inventory: Inventory) -> TaskRegistry:
    return TaskRegistry(folder, small_inventory)


def names(registry: TaskRegistry) -> list[str]:
    return [info.name for info in registry.list()]


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_registered_task_is_described(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    data = make_small_router()
    info, created = registry.register("boolq", data)
    assert created
    assert (info.name, info.version, info.size_bytes) == ("boolq", 1, len(data))
    assert info.router_sha256 == sha256(data)
    assert info.description == "a task"
    assert info.provenance == {"rows": 32}
    assert info.scores == {"accuracy": 0.5}
    assert registry.info("boolq") == info == registry.list()[0]


def test_pinned_version_holds_the_router(
    registry: TaskRegistry, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    data = make_small_router()
    info, _ = registry.register("boolq", data)
    version = registry.pin("boolq")
    assert version.info == info
    expected = read_router(data, "router", small_inventory)
    assert torch.equal(version.router.logits, expected.logits)


def test_tasks_survive_a_restart(
    registry: TaskRegistry, folder: Path, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    registry.register("boolq", make_small_router(0))
    registry.register("piqa", make_small_router(1))
    registry.register("piqa", make_small_router(2), replace=True)
    again = TaskRegistry(folder, small_inventory)
    assert again.list() == registry.list()
    assert again.info("piqa").version == 2
    assert not again.rejected


def test_same_bytes_again_change_nothing(
    registry: TaskRegistry, folder: Path, make_small_router: MakeRouter
) -> None:
    first, _ = registry.register("boolq", make_small_router())
    before = files(folder)
    assert registry.register("boolq", make_small_router()) == (first, False)
    assert registry.register("boolq", make_small_router(), replace=True) == (first, False)
    assert files(folder) == before


def test_other_router_of_a_taken_name_is_refused(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    first, _ = registry.register("boolq", make_small_router(0))
    with pytest.raises(TaskExists, match="task boolq exists with another router"):
        registry.register("boolq", make_small_router(1))
    assert registry.info("boolq") == first


def test_replacing_makes_the_next_version(
    registry: TaskRegistry, folder: Path, make_small_router: MakeRouter
) -> None:
    registry.register("boolq", make_small_router(0))
    info, created = registry.register("boolq", make_small_router(1), replace=True)
    assert not created
    assert info.version == 2
    assert registry.pin("boolq").router.sha256 == sha256(make_small_router(1))
    assert files(folder) == ["boolq@2.safetensors"]


def test_dropped_task_is_unknown_and_stays_so(
    registry: TaskRegistry, folder: Path, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    registry.register("boolq", make_small_router())
    registry.drop("boolq")
    assert len(registry) == len(TaskRegistry(folder, small_inventory)) == 0
    for ask in (registry.pin, registry.info, registry.drop):
        with pytest.raises(UnknownTask, match="no task 'boolq'"):
            ask("boolq")


def test_pinned_version_outlives_the_task(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    registry.register("boolq", make_small_router(0))
    pinned = registry.pin("boolq")
    before = pinned.router.logits.clone()
    registry.register("boolq", make_small_router(1), replace=True)
    registry.drop("boolq")
    assert torch.equal(pinned.router.logits, before)
    assert pinned.info.version == 1


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../boolq", "a/b", "a\\b", "/etc/passwd", "~", "%2e%2e"),
        *("-a", ".a", "_a", "Boolq", "a b", "a@1", "a\n", "a\0", "\0"),
        *("\u00fcnicode", "\u0430", "a" * 65, "a" * 100_000),
    ],
    ids=lambda name: ascii(name)[:12],
)
def test_bad_name_is_refused_before_the_disk_is_touched(
    name: str, registry: TaskRegistry, folder: Path, make_small_router: MakeRouter
) -> None:
    with pytest.raises(InvalidTaskName, match="a task name matches"):
        registry.register(name, make_small_router())
    for ask in (registry.pin, registry.info, registry.drop):
        with pytest.raises(UnknownTask):
            ask(name)
    assert files(folder) == []


@pytest.mark.parametrize("name", ["a", "0", "a.b-c_d", "a..b", "x.safetensors", "a" * 64])
def test_good_name_survives_a_restart(
    name: str,
    registry: TaskRegistry,
    folder: Path,
    small_inventory: Inventory,
    make_small_router: MakeRouter,
) -> None:
    registry.register(name, make_small_router())
    assert names(TaskRegistry(folder, small_inventory)) == [name]


def test_router_that_does_not_fit_is_not_registered(
    registry: TaskRegistry, folder: Path, make_small_router: MakeRouter
) -> None:
    with pytest.raises(MalformedFile, match="router of task boolq: "):
        registry.register("boolq", make_small_router()[:-1])
    assert len(registry) == 0
    assert files(folder) == []


def test_list_is_sorted_and_paged(registry: TaskRegistry, make_small_router: MakeRouter) -> None:
    for name in ("c", "a", "e", "b", "d"):
        registry.register(name, make_small_router())
    assert names(registry) == ["a", "b", "c", "d", "e"]
    assert [info.name for info in registry.list(limit=2)] == ["a", "b"]
    assert [info.name for info in registry.list(after="b", limit=2)] == ["c", "d"]
    assert [info.name for info in registry.list(after="bb", limit=9)] == ["c", "d", "e"]
    assert registry.list(after="e") == []


def test_crash_between_writing_and_renaming_leaves_nothing_behind(
    registry: TaskRegistry,
    folder: Path,
    small_inventory: Inventory,
    make_small_router: MakeRouter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, _ = registry.register("boolq", make_small_router(0))

    # A killed process cleans nothing up: neither the rename nor the deletion happens.
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            registry.register("boolq", make_small_router(1), replace=True)
    assert any(name.endswith(".partial") for name in files(folder))
    again = TaskRegistry(folder, small_inventory)
    assert again.list() == [first]
    assert files(folder) == ["boolq@1.safetensors"]


def test_crash_between_renaming_and_deleting_leaves_the_new_version(
    registry: TaskRegistry,
    folder: Path,
    small_inventory: Inventory,
    make_small_router: MakeRouter,
) -> None:
    registry.register("boolq", make_small_router(0))
    (folder / "boolq@2.safetensors").write_bytes(make_small_router(1))
    again = TaskRegistry(folder, small_inventory)
    assert again.info("boolq").version == 2
    assert files(folder) == ["boolq@2.safetensors"]
    again.drop("boolq")
    assert len(TaskRegistry(folder, small_inventory)) == 0


def test_rejected_files_are_kept_and_reported(
    registry: TaskRegistry, folder: Path, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    registry.register("good", make_small_router(0))
    (folder / "cut@1.safetensors").write_bytes(make_small_router(1)[:-9])
    (folder / "Bad Name.safetensors").write_bytes(make_small_router(1))
    stranger = RouterMetadata("0" * 64, "stranger")
    foreign = router_bytes(torch.zeros(14, 4), small_inventory.spec, stranger)
    (folder / "foreign.safetensors").write_bytes(foreign)
    again = TaskRegistry(folder, small_inventory)
    assert names(again) == ["good"]
    reasons = {Path(path).name: reason for path, reason in again.rejected.items()}
    assert "no complete safetensors file" in reasons["cut@1.safetensors"]
    assert "the name must be that of a task" in reasons["Bad Name.safetensors"]
    assert "made for inventory '0000" in reasons["foreign.safetensors"]
    assert set(reasons) < set(files(folder))


def test_new_version_does_not_overwrite_a_rejected_one(
    folder: Path, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    folder.mkdir()
    (folder / "boolq@3.safetensors").write_bytes(b"damaged")
    info, created = TaskRegistry(folder, small_inventory).register("boolq", make_small_router())
    assert (info.version, created) == (4, True)
    assert (folder / "boolq@3.safetensors").read_bytes() == b"damaged"
    assert TaskRegistry(folder, small_inventory).info("boolq") == info


def test_file_damaged_after_registering_is_reported_not_served(
    registry: TaskRegistry, folder: Path, make_small_router: MakeRouter
) -> None:
    registry.register("boolq", make_small_router(0))
    registry.register("piqa", make_small_router(1))
    (folder / "boolq@1.safetensors").write_bytes(b"damaged")
    with pytest.raises(MalformedFile, match=r"boolq@1\.safetensors: no complete"):
        registry.pin("boolq")
    damaged, good = registry.list()
    assert "no complete safetensors file" in damaged.description
    assert good.description == "a task"


def test_file_exchanged_after_registering_is_not_served(
    registry: TaskRegistry, folder: Path, make_small_router: MakeRouter
) -> None:
    registry.register("boolq", make_small_router(0))
    (folder / "boolq@1.safetensors").write_bytes(make_small_router(1))
    with pytest.raises(FileError, match="has changed since it was registered"):
        registry.pin("boolq")


def test_shipped_tasks_are_served(
    folder: Path, shipped: Path, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    registry = TaskRegistry(folder, small_inventory, shipped)
    assert names(registry) == ["boolq", "piqa"]
    info, created = registry.register("boolq", make_small_router(100))
    assert (info.version, created) == (1, False)
    assert files(folder) == []


def test_shipped_task_is_shadowed_only_by_replacing(
    folder: Path, shipped: Path, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    registry = TaskRegistry(folder, small_inventory, shipped)
    with pytest.raises(TaskExists):
        registry.register("boolq", make_small_router(0))
    info, _ = registry.register("boolq", make_small_router(0), replace=True)
    assert info.version == 2
    assert TaskRegistry(folder, small_inventory, shipped).info("boolq") == info
    assert len(files(shipped)) == 2


@pytest.mark.parametrize("shadowed", [False, True])
def test_dropped_shipped_task_stays_dropped(
    shadowed: bool,
    folder: Path,
    shipped: Path,
    small_inventory: Inventory,
    make_small_router: MakeRouter,
) -> None:
    registry = TaskRegistry(folder, small_inventory, shipped)
    if shadowed:
        registry.register("boolq", make_small_router(0), replace=True)
    registry.drop("boolq")
    assert names(registry) == ["piqa"]
    assert names(TaskRegistry(folder, small_inventory, shipped)) == ["piqa"]
    assert len(files(shipped)) == 2


def test_dropped_shipped_task_may_be_registered_again(
    folder: Path, shipped: Path, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    registry = TaskRegistry(folder, small_inventory, shipped)
    registry.drop("boolq")
    info, created = registry.register("boolq", make_small_router(0))
    assert created
    assert TaskRegistry(folder, small_inventory, shipped).info("boolq") == info
    registry.drop("boolq")
    assert names(TaskRegistry(folder, small_inventory, shipped)) == ["piqa"]


def test_registry_of_another_inventory_rejects_all(
    registry: TaskRegistry, folder: Path, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    registry.register("boolq", make_small_router())
    again = TaskRegistry(folder, replace(small_inventory, sha256="f" * 64))
    assert len(again) == 0
    assert len(again.rejected) == 1
    with pytest.raises(InventoryMismatch):
        again.register("boolq", make_small_router())


def test_one_of_many_concurrent_registrations_wins(
    registry: TaskRegistry, folder: Path, make_small_router: MakeRouter
) -> None:
    routers = [make_small_router(seed) for seed in range(8)]
    barrier = threading.Barrier(len(routers))

    def attempt(data: bytes) -> bool:
        barrier.wait()
        try:
            return registry.register("boolq", data)[1]
        except TaskExists:
            return False

    with ThreadPoolExecutor(len(routers)) as pool:
        assert sum(pool.map(attempt, routers)) == 1
    assert files(folder) == ["boolq@1.safetensors"]
    assert registry.pin("boolq").info.version == 1


def test_task_can_be_pinned_while_it_is_replaced(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    routers = [make_small_router(seed) for seed in range(2)]
    registry.register("boolq", routers[0])
    done = threading.Event()

    def pin() -> set[str]:
        seen = set()
        while not done.is_set():
            seen.add(registry.pin("boolq").router.sha256)
        return seen

    with ThreadPoolExecutor(1) as pool:
        pinning = pool.submit(pin)
        try:
            for change in range(20):
                registry.register("boolq", routers[(change + 1) % 2], replace=True)
        finally:
            done.set()
        assert pinning.result() <= set(map(sha256, routers))
    assert registry.info("boolq").version == 21
