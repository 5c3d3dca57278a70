"""Changes to registered tasks: dropped, undeleted, rolled back, named, shared, purged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from sqlalchemy import func, insert, select, update

from polyrex.adapters.errors import InventoryMismatch, UnknownTask
from polyrex.adapters.files.inventory import Inventory
from polyrex.server.errors import (
    InvalidRequest,
    PreconditionFailed,
    QuotaExceeded,
    UnknownTenant,
)
from polyrex.server.registry.database import Database
from polyrex.server.registry.edits import MOST_ALIASES, TaskEdits
from polyrex.server.registry.principal import OPERATOR, Principal, Role
from polyrex.server.registry.records import Canary, TaskRecord
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.registry.schema import audit, routers, tenants, versions
from support.random_inventory import MakeRouter

OWNER = Principal("acme", Role.task_admin)
OTHER = Principal("other", Role.task_admin)

Change = Callable[[TaskEdits, str], TaskRecord]
CHANGES: dict[str, Change] = {
    "drop": lambda edits, name: edits.drop(OTHER, name),
    "undelete": lambda edits, name: edits.undelete(OTHER, name),
    "select": lambda edits, name: edits.select(OTHER, name, 1),
    "set_alias": lambda edits, name: edits.set_alias(OTHER, name, "prod", 1),
    "remove_alias": lambda edits, name: edits.remove_alias(OTHER, name, "prod"),
    "set_canary": lambda edits, name: edits.set_canary(OTHER, name, 1, 0.5),
    "remove_canary": lambda edits, name: edits.remove_canary(OTHER, name),
    "share": lambda edits, name: edits.share(OTHER, name, "other"),
    "unshare": lambda edits, name: edits.unshare(OTHER, name, "other"),
    "set_labels": lambda edits, name: edits.set_labels(OTHER, name, {}),
}


@pytest.fixture
def registry(database_url: str, random_inventory: Inventory) -> Iterator[TaskRegistry]:
    with closing(TaskRegistry(Database(database_url), random_inventory)) as opened:
        with opened.database.change(OPERATOR) as change:
            for number, name in enumerate(("acme", "other"), 2):
                row = {"id": number, "name": name, "created": 0.0, "quotas": {}}
                change.connection.execute(insert(tenants), row)
            change.record("create", "tenant", 2)
        opened.catch_up()
        yield opened


@pytest.fixture
def edits(registry: TaskRegistry) -> TaskEdits:
    return TaskEdits(registry)


@pytest.fixture
def task(registry: TaskRegistry, make_router: MakeRouter) -> TaskRecord:
    """A task of the tenant acme, with three versions."""
    for seed in (1, 2, 3):
        done = registry.register(OWNER, "one", make_router(seed), replace=True)
    return done.task


def served(registry: TaskRegistry, name: str, asker: Principal = OWNER) -> int:
    """The version that answers a request now."""
    return registry.pin(asker, name).info.version


def actions(registry: TaskRegistry) -> list[tuple[int, str]]:
    with registry.database.read() as connection:
        rows = connection.execute(
            select(audit.c.revision, audit.c.action).order_by(audit.c.revision)
        )
        return [(row.revision, row.action) for row in rows]


def test_a_dropped_task_is_not_served_and_comes_back_whole(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord
) -> None:
    edits.set_alias(OWNER, "one", "prod", 2)
    edits.set_labels(OWNER, "one", {"team": "search"})
    edits.set_canary(OWNER, "one", 1, 0.25)
    before = edits.share(OWNER, "one", "other")
    assert edits.drop(OWNER, "one").deleted is not None
    with pytest.raises(UnknownTask):
        registry.pin(OWNER, "one")
    with pytest.raises(UnknownTask):
        edits.drop(OWNER, "one")
    after = edits.undelete(OWNER, "one")
    assert served(registry, "one@prod") == 2
    assert served(registry, "acme:one@3", OTHER) == 3
    assert (after.labels, after.canary) == ({"team": "search"}, Canary(1, 0.25))
    assert (after.aliases, after.shared_with) == (before.aliases, before.shared_with)


def test_undelete_of_a_task_that_is_there_changes_nothing(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord
) -> None:
    revision = registry.revision
    assert edits.undelete(OWNER, "one") == task
    assert registry.revision == revision


def test_undelete_asks_for_room_in_the_quota(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord, make_router: MakeRouter
) -> None:
    edits.drop(OWNER, "one")
    with registry.database.change(OPERATOR) as change:
        change.connection.execute(
            update(tenants).where(tenants.c.name == "acme").values(quotas={"tasks": 1})
        )
        change.record("set", "tenant", 2)
    registry.register(OWNER, "two", make_router(4))
    with pytest.raises(QuotaExceeded):
        edits.undelete(OWNER, "one")
    edits.drop(OWNER, "two")
    assert edits.undelete(OWNER, "one").deleted is None


def test_roll_back_goes_to_the_version_before_and_promote_to_any(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord
) -> None:
    assert edits.select(OWNER, "one", None).current.version == 2
    assert served(registry, "one") == 2
    assert edits.select(OWNER, "one", None).current.version == 1
    with pytest.raises(InvalidRequest, match="no version before"):
        edits.select(OWNER, "one", None)
    assert edits.select(OWNER, "one", 3).current.version == 3
    assert served(registry, "one") == 3
    assert served(registry, "one@1") == 1
    assert edits.select(OWNER, "one", 3).last_version == 3


def test_a_version_after_a_roll_back_has_a_number_of_its_own(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord, make_router: MakeRouter
) -> None:
    edits.select(OWNER, "one", 1)
    registry.register(OWNER, "one", make_router(4), replace=True)
    assert served(registry, "one") == 4
    assert edits.select(OWNER, "one", None).current.version == 3


def test_an_alias_follows_what_it_is_set_to(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord
) -> None:
    assert edits.set_alias(OWNER, "one", "prod", 1).aliases == {"prod": 1}
    assert served(registry, "one@prod") == 1
    assert edits.set_alias(OWNER, "one", "prod", 2).aliases == {"prod": 2}
    assert served(registry, "one@prod") == 2
    assert edits.remove_alias(OWNER, "one", "prod").aliases == {}
    with pytest.raises(UnknownTask):
        registry.pin(OWNER, "one@prod")
    with pytest.raises(UnknownTask):
        edits.remove_alias(OWNER, "one", "prod")


@pytest.mark.parametrize("alias", ["3", "3a", "", "A", "a b", "a@b", "x" * 65])
def test_an_alias_is_no_number_and_no_other_text(
    edits: TaskEdits, task: TaskRecord, alias: str
) -> None:
    with pytest.raises(InvalidRequest, match="an alias matches"):
        edits.set_alias(OWNER, "one", alias, 1)


def test_a_task_has_a_limited_number_of_aliases(edits: TaskEdits, task: TaskRecord) -> None:
    for number in range(MOST_ALIASES):
        edits.set_alias(OWNER, "one", f"a{number}", 1)
    with pytest.raises(InvalidRequest, match="at most"):
        edits.set_alias(OWNER, "one", "more", 1)
    assert edits.set_alias(OWNER, "one", "a0", 2).aliases["a0"] == 2


def test_a_canary_answers_its_share(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord
) -> None:
    assert edits.set_canary(OWNER, "one", 1, 0.5).canary == Canary(1, 0.5)
    users = [str(number) for number in range(200)]
    found = [registry.pin(OWNER, "one", sticky=user).info.version for user in users]
    assert set(found) == {1, 3}
    assert 50 < found.count(1) < 150
    assert [registry.pin(OWNER, "one", sticky=user).info.version for user in users] == found
    assert edits.remove_canary(OWNER, "one").canary is None
    assert {registry.pin(OWNER, "one", sticky=user).info.version for user in users} == {3}
    with pytest.raises(UnknownTask):
        edits.remove_canary(OWNER, "one")


def test_promoting_a_canary_ends_it(edits: TaskEdits, task: TaskRecord) -> None:
    edits.set_canary(OWNER, "one", 1, 0.5)
    assert edits.select(OWNER, "one", 2).canary == Canary(1, 0.5)
    assert edits.select(OWNER, "one", 1).canary is None
    with pytest.raises(InvalidRequest, match="is the current one"):
        edits.set_canary(OWNER, "one", 1, 0.5)


def test_a_version_for_another_inventory_cannot_be_made_to_answer(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord
) -> None:
    with registry.database.change(OPERATOR) as change:
        change.connection.execute(
            update(versions).where(versions.c.version == 2).values(inventory_sha256="0" * 64)
        )
        change.record("test", "task", task.id)
    with pytest.raises(InventoryMismatch):
        edits.select(OWNER, "one", 2)
    with pytest.raises(InventoryMismatch):
        edits.set_canary(OWNER, "one", 2, 0.5)


def test_a_shared_task_is_used_and_not_changed(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord
) -> None:
    with pytest.raises(UnknownTask):
        registry.pin(OTHER, "acme:one")
    assert edits.share(OWNER, "one", "other").shared_with == ("other",)
    assert served(registry, "acme:one", OTHER) == 3
    with pytest.raises(UnknownTask):
        registry.pin(OTHER, "one")
    with pytest.raises(UnknownTask):
        edits.drop(OTHER, "acme:one")
    assert edits.unshare(OWNER, "one", "other").shared_with == ()
    with pytest.raises(UnknownTask):
        registry.pin(OTHER, "acme:one")
    with pytest.raises(UnknownTask):
        edits.unshare(OWNER, "one", "other")


def test_sharing_with_nobody_tells_a_server_admin_alone(edits: TaskEdits, task: TaskRecord) -> None:
    assert edits.share(OWNER, "one", "nobody").shared_with == ("nobody",)
    with pytest.raises(UnknownTenant):
        edits.share(OPERATOR, "acme:one", "nobody")
    with pytest.raises(InvalidRequest, match="own"):
        edits.share(OWNER, "one", "acme")
    with pytest.raises(InvalidRequest, match="a tenant's name matches"):
        edits.share(OWNER, "one", "No:Body")


def test_a_task_is_shared_with_a_limited_number_of_tenants(
    edits: TaskEdits, task: TaskRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyrex.server.registry.edits.MOST_SHARES", 2)
    edits.share(OWNER, "one", "first")
    edits.share(OWNER, "one", "second")
    with pytest.raises(InvalidRequest, match="at most 2 shares"):
        edits.share(OWNER, "one", "third")
    assert edits.share(OWNER, "one", "first").shared_with == ("first", "second")


NO_NAMES = (
    *("", "é", "Own", "-own", "o wn", "own\n", " own", "own\0", "../own", "x" * 65, "%", "o%"),
    *("other:", ":own", "other:other:own", "Other:own", "other:own:own", "%:own", "other: own"),
    *("own@", "@1", "own@0", "own@01", "own@-1", "own@1@1", "own@Prod", "other:@1", "own@1\n"),
)  # of tasks, where a tenant has one that is called own


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_change_to_anothers_task_tells_that_it_is_there(
    registry: TaskRegistry, task: TaskRecord, make_router: MakeRouter, change: Change
) -> None:
    revision = registry.register(OTHER, "own", make_router(4)).task.changed
    for name in ("one", "acme:one", "acme:two", "one@1", "acme:one@1", *NO_NAMES):
        with pytest.raises(UnknownTask):
            change(TaskEdits(registry), name)
    assert registry.revision == revision


def test_a_server_admin_changes_the_tasks_of_every_tenant(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord
) -> None:
    assert edits.select(OPERATOR, "acme:one", 1).tenant == "acme"
    assert served(registry, "one") == 1


def test_changes_name_a_task_and_not_a_version(edits: TaskEdits, task: TaskRecord) -> None:
    edits.set_alias(OWNER, "one", "prod", 1)
    for name in ("one@1", "one@prod", "one@9"):
        with pytest.raises(UnknownTask):
            edits.drop(OWNER, name)


def test_unknown_versions_are_unknown(edits: TaskEdits, task: TaskRecord) -> None:
    changes: list[Callable[[], TaskRecord]] = [
        lambda: edits.select(OWNER, "one", 9),
        lambda: edits.set_alias(OWNER, "one", "prod", 9),
        lambda: edits.set_canary(OWNER, "one", 9, 0.5),
    ]
    for change in changes:
        with pytest.raises(UnknownTask):
            change()


def test_labels_are_replaced(edits: TaskEdits, task: TaskRecord) -> None:
    assert edits.set_labels(OWNER, "one", {"a": "1", "b": "2"}).labels == {"a": "1", "b": "2"}
    assert edits.set_labels(OWNER, "one", {"c": "3"}).labels == {"c": "3"}
    with pytest.raises(InvalidRequest):
        edits.set_labels(OWNER, "one", {"A": "1"})


def test_a_change_happens_only_to_the_task_that_was_expected(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord
) -> None:
    after = edits.set_labels(OWNER, "one", {"a": "1"}, task.changed)
    assert after.changed == registry.revision > task.changed
    with pytest.raises(PreconditionFailed):
        edits.drop(OWNER, "one", task.changed)
    assert edits.drop(OWNER, "one", after.changed).deleted is not None


def test_what_is_so_already_is_no_change(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord
) -> None:
    def change() -> list[TaskRecord]:
        return [
            edits.set_alias(OWNER, "one", "prod", 1),
            edits.set_canary(OWNER, "one", 1, 0.5),
            edits.share(OWNER, "one", "other"),
            edits.set_labels(OWNER, "one", {"a": "1"}),
            edits.select(OWNER, "one", 3),
        ]

    change()
    revision = registry.revision
    assert {each.changed for each in change()} == {revision}
    assert registry.revision == revision


def test_every_change_is_in_the_audit_log_under_its_revision(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord
) -> None:
    edits.select(OWNER, "one", 1)
    edits.drop(OWNER, "one")
    found = actions(registry)
    assert [revision for revision, _ in found] == list(range(1, registry.revision + 1))
    assert [action for _, action in found][-2:] == ["select", "drop"]


def test_a_purge_deletes_what_was_dropped_before_and_keeps_the_number(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord, make_router: MakeRouter
) -> None:
    registry.register(OWNER, "two", make_router(3))  # the same bytes as version 3 of task one
    edits.set_alias(OWNER, "one", "prod", 1)
    edits.share(OWNER, "one", "other")
    dropped = edits.drop(OWNER, "one").deleted
    assert dropped is not None
    assert edits.purge(dropped) == 0
    assert edits.undelete(OWNER, "one").current.version == 3
    edits.drop(OWNER, "one")
    assert edits.purge(time.time() + 1) == 1
    assert edits.purge(time.time() + 1) == 0
    with pytest.raises(UnknownTask):
        edits.undelete(OWNER, "one")
    with registry.database.read() as connection:
        assert connection.execute(select(func.count()).select_from(routers)).scalar_one() == 1
    assert served(registry, "two") == 1
    again = registry.register(OWNER, "one", make_router(1))
    assert (again.created, again.version.version, again.task.aliases) == (True, 4, {})


def test_a_purge_takes_many_tasks(
    registry: TaskRegistry, edits: TaskEdits, make_router: MakeRouter
) -> None:
    for number in range(3):
        registry.register(OWNER, f"task-{number}", make_router(number))
        edits.drop(OWNER, f"task-{number}")
    assert edits.purge(time.time() + 1) == 3
    assert registry.page(OWNER, deleted=True).tasks == ()


def test_of_concurrent_changes_with_one_revision_one_wins(
    registry: TaskRegistry, edits: TaskEdits, task: TaskRecord
) -> None:
    def change(number: int) -> bool:
        try:
            edits.set_labels(OWNER, "one", {"winner": str(number)}, task.changed)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(change, range(16)))
    assert won.count(True) == 1
    assert registry.find(OWNER, "one").labels == {"winner": str(won.index(True))}
