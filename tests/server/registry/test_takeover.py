"""Files become tasks: a state folder of before there was a database, and shipped routers."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import event, update

from polyrex.adapters.errors import TaskExists, UnknownTask
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.router import RouterMetadata, router_bytes
from polyrex.adapters.files.tensor_file import sha256
from polyrex.server.registry.database import Database
from polyrex.server.registry.edits import TaskEdits
from polyrex.server.registry.files.shipped import register_shipped
from polyrex.server.registry.files.takeover import TAKEN_OVER, take_over
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.registry.schema import tenants
from support.registry.makers import AddTenant, MakeRouter

Start = Callable[..., TaskRegistry]
"""`start(folder, shipped)`: a server's registry after its start; the one before it ends."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tasks"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def shipped(tmp_path: Path, make_small_router: MakeRouter) -> Path:
    """A folder of routers as it stands next to an inventory, with `boolq` and `piqa`."""
    made = tmp_path / "routers"
    made.mkdir()
    (made / "boolq.safetensors").write_bytes(make_small_router(100))
    (made / "piqa.safetensors").write_bytes(make_small_router(101))
    return made


@pytest.fixture
def start(database_url: str, small_inventory: Inventory, tmp_path: Path) -> Any:
    running: list[TaskRegistry] = []

    def begin(
        folder: Path = tmp_path / "none",
        shipped: Path = tmp_path / "none",
        inventory: Inventory = small_inventory,
    ) -> TaskRegistry:
        for registry in running:
            registry.close()
        with ExitStack() as broken_off:
            database = broken_off.enter_context(closing(Database(database_url)))
            rejected = take_over(database, inventory, folder)
            rejected |= register_shipped(database, inventory, shipped)
            running.append(TaskRegistry(database, inventory, rejected=rejected))
            broken_off.pop_all()
        return running[-1]

    yield begin
    for registry in running:
        registry.close()


def names(registry: TaskRegistry) -> list[str]:
    return [task.name for task in registry.page(OPERATOR).tasks]


def versions(registry: TaskRegistry, name: str) -> list[int]:
    return [version.version for version in registry.versions(OPERATOR, name)]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.suffix != ".db")


def test_state_folder_is_taken_over_with_its_versions(
    start: Start, folder: Path, make_small_router: MakeRouter
) -> None:
    (folder / "boolq@5.safetensors").write_bytes(make_small_router(5))
    (folder / "piqa@1.safetensors").write_bytes(make_small_router(1))
    (folder / "piqa@2.safetensors").write_bytes(make_small_router(2))
    (folder / "plain.safetensors").write_bytes(make_small_router(3))
    (folder / ".piqa.a1b2.partial").write_bytes(b"half")
    os.utime(folder / "boolq@5.safetensors", (1e9, 1e9))
    registry = start(folder)
    assert not registry.rejected
    assert names(registry) == ["boolq", "piqa", "plain"]
    boolq = registry.find(OPERATOR, "boolq")
    assert (boolq.current.version, boolq.last_version, boolq.created) == (5, 5, 1e9)
    assert boolq.current.description == "a task"
    assert versions(registry, "boolq") == [5]
    assert versions(registry, "piqa") == [1, 2]
    assert registry.pin(OPERATOR, "piqa").router.sha256 == sha256(make_small_router(2))
    assert registry.pin(OPERATOR, "piqa@1").router.sha256 == sha256(make_small_router(1))
    done = registry.register(OPERATOR, "boolq", make_small_router(6), replace=True)
    assert done.version.version == 6
    assert files(folder) == [TAKEN_OVER]
    assert files(folder / TAKEN_OVER) == [
        *("boolq@5.safetensors", "piqa@1.safetensors", "piqa@2.safetensors", "plain.safetensors"),
    ]


