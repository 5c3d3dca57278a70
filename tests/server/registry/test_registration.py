"""Registering under conditions: revisions, Idempotency-Keys, labels, quotas, old versions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import func, select, update

from polyrex.adapters.errors import TaskExists, UnknownTask
from polyrex.server.errors import (
    IdempotencyMismatch,
    InvalidRequest,
    PreconditionFailed,
    QuotaExceeded,
    TaskDamaged,
)
from polyrex.server.registry.edits import TaskEdits
from polyrex.server.registry.principal import OPERATOR
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.registry.rows import Existence
from polyrex.server.registry.schema import audit, idempotency, routers, state
from support.registry.makers import AddTenant, MakeRouter, OpenRegistry


def kept(registry: TaskRegistry, name: str) -> list[int]:
    return [version.version for version in registry.versions(OPERATOR, name)]


def count_of_routers(registry: TaskRegistry) -> int:
    with registry.database.read() as connection:
        return connection.execute(select(func.count()).select_from(routers)).scalar_one()


def test_revision_that_was_expected_is_replaced_and_no_other(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    first = registry.register(OPERATOR, "a", make_small_router(0)).task
    registry.register(OPERATOR, "b", make_small_router(0))
    second = registry.register(
        OPERATOR, "a", make_small_router(1), replace=True, expected=first.changed
    ).task
    with pytest.raises(PreconditionFailed):
        registry.register(OPERATOR, "a", make_small_router(2), replace=True, expected=first.changed)
    assert registry.find(OPERATOR, "a") == second


def test_existence_can_be_expected(registry: TaskRegistry, make_small_router: MakeRouter) -> None:
    def attempt(name: str, expected: Existence | int) -> bool:
        try:
            registry.register(OPERATOR, name, make_small_router(), replace=True, expected=expected)
        except PreconditionFailed:
            return False
        return True

    assert not attempt("a", Existence.present)
    assert not attempt("a", 1)
    assert attempt("a", Existence.absent)
    assert not attempt("a", Existence.absent)  # also where it is the same router
    assert attempt("a", Existence.present)
    TaskEdits(registry).drop(OPERATOR, "a")
    assert not attempt("a", Existence.present)
    assert attempt("a", Existence.absent)


def test_of_many_updates_of_one_revision_one_wins(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    seen = registry.register(OPERATOR, "a", make_small_router(0)).task.changed

    def attempt(seed: int) -> bool:
        try:
            registry.register(OPERATOR, "a", make_small_router(seed), replace=True, expected=seen)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(1, 9))) == 1
    assert kept(registry, "a") == [1, 2]


def test_repeated_request_has_its_first_outcome_though_others_came_between(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    mine = make_small_router(1)
    first = registry.register(OPERATOR, "a", mine, replace=True, idempotency_key="k")
    second = registry.register(OPERATOR, "a", make_small_router(2), replace=True)
    again = registry.register(OPERATOR, "a", mine, replace=True, idempotency_key="k")
    assert again == replace(first, task=second.task)
    assert (again.version.version, again.created) == (1, True)
    assert registry.pin(OPERATOR, "a").info.version == 2


def test_request_that_changed_nothing_is_remembered_too(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    mine = make_small_router(1)
    registry.register(OPERATOR, "a", mine)
    registry.register(OPERATOR, "a", mine, replace=True, idempotency_key="k")
    registry.register(OPERATOR, "a", make_small_router(2), replace=True)
    again = registry.register(OPERATOR, "a", mine, replace=True, idempotency_key="k")
    assert again.version.version == 1
    assert kept(registry, "a") == [1, 2]


def test_repeated_request_repairs_its_router(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    mine = make_small_router(1)
    first = registry.register(OPERATOR, "a", mine, idempotency_key="k")
    with registry.database.change(OPERATOR) as change:
        change.connection.execute(update(routers).values(data=b"damaged"))
        change.record("damage", "task", 0)
    with pytest.raises(TaskDamaged):
        registry.pin(OPERATOR, "a")
    assert registry.register(OPERATOR, "a", mine, idempotency_key="k") == first
    assert registry.pin(OPERATOR, "a").router.sha256 == first.version.router_sha256
    repaired = registry.revision
    assert registry.register(OPERATOR, "a", mine, idempotency_key="k") == first
    assert registry.revision == repaired


def test_repeated_request_does_not_say_that_a_dropped_task_is_served(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    mine = make_small_router(1)
    first = registry.register(OPERATOR, "a", mine, idempotency_key="k")
    TaskEdits(registry).drop(OPERATOR, "a")
    with pytest.raises(IdempotencyMismatch, match="was dropped since; undelete it, or send"):
        registry.register(OPERATOR, "a", mine, idempotency_key="k")
    TaskEdits(registry).undelete(OPERATOR, "a")
    again = registry.register(OPERATOR, "a", mine, idempotency_key="k")
    assert (again.version, again.created) == (first.version, True)
    assert registry.pin(OPERATOR, "a").info.version == 1


def test_condition_does_not_stand_in_the_way_of_a_repeated_request(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    changed = registry.register(OPERATOR, "a", make_small_router(0)).task.changed

    def send() -> int:
        done = registry.register(
            OPERATOR,
            "a",
            make_small_router(1),
            replace=True,
            expected=changed,
            idempotency_key="k",
        )
        return done.version.version

    assert (send(), send()) == (2, 2)


def test_key_of_another_request_is_refused(
    registry: TaskRegistry, add_tenant: AddTenant, make_small_router: MakeRouter
) -> None:
    mine = make_small_router(1)
    registry.register(OPERATOR, "a", mine, idempotency_key="k")
    with pytest.raises(IdempotencyMismatch):
        registry.register(OPERATOR, "a", make_small_router(2), idempotency_key="k")
    with pytest.raises(IdempotencyMismatch):
        registry.register(OPERATOR, "b", mine, idempotency_key="k")
    with pytest.raises(IdempotencyMismatch):
        registry.register(OPERATOR, "a", mine, labels={"x": "y"}, idempotency_key="k")
    other = add_tenant(registry, "acme")
    assert registry.register(other, "b", mine, idempotency_key="k").created


def test_keys_are_forgotten_after_a_day(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    registry.register(OPERATOR, "a", make_small_router(1), idempotency_key="old")
    with registry.database.change(OPERATOR) as change:
        change.connection.execute(update(idempotency).values(at=idempotency.c.at - 90_000))
        change.record("age", "task", 0)
    registry.register(OPERATOR, "b", make_small_router(1), idempotency_key="new")
    with registry.database.read() as connection:
        known = list(connection.execute(select(idempotency.c.key)).scalars())
    assert known == ["new"]


def test_labels_stay_unless_others_are_given(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    registry.register(OPERATOR, "a", make_small_router(0), labels={"team": "x"})
    kept_labels = registry.register(OPERATOR, "a", make_small_router(1), replace=True)
    assert kept_labels.task.labels == {"team": "x"}
    relabelled = registry.register(
        OPERATOR, "a", make_small_router(1), replace=True, labels={"team": "y"}
    )
    assert (relabelled.task.labels, relabelled.version.version) == ({"team": "y"}, 2)
    assert relabelled.task.changed > kept_labels.task.changed
    with pytest.raises(TaskExists, match="with other labels"):
        registry.register(OPERATOR, "a", make_small_router(1), labels={})
    cleared = registry.register(OPERATOR, "a", make_small_router(2), replace=True, labels={})
    assert (cleared.task.labels, cleared.version.version) == ({}, 3)


@pytest.mark.parametrize(
    "labels",
    [
        *({"": "x"}, {"A": "x"}, {"a" * 64: "x"}, {'a"b': "x"}, {"a": "x\n"}, {"a": "x" * 257}),
        *({"a": "\0"}, {"a": "\ud800"}, {f"k{n}": "x" for n in range(33)}),
    ],
    ids=lambda labels: ascii(labels)[:16],
)
def test_labels_that_cannot_be_are_refused(
    labels: dict[str, str], registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    with pytest.raises(InvalidRequest, match="label"):
        registry.register(OPERATOR, "a", make_small_router(), labels=labels)
    with pytest.raises(InvalidRequest, match="label"):
        registry.page(OPERATOR, labels=labels)
    assert registry.revision == 0


def test_dropped_name_begins_again_and_versions_go_on_counting(
    registry: TaskRegistry, add_tenant: AddTenant, make_small_router: MakeRouter
) -> None:
    add_tenant(registry, "acme")
    edits = TaskEdits(registry)
    registry.register(OPERATOR, "a", make_small_router(0), labels={"team": "x"})
    registry.register(OPERATOR, "a", make_small_router(1), replace=True)
    edits.set_alias(OPERATOR, "a", "prod", 1)
    edits.set_canary(OPERATOR, "a", 1, 0.5)
    edits.share(OPERATOR, "a", "acme")
    edits.drop(OPERATOR, "a")
    done = registry.register(OPERATOR, "a", make_small_router(2))
    assert done.created
    assert (done.version.version, done.task.last_version) == (3, 3)
    left = (done.task.aliases, done.task.canary, done.task.shared_with, done.task.labels)
    assert left == ({}, None, (), {})
    assert done.task.deleted is None
    assert registry.pin(OPERATOR, "a").info.version == 3


def test_purged_name_begins_again_and_versions_go_on_counting(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    registry.register(OPERATOR, "a", make_small_router(0))
    registry.pin(OPERATOR, "a@1")
    TaskEdits(registry).drop(OPERATOR, "a")
    assert TaskEdits(registry).purge(dropped_before=1e12) == 1
    done = registry.register(OPERATOR, "a", make_small_router(0))
    assert (done.version.version, kept(registry, "a")) == (2, [2])
    with pytest.raises(UnknownTask):
        registry.pin(OPERATOR, "a@1")


def test_old_versions_go_unless_something_names_them(
    open_registry: OpenRegistry, make_small_router: MakeRouter
) -> None:
    registry = open_registry(keep_versions=2)
    edits = TaskEdits(registry)
    for seed in range(3):
        registry.register(OPERATOR, "a", make_small_router(seed), replace=True)
    assert kept(registry, "a") == [2, 3]
    edits.set_alias(OPERATOR, "a", "prod", 2)
    registry.register(OPERATOR, "a", make_small_router(3), replace=True)
    edits.set_canary(OPERATOR, "a", 3, 0.5)
    registry.pin(OPERATOR, "a@3")
    for seed in range(4, 6):
        registry.register(OPERATOR, "a", make_small_router(seed), replace=True)
    assert kept(registry, "a") == [2, 3, 5, 6]
    edits.remove_canary(OPERATOR, "a")
    registry.register(OPERATOR, "a", make_small_router(6), replace=True)
    assert kept(registry, "a") == [2, 6, 7]
    assert count_of_routers(registry) == 3
    with pytest.raises(UnknownTask):
        registry.pin(OPERATOR, "a@3")  # also where its router was at hand


def test_router_that_two_tasks_have_stays_while_one_has_it(
    open_registry: OpenRegistry, make_small_router: MakeRouter
) -> None:
    registry = open_registry(keep_versions=1)
    registry.register(OPERATOR, "a", make_small_router(0))
    registry.register(OPERATOR, "b", make_small_router(0))
    assert count_of_routers(registry) == 1
    registry.register(OPERATOR, "a", make_small_router(1), replace=True)
    assert registry.pin(OPERATOR, "b").info.version == 1
    registry.register(OPERATOR, "b", make_small_router(1), replace=True)
    assert count_of_routers(registry) == 1


def test_tenant_has_no_more_tasks_than_its_quota(
    registry: TaskRegistry, add_tenant: AddTenant, make_small_router: MakeRouter
) -> None:
    acme = add_tenant(registry, "acme", tasks=2)
    for name in ("a", "b"):
        registry.register(acme, name, make_small_router(0))
    with pytest.raises(QuotaExceeded, match="as many tasks as it may have, 2"):
        registry.register(acme, "c", make_small_router(0))
    assert registry.register(acme, "b", make_small_router(1), replace=True).version.version == 2
    TaskEdits(registry).drop(acme, "a")
    assert registry.register(acme, "c", make_small_router(0)).created
    assert registry.register(OPERATOR, "c", make_small_router(0)).created


def test_tenant_has_no_more_bytes_than_its_quota(
    registry: TaskRegistry, add_tenant: AddTenant, make_small_router: MakeRouter
) -> None:
    size = len(make_small_router(0))
    acme = add_tenant(registry, "acme", bytes=2 * size)
    registry.register(acme, "a", make_small_router(0))
    registry.register(acme, "a", make_small_router(1), replace=True)
    with pytest.raises(QuotaExceeded, match=f"{2 * size} bytes"):
        registry.register(acme, "a", make_small_router(2), replace=True)
    assert registry.find(acme, "a").last_version == 2


def test_admin_registers_for_others_and_nobody_else_does(
    registry: TaskRegistry, add_tenant: AddTenant, make_small_router: MakeRouter
) -> None:
    acme = add_tenant(registry, "acme")
    done = registry.register(OPERATOR, "acme:a", make_small_router(0))
    assert (done.task.tenant, done.task.name) == ("acme", "a")
    assert registry.register(acme, "acme:b", make_small_router(0)).created
    for asker, name in ((acme, "default:a"), (acme, "nobody:a"), (OPERATOR, "nobody:a")):
        with pytest.raises(UnknownTask):
            registry.register(asker, name, make_small_router(0))
    with pytest.raises(UnknownTask):
        registry.register(acme, "acme:a@1", make_small_router(0))


def test_every_revision_has_a_row_of_the_audit(
    registry: TaskRegistry, add_tenant: AddTenant, make_small_router: MakeRouter
) -> None:
    acme = add_tenant(registry, "acme")
    done = registry.register(acme, "a", make_small_router(0))
    with pytest.raises(TaskExists):
        registry.register(acme, "a", make_small_router(1))
    registry.register(acme, "a", make_small_router(1), replace=True)
    with registry.database.read() as connection:
        rows = connection.execute(select(audit).order_by(audit.c.revision)).all()
        last = connection.execute(select(state.c.revision)).scalar_one()
    assert [row.revision for row in rows] == list(range(1, last + 1))
    assert [(row.action, row.tenant, row.version) for row in rows[1:]] == [
        ("register", "acme", 1),
        ("register", "acme", 2),
    ]
    assert rows[1].router_sha256.hex() == done.version.router_sha256
    assert registry.revision == last
