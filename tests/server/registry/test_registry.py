"""The task registry: what is registered survives, and is what is served."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from sqlalchemy import delete, select, update

from polyrex.adapters.errors import (
    InvalidTaskName,
    InventoryMismatch,
    MalformedFile,
    TaskExists,
    UnknownTask,
)
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.router import read_router
from polyrex.adapters.files.tensor_file import sha256
from polyrex.server.errors import InvalidRequest, TaskDamaged
from polyrex.server.registry.edits import TaskEdits
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.registry.schema import audit, routers
from support.registry.makers import MakeRouter, OpenRegistry

Damage = Callable[[TaskRegistry], None]


def names(registry: TaskRegistry) -> list[str]:
    return [task.name for task in registry.page(OPERATOR).tasks]


def actions(registry: TaskRegistry) -> list[str]:
    """What has ever changed in the registry."""
    with registry.database.read() as connection:
        return list(connection.execute(select(audit.c.action).order_by(audit.c.revision)).scalars())


def cut(registry: TaskRegistry) -> None:
    with registry.database.change(OPERATOR) as change:
        change.connection.execute(update(routers).values(data=b"damaged"))
        change.record("damage", "task", 0)


def exchange(registry: TaskRegistry) -> None:
    """Turn a bit of the router's last number, which leaves a file that can be read."""
    with registry.database.change(OPERATOR) as change:
        data = change.connection.execute(select(routers.c.data)).scalars().first()
        assert data is not None
        other = data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]
        change.connection.execute(update(routers).values(data=other))
        change.record("damage", "task", 0)


def lose(registry: TaskRegistry) -> None:
    with registry.database.change(OPERATOR) as change:
        change.connection.execute(delete(routers))
        change.record("damage", "task", 0)