def test_next_start_has_nothing_to_take_over(
    start: Start, folder: Path, make_small_router: MakeRouter
) -> None:
    (folder / "boolq@5.safetensors").write_bytes(make_small_router(5))
    before = start(folder)
    revision, task = before.revision, before.find(OPERATOR, "boolq")
    again = start(folder)
    assert (again.revision, again.find(OPERATOR, "boolq")) == (revision, task)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_crash_before_the_files_are_moved_repeats_cleanly(
    moved: int,
    start: Start,
    folder: Path,
    make_small_router: MakeRouter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("a@1", "b@2", "c@3"):
        (folder / f"{name}.safetensors").write_bytes(make_small_router(1))
    (folder / "d.dropped").touch()
    left = iter(range(moved))
    rename = os.replace

    def killed(*paths: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        rename(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            start(folder)
    registry = start(folder)
    assert names(registry) == ["a", "b", "c"]
    assert registry.revision == 4
    assert files(folder) == [TAKEN_OVER]


def test_crash_before_the_commit_loses_nothing(
    database_url: str,
    start: Start,
    folder: Path,
    small_inventory: Inventory,
    make_small_router: MakeRouter,
) -> None:
    (folder / "a@1.safetensors").write_bytes(make_small_router(1))

    def killed(connection: Any) -> None:
        connection.connection.driver_connection.rollback()
        raise KeyboardInterrupt

    with closing(Database(database_url)) as database:
        event.listen(database.engine, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            take_over(database, small_inventory, folder)
    assert files(folder) == ["a@1.safetensors"]
    registry = start(folder)
    assert registry.pin(OPERATOR, "a").info.version == 1


def test_files_that_cannot_be_moved_are_no_tasks_again_once_dropped(
    start: Start, folder: Path, make_small_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(os, "replace", read_only)
    (folder / "a@3.safetensors").write_bytes(make_small_router(3))
    registry = start(folder)
    assert registry.pin(OPERATOR, "a").info.version == 3
    TaskEdits(registry).drop(OPERATOR, "a")
    assert names(start(folder)) == []
    registry = start(folder)
    TaskEdits(registry).purge(dropped_before=1e12)
    registry = start(folder)
    assert names(registry) == []
    assert "is taken from elsewhere" in registry.rejected[str(folder / "a@3.safetensors")]
    assert registry.register(OPERATOR, "a", make_small_router(3)).version.version == 4


def test_rejected_files_stay_and_are_reported(
    start: Start, folder: Path, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    (folder / "good@1.safetensors").write_bytes(make_small_router(0))
    (folder / "cut@1.safetensors").write_bytes(make_small_router(1)[:-9])
    (folder / "Bad Name.safetensors").write_bytes(make_small_router(1))
    stranger = RouterMetadata("0" * 64, "stranger")
    logits = torch.zeros(small_inventory.routing_shape)
    foreign = router_bytes(logits, small_inventory.spec, stranger)
    (folder / "foreign.safetensors").write_bytes(foreign)
    for _ in range(2):
        registry = start(folder)
        assert names(registry) == ["good"]
        reasons = {Path(path).name: reason for path, reason in registry.rejected.items()}
        assert "no complete safetensors file" in reasons["cut@1.safetensors"]
        assert "the name must be that of a task" in reasons["Bad Name.safetensors"]
        assert "made for inventory '0000" in reasons["foreign.safetensors"]
        assert set(reasons) < set(files(folder))


def test_new_version_does_not_have_the_number_of_a_rejected_one(
    start: Start, folder: Path, make_small_router: MakeRouter
) -> None:
    (folder / "boolq@3.safetensors").write_bytes(b"damaged")
    registry = start(folder)
    assert (len(registry), names(registry)) == (0, [])
    with pytest.raises(UnknownTask):
        registry.find(OPERATOR, "boolq", deleted=True)
    done = registry.register(OPERATOR, "boolq", make_small_router())
    assert (done.version.version, done.created) == (4, True)
    assert (folder / "boolq@3.safetensors").read_bytes() == b"damaged"
    assert start(folder).find(OPERATOR, "boolq") == done.task


def test_file_of_another_inventory_waits_for_its_own(
    start: Start, folder: Path, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    (folder / "boolq@2.safetensors").write_bytes(make_small_router(0))
    other = start(folder, inventory=replace(small_inventory, sha256="f" * 64))
    assert (names(other), len(other.rejected)) == ([], 1)
    own = start(folder)
    assert (own.pin(OPERATOR, "boolq").info.version, dict(own.rejected)) == (2, {})


def test_file_of_an_older_version_is_no_step_back(
    start: Start, folder: Path, make_small_router: MakeRouter
) -> None:
    (folder / "boolq@2.safetensors").write_bytes(b"damaged")
    registry = start(folder)
    registry.register(OPERATOR, "boolq", make_small_router(3))
    (folder / "boolq@2.safetensors").write_bytes(make_small_router(2))  # from a copy
    registry = start(folder)
    assert versions(registry, "boolq") == [2, 3]
    assert registry.pin(OPERATOR, "boolq").info.version == 3


def test_file_of_a_number_that_is_taken_stays(
    start: Start, folder: Path, make_small_router: MakeRouter
) -> None:
    registry = start(folder)
    registry.register(OPERATOR, "boolq", make_small_router(0))
    (folder / "boolq@1.safetensors").write_bytes(make_small_router(1))
    registry = start(folder)
    assert "is taken from elsewhere" in registry.rejected[str(folder / "boolq@1.safetensors")]
    assert registry.pin(OPERATOR, "boolq").router.sha256 == sha256(make_small_router(0))


def test_shipped_routers_are_tasks(
    start: Start, shipped: Path, make_small_router: MakeRouter
) -> None:
    registry = start(shipped=shipped)
    assert names(registry) == ["boolq", "piqa"]
    assert not registry.register(OPERATOR, "boolq", make_small_router(100)).created
    again = start(shipped=shipped)
    assert (again.revision, versions(again, "boolq")) == (2, [1])
    assert len(files(shipped)) == 2


def test_shipped_task_that_was_replaced_is_left_alone(
    start: Start, shipped: Path, make_small_router: MakeRouter
) -> None:
    registry = start(shipped=shipped)
    with pytest.raises(TaskExists):
        registry.register(OPERATOR, "boolq", make_small_router(0))
    done = registry.register(OPERATOR, "boolq", make_small_router(0), replace=True)
    assert done.version.version == 2
    assert start(shipped=shipped).find(OPERATOR, "boolq") == done.task
    (shipped / "boolq.safetensors").write_bytes(make_small_router(200))  # a new release
    assert start(shipped=shipped).find(OPERATOR, "boolq") == done.task


def test_shipped_task_that_was_dropped_stays_dropped(
    start: Start, shipped: Path, make_small_router: MakeRouter
) -> None:
    TaskEdits(start(shipped=shipped)).drop(OPERATOR, "boolq")
    assert names(start(shipped=shipped)) == ["piqa"]
    (shipped / "boolq.safetensors").write_bytes(make_small_router(200))  # a new release
    registry = start(shipped=shipped)
    assert names(registry) == ["piqa"]
    assert registry.register(OPERATOR, "boolq", make_small_router(0)).created
    TaskEdits(registry).drop(OPERATOR, "boolq")
    TaskEdits(registry).purge(dropped_before=1e12)
    assert names(start(shipped=shipped)) == ["piqa"]


def test_shipped_task_that_was_dropped_before_the_takeover_stays_dropped(
    start: Start, folder: Path, shipped: Path, make_small_router: MakeRouter
) -> None:
    (folder / "boolq.dropped").touch()
    (folder / "piqa.dropped").touch()
    (folder / "piqa@1.safetensors").write_bytes(make_small_router(1))  # dropped, then made anew
    registry = start(folder, shipped)
    assert names(registry) == ["piqa"]
    assert registry.pin(OPERATOR, "piqa").router.sha256 == sha256(make_small_router(1))
    assert files(folder) == [TAKEN_OVER]
    again = start(folder, shipped)
    assert names(again) == ["piqa"]
    assert again.register(OPERATOR, "boolq", make_small_router(0)).version.version == 2


def test_damaged_file_does_not_hide_a_shipped_task(
    start: Start, folder: Path, shipped: Path
) -> None:
    (folder / "boolq@2.safetensors").write_bytes(b"damaged")
    registry = start(folder, shipped)
    assert registry.pin(OPERATOR, "boolq").info.version == 3


def test_new_release_of_a_shipped_router_is_the_next_version(
    start: Start, shipped: Path, make_small_router: MakeRouter
) -> None:
    start(shipped=shipped)
    (shipped / "boolq.safetensors").write_bytes(make_small_router(200))
    registry = start(shipped=shipped)
    assert registry.pin(OPERATOR, "boolq").info.version == 2
    assert registry.pin(OPERATOR, "piqa").info.version == 1
    TaskEdits(registry).select(OPERATOR, "boolq", 1)
    assert start(shipped=shipped).pin(OPERATOR, "boolq").info.version == 1  # stays rolled back


def test_inventories_take_turns_on_one_database(
    start: Start, shipped: Path, tmp_path: Path, small_inventory: Inventory
) -> None:
    """Each server answers with the router that came with its inventory, and adds it only once."""
    other = replace(small_inventory, sha256="f" * 64)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    about = RouterMetadata(other.sha256, "boolq")
    data = router_bytes(torch.zeros(other.routing_shape), other.spec, about)
    (theirs / "boolq.safetensors").write_bytes(data)
    pinned = []
    for _ in range(2):
        pinned.append(start(shipped=shipped).pin(OPERATOR, "boolq").info.version)
        pinned.append(start(shipped=theirs, inventory=other).pin(OPERATOR, "boolq").info.version)
    assert pinned == [1, 2, 1, 2]


def test_shipped_router_that_cannot_be_used_is_reported(
    start: Start, shipped: Path, make_small_router: MakeRouter
) -> None:
    (shipped / "cut.safetensors").write_bytes(make_small_router()[:-9])
    (shipped / "Bad Name.safetensors").write_bytes(make_small_router())
    registry = start(shipped=shipped)
    assert names(registry) == ["boolq", "piqa"]
    assert {Path(path).name for path in registry.rejected} == {
        *("cut.safetensors", "Bad Name.safetensors"),
    }


def test_shipped_routers_do_not_count_against_a_quota(
    start: Start, shipped: Path, add_tenant: AddTenant
) -> None:
    registry = start()
    with registry.database.change(OPERATOR) as change:
        change.connection.execute(update(tenants).values(quotas={"tasks": 0, "bytes": 0}))
        change.record("change", "tenant", 1)
    assert names(start(shipped=shipped)) == ["boolq", "piqa"]


def test_servers_that_start_at_once_both_succeed(
    postgres_url: str,
    folder: Path,
    shipped: Path,
    small_inventory: Inventory,
    make_small_router: MakeRouter,
) -> None:
    for number in range(20):
        (folder / f"task-{number}@2.safetensors").write_bytes(make_small_router(number))

    def begin(_: int) -> tuple[list[str], int]:
        with closing(Database(postgres_url)) as database:
            rejected = take_over(database, small_inventory, folder)
            rejected |= register_shipped(database, small_inventory, shipped)
            registry = TaskRegistry(database, small_inventory, rejected=rejected)
            return [name for name, _ in registry.models(OPERATOR, None, 99)], len(rejected)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(begin, range(3)))
    assert all(rejected == 0 for _, rejected in found)
    assert len(found[0][0]) == 22
    with closing(TaskRegistry(Database(postgres_url), small_inventory)) as registry:
        assert registry.revision == 22
        assert len(registry) == 22