def test_registered_task_is_described(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    data = make_small_router(instruction="Say it.")
    done = registry.register(OPERATOR, "boolq", data)
    assert done.created
    assert (done.task.name, done.task.tenant, done.task.last_version) == ("boolq", "default", 1)
    assert done.version == done.task.current
    assert (done.version.version, done.version.size_bytes) == (1, len(data))
    assert done.version.router_sha256 == sha256(data)
    assert done.version.description == "a task"
    assert done.version.template == "Say it."
    assert done.version.provenance == {"rows": 32, "instruction": "Say it."}
    assert done.version.scores == {"accuracy": 0.5}
    assert registry.find(OPERATOR, "boolq") == done.task == registry.page(OPERATOR).tasks[0]
    assert registry.versions(OPERATOR, "boolq") == [done.version]


def test_pinned_version_holds_the_router(
    registry: TaskRegistry, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    data = make_small_router()
    version = registry.register(OPERATOR, "boolq", data).version
    pinned = registry.pin(OPERATOR, "boolq")
    assert (pinned.info.name, pinned.info.version, pinned.info.tenant) == ("boolq", 1, "default")
    assert pinned.info.router_sha256 == pinned.router.sha256 == version.router_sha256
    assert pinned.info.description == "a task"
    expected = read_router(data, "router", small_inventory)
    assert torch.equal(pinned.router.logits, expected.logits)


def test_tasks_survive_a_restart(
    open_registry: OpenRegistry, make_small_router: MakeRouter
) -> None:
    registry = open_registry()
    registry.register(OPERATOR, "boolq", make_small_router(0))
    registry.register(OPERATOR, "piqa", make_small_router(1))
    registry.register(OPERATOR, "piqa", make_small_router(2), replace=True)
    before = registry.page(OPERATOR)
    registry.close()
    again = open_registry()
    assert again.page(OPERATOR) == before
    assert again.pin(OPERATOR, "piqa").info.version == 2
    assert (len(again), again.revision) == (2, 3)


def test_same_bytes_again_change_nothing(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    first = registry.register(OPERATOR, "boolq", make_small_router())
    again = registry.register(OPERATOR, "boolq", make_small_router())
    replaced = registry.register(OPERATOR, "boolq", make_small_router(), replace=True)
    assert again == replaced == replace(first, created=False)
    assert actions(registry) == ["register"]


def test_other_router_of_a_taken_name_is_refused(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    first = registry.register(OPERATOR, "boolq", make_small_router(0))
    with pytest.raises(TaskExists, match="task boolq exists with another router"):
        registry.register(OPERATOR, "boolq", make_small_router(1))
    assert registry.find(OPERATOR, "boolq") == first.task


def test_replacing_makes_the_next_version_and_keeps_the_one_before(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    registry.register(OPERATOR, "boolq", make_small_router(0))
    done = registry.register(OPERATOR, "boolq", make_small_router(1), replace=True)
    assert not done.created
    assert (done.version.version, done.task.last_version) == (2, 2)
    assert registry.pin(OPERATOR, "boolq").router.sha256 == sha256(make_small_router(1))
    assert registry.pin(OPERATOR, "boolq@2").router.sha256 == sha256(make_small_router(1))
    assert registry.pin(OPERATOR, "boolq@1").router.sha256 == sha256(make_small_router(0))
    assert registry.version(OPERATOR, "boolq@1").version == 1


def test_dropped_task_is_unknown_and_stays_so(
    open_registry: OpenRegistry, make_small_router: MakeRouter
) -> None:
    registry = open_registry()
    registry.register(OPERATOR, "boolq", make_small_router())
    registry.pin(OPERATOR, "boolq")
    TaskEdits(registry).drop(OPERATOR, "boolq")
    assert len(registry) == 0
    with pytest.raises(UnknownTask):
        registry.pin(OPERATOR, "boolq")
    with pytest.raises(UnknownTask):
        registry.find(OPERATOR, "boolq")
    assert registry.find(OPERATOR, "boolq", deleted=True).deleted is not None
    assert [task.name for task in registry.page(OPERATOR, deleted=True).tasks] == ["boolq"]
    registry.close()
    again = open_registry()
    assert (len(again), names(again)) == (0, [])


def test_pinned_version_outlives_the_task(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    registry.register(OPERATOR, "boolq", make_small_router(0))
    pinned = registry.pin(OPERATOR, "boolq")
    before = pinned.router.logits.clone()
    registry.register(OPERATOR, "boolq", make_small_router(1), replace=True)
    TaskEdits(registry).drop(OPERATOR, "boolq")
    assert torch.equal(pinned.router.logits, before)
    assert pinned.info.version == 1


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../boolq", "a/b", "a\\b", "/etc/passwd", "~", "%2e%2e"),
        *("-a", ".a", "_a", "Boolq", "a b", "a@1", "a\n", "a\0", "\0"),
        *("\u00fcnicode", "\u0430", "\ud800", "a" * 65, "a" * 100_000),
    ],
    ids=lambda name: ascii(name)[:12],
)
def test_bad_name_is_refused_before_the_database_is_touched(
    name: str, registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    with pytest.raises(InvalidTaskName, match="a task name matches"):
        registry.register(OPERATOR, name, make_small_router())
    with pytest.raises(UnknownTask):
        registry.pin(OPERATOR, name)
    with pytest.raises(UnknownTask):
        registry.find(OPERATOR, name)
    assert registry.revision == 0


@pytest.mark.parametrize("name", ["a", "0", "a.b-c_d", "a..b", "x.safetensors", "a" * 64])
def test_good_name_survives_a_restart(
    name: str, open_registry: OpenRegistry, make_small_router: MakeRouter
) -> None:
    registry = open_registry()
    registry.register(OPERATOR, name, make_small_router())
    registry.close()
    assert names(open_registry()) == [name]


def test_router_that_does_not_fit_is_not_registered(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    with pytest.raises(MalformedFile, match="router of task boolq: "):
        registry.register(OPERATOR, "boolq", make_small_router()[:-1])
    assert (len(registry), registry.revision) == (0, 0)


def test_text_that_a_database_cannot_hold_is_malformed(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    with pytest.raises(MalformedFile, match="description holds a NUL"):
        registry.register(OPERATOR, "boolq", make_small_router(description="a\0b"))
    with pytest.raises(MalformedFile, match="instruction holds a NUL"):
        registry.register(OPERATOR, "boolq", make_small_router(instruction="\0"))
    with pytest.raises(MalformedFile, match="surrogates not allowed"):
        registry.register(OPERATOR, "boolq", make_small_router(instruction="\ud800"))
    stored = registry.register(OPERATOR, "boolq", make_small_router(anything="a\0b"))
    assert registry.versions(OPERATOR, "boolq") == [stored.version]


def test_pages_are_sorted_and_follow_each_other(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    for name in ("c", "a", "e", "b", "d"):
        registry.register(OPERATOR, name, make_small_router())
    assert names(registry) == ["a", "b", "c", "d", "e"]
    for name in ("a-z", "ab", "a.b", "a_b"):  # English would not see the signs
        registry.register(OPERATOR, name, make_small_router())
    by_bytes = ["a", "a-z", "a.b", "a_b", "ab", "b", "c", "d", "e"]
    assert names(registry) == by_bytes
    assert [name for name, _ in registry.models(OPERATOR, None, 10)] == by_bytes
    for name in ("a-z", "ab", "a.b", "a_b"):
        TaskEdits(registry).drop(OPERATOR, name)
    first = registry.page(OPERATOR, limit=2)
    assert ([task.name for task in first.tasks], first.has_more) == (["a", "b"], True)
    then = registry.page(OPERATOR, after="bb", limit=3)
    assert ([task.name for task in then.tasks], then.has_more) == (["c", "d", "e"], False)
    assert registry.page(OPERATOR, after="e").tasks == ()


def test_tasks_are_found_by_text_and_by_labels(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    registry.register(OPERATOR, "sums", make_small_router(1, description="Adds up, 100 % right"))
    labels = {"team": "x", "stage/of": 'a "b"'}
    registry.register(OPERATOR, "words", make_small_router(2), labels=labels)

    def found(**wanted: object) -> list[str]:
        return [task.name for task in registry.page(OPERATOR, **wanted).tasks]  # type: ignore[arg-type]

    assert found(text="ADDS") == ["sums"]
    assert found(text="ord") == ["words"]
    assert found(text="0 % r") == ["sums"]
    assert found(text="0_%") == []
    assert found(labels={"team": "x"}) == found(labels=labels) == ["words"]
    assert found(labels={"team": "y"}) == found(labels={"nothing": "x"}) == []
    assert found(text="adds", labels={"team": "x"}) == []


def test_text_is_found_whatever_the_case_of_its_letters(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    registry.register(OPERATOR, "summer", make_small_router(description="L'ÉTÉ À ÖREBRO"))
    found = [registry.page(OPERATOR, text=text).tasks for text in ("été à ö", "ÉTÉ", "ete")]
    assert [len(tasks) for tasks in found] == [1, 1, 0]


@pytest.mark.parametrize("field", ["text", "after"])
def test_text_that_no_database_holds_is_not_looked_for(registry: TaskRegistry, field: str) -> None:
    with pytest.raises(InvalidRequest, match="NUL") as caught:
        registry.page(OPERATOR, **{field: "a\0b"})  # type: ignore[arg-type]
    assert caught.value.param == {"text": "q", "after": "after"}[field]


@pytest.mark.parametrize("damage", [cut, exchange, lose])
def test_damaged_router_is_never_served_and_registering_it_repairs_it(
    damage: Damage,
    open_registry: OpenRegistry,
    make_small_router: MakeRouter,
) -> None:
    registry = open_registry()
    data = make_small_router(0)
    first = registry.register(OPERATOR, "boolq", data)
    damage(registry)
    with pytest.raises(TaskDamaged, match="registering it again repairs it"):
        registry.pin(OPERATOR, "boolq")
    assert registry.find(OPERATOR, "boolq") == first.task  # what is known of it can still be read
    assert registry.register(OPERATOR, "boolq", data) == replace(first, created=False)
    assert registry.pin(OPERATOR, "boolq").router.sha256 == first.version.router_sha256


def test_version_of_another_inventory_is_listed_and_not_served(
    open_registry: OpenRegistry, small_inventory: Inventory, make_small_router: MakeRouter
) -> None:
    registry = open_registry()
    first = registry.register(OPERATOR, "boolq", make_small_router())
    registry.close()
    other = open_registry(replace(small_inventory, sha256="f" * 64))
    assert other.find(OPERATOR, "boolq") == first.task
    assert other.models(OPERATOR, None, 10) == []
    with pytest.raises(InventoryMismatch, match=f"{small_inventory.sha256}, .* has ffff"):
        other.pin(OPERATOR, "boolq")
    with pytest.raises(InventoryMismatch):
        other.register(OPERATOR, "piqa", make_small_router())


def test_one_of_many_concurrent_registrations_wins(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    files = [make_small_router(seed) for seed in range(8)]
    barrier = threading.Barrier(len(files))

    def attempt(data: bytes) -> bool:
        barrier.wait()
        try:
            return registry.register(OPERATOR, "boolq", data).created
        except TaskExists:
            return False

    with ThreadPoolExecutor(len(files)) as pool:
        assert sum(pool.map(attempt, files)) == 1
    assert registry.pin(OPERATOR, "boolq").info.version == 1
    assert actions(registry) == ["register"]


def test_task_can_be_pinned_while_it_is_replaced(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    files = [make_small_router(seed) for seed in range(2)]
    registry.register(OPERATOR, "boolq", files[0])
    done = threading.Event()

    def pin() -> list[int]:
        seen = []
        while not done.is_set():
            pinned = registry.pin(OPERATOR, "boolq")
            seen.append(pinned.info.version)
            assert pinned.router.sha256 == sha256(files[1 - pinned.info.version % 2])
        return seen

    with ThreadPoolExecutor(1) as pool:
        pinning = pool.submit(pin)
        try:
            for change in range(20):
                data = files[(change + 1) % 2]
                registry.register(OPERATOR, "boolq", data, replace=True)
                assert registry.pin(OPERATOR, "boolq").info.version == change + 2
        finally:
            done.set()
        seen = pinning.result()
    assert seen == sorted(seen)
