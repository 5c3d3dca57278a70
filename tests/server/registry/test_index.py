"""The index in memory: who finds what, which version answers, and what is listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from sqlalchemy import event

from polyrex.adapters.errors import UnknownTask
from polyrex.server.registry.edits import TaskEdits
from polyrex.server.registry.memory.cache import VersionCache
from polyrex.server.registry.memory.index import Entry
from polyrex.server.registry.principal import OPERATOR, Principal, Role
from polyrex.server.registry.records import Canary
from polyrex.server.registry.registry import TaskRegistry
from support.registry.makers import AddTenant, MakeRouter, OpenRegistry

CANARY = Entry(7, "default", "a", 1, 2, 0.0, True, (("prod", 1),), Canary(2, 0.25), ())


def reachable(registry: TaskRegistry, asker: Principal, name: str) -> bool:
    """Whether the asker reaches a task; memory and database must be of one mind."""

    def reaches(ask: object) -> bool:
        try:
            ask(asker, name)  # type: ignore[operator]
        except UnknownTask:
            return False
        return True

    pinned, found = reaches(registry.pin), reaches(registry.find)
    if pinned != found:
        raise AssertionError(f"{name}: pinned {pinned}, found {found}")
    return found


def test_name_means_the_askers_own_task_and_nothing_else(
    registry: TaskRegistry, add_tenant: AddTenant, make_small_router: MakeRouter
) -> None:
    a, b = add_tenant(registry, "acme"), add_tenant(registry, "bolt")
    registry.register(a, "sums", make_small_router(1))
    registry.register(b, "sums", make_small_router(2))
    registry.register(a, "mine", make_small_router(3))
    TaskEdits(registry).share(a, "mine", "bolt")
    assert registry.pin(a, "sums").info.tenant == "acme"
    assert registry.pin(b, "sums").info.tenant == "bolt"
    assert not reachable(registry, b, "mine")  # shared, but not bolt's own
    assert reachable(registry, b, "acme:mine")
    assert not reachable(registry, b, "acme:sums")
    assert not reachable(registry, b, "default:sums")
    assert reachable(registry, OPERATOR, "acme:sums")
    assert not reachable(registry, OPERATOR, "sums")


def test_share_that_is_taken_back_ends_at_once(
    registry: TaskRegistry, add_tenant: AddTenant, make_small_router: MakeRouter
) -> None:
    a, b = add_tenant(registry, "acme"), add_tenant(registry, "bolt")
    registry.register(a, "sums", make_small_router(1))
    edits = TaskEdits(registry)
    edits.share(a, "sums", "bolt")
    assert reachable(registry, b, "acme:sums@1")
    edits.unshare(a, "sums", "bolt")
    assert not reachable(registry, b, "acme:sums@1")
    assert registry.models(b, None, 10) == []


def test_unknown_and_foreign_tasks_have_one_error(
    registry: TaskRegistry, add_tenant: AddTenant, make_small_router: MakeRouter
) -> None:
    a, b = add_tenant(registry, "acme"), add_tenant(registry, "bolt")
    registry.register(a, "sums", make_small_router(1))
    names = ("acme:sums", "acme:none", "none:sums", "sums", "acme:sums@1", "acme:sums@x", "?")
    said = set()
    for name in names:
        with pytest.raises(UnknownTask) as error:
            registry.pin(b, name)
        said.add(str(error.value))
    assert said == {"no such task, or not for this key"}


GUESSES: dict[str, Callable[[TaskRegistry, Principal, str], object]] = {
    "find": lambda registry, asker, name: registry.find(asker, name),
    "version": lambda registry, asker, name: registry.version(asker, name),
    "versions": lambda registry, asker, name: registry.versions(asker, name),
    "edit": lambda registry, asker, name: TaskEdits(registry).set_labels(asker, name, {}),
    "undelete": lambda registry, asker, name: TaskEdits(registry).undelete(asker, name),
}


@pytest.mark.parametrize("guess", GUESSES.values(), ids=GUESSES)
def test_an_unknown_name_costs_as_many_statements_as_a_foreign_one(
    guess: Callable[[TaskRegistry, Principal, str], object],
    registry: TaskRegistry,
    add_tenant: AddTenant,
    make_small_router: MakeRouter,
) -> None:
    a, b = add_tenant(registry, "acme"), add_tenant(registry, "bolt")
    for name in ("sums", "shared", "gone"):
        registry.register(a, name, make_small_router(1))
    TaskEdits(registry).share(a, "shared", "other")
    TaskEdits(registry).drop(a, "gone")
    statements: list[object] = []
    event.listen(
        registry.database.engine, "before_cursor_execute", lambda *args: statements.append(args[2])
    )
    costs = {}
    for name in ("none", "sums", "shared", "gone"):
        statements.clear()
        with pytest.raises(UnknownTask):
            guess(registry, b, f"acme:{name}")
        costs[name] = list(statements)
    assert costs == dict.fromkeys(costs, costs["none"])


@pytest.mark.parametrize("name", ["none", "acme:none", "acme:sums"])
def test_guesses_do_not_take_turns_with_changes(
    name: str,
    registry: TaskRegistry,
    add_tenant: AddTenant,
    make_small_router: MakeRouter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = add_tenant(registry, "acme"), add_tenant(registry, "bolt")
    registry.register(a, "sums", make_small_router(1))
    monkeypatch.setattr("polyrex.server.registry.database._TURN_SECONDS", 0.05)
    with registry.database.change(a), pytest.raises(UnknownTask):
        TaskEdits(registry).drop(b, name)
    assert registry.find(a, "sums").deleted is None


def test_versions_and_aliases_are_pinned_by_name(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    for seed in range(3):
        registry.register(OPERATOR, "a", make_small_router(seed), replace=True)
    TaskEdits(registry).set_alias(OPERATOR, "a", "prod", 2)
    pinned = [registry.pin(OPERATOR, name).info for name in ("a", "a@1", "a@prod", "default:a@2")]
    assert [info.version for info in pinned] == [3, 1, 2, 2]
    assert {info.name for info in pinned} == {"a"}
    assert not any(reachable(registry, OPERATOR, name) for name in ("a@4", "a@9999", "a@dev"))
    TaskEdits(registry).select(OPERATOR, "a", 1)
    assert registry.pin(OPERATOR, "a").info.version == 1


def test_canary_gets_its_share_and_the_same_users_again() -> None:
    users = [f"user-{n}" for n in range(4000)]
    answers = [CANARY.select(None, user) for user in users]
    assert Counter(answers)[2] / len(users) == pytest.approx(0.25, abs=0.03)
    assert [CANARY.select(None, user) for user in users] == answers
    other = CANARY._replace(id=8)  # users are drawn anew for each task
    assert [other.select(None, user) for user in users] != answers
    more = CANARY._replace(canary=Canary(2, 0.5))
    still = [
        more.select(None, user) for user, answer in zip(users, answers, strict=True) if answer == 2
    ]
    assert set(still) == {2}  # a larger share takes no canary away


@pytest.mark.parametrize(("share", "expected"), [(0.0, {1}), (1.0, {2}), (0.5, {1, 2})])
def test_canary_is_drawn_where_nobody_is_named(share: float, expected: set[int]) -> None:
    entry = CANARY._replace(canary=Canary(2, share))
    assert {entry.select(None, None) for _ in range(200)} == expected


def test_canary_leaves_chosen_versions_alone() -> None:
    entry = CANARY._replace(canary=Canary(2, 1.0))
    assert (entry.select(1, "u"), entry.select("prod", "u")) == (1, 1)


def test_requests_are_counted_while_a_task_has_a_canary(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    edits = TaskEdits(registry)
    registry.register(OPERATOR, "a", make_small_router(0))
    task = registry.register(OPERATOR, "a", make_small_router(1), replace=True).task
    registry.pin(OPERATOR, "a")
    edits.set_canary(OPERATOR, "a", 1, 0.5)
    for n in range(40):
        registry.pin(OPERATOR, "a", sticky=str(n))
    registry.pin(OPERATOR, "a@1")
    counts = registry.canary_counts.of(task.id)
    assert sum(counts.values()) == 40
    assert set(counts) == {1, 2}
    assert registry.canary_counts.totals() == {"canary": counts[1], "current": counts[2]}
    edits.remove_canary(OPERATOR, "a")
    registry.pin(OPERATOR, "a")
    assert registry.canary_counts.of(task.id) == {}
    assert sum(registry.canary_counts.totals().values()) == 40


def test_models_are_own_tasks_and_then_shared_ones(
    registry: TaskRegistry, add_tenant: AddTenant, make_small_router: MakeRouter
) -> None:
    a, b = add_tenant(registry, "acme"), add_tenant(registry, "bolt")
    for name in ("z", "b", "a"):
        registry.register(b, name, make_small_router())
    for name in ("y", "a"):
        registry.register(a, name, make_small_router())
        TaskEdits(registry).share(a, name, "bolt")
    listed = [name for name, _ in registry.models(b, None, 10)]
    assert listed == ["a", "b", "z", "acme:a", "acme:y"]
    paged, after = [], None
    while page := registry.models(b, after, 2):
        paged += [name for name, _ in page]
        after = paged[-1]
    assert paged == listed
    assert registry.models(b, None, 1) == [("a", registry.find(b, "a").created)]
    TaskEdits(registry).drop(a, "y")
    TaskEdits(registry).drop(b, "b")
    assert [name for name, _ in registry.models(b, None, 10)] == ["a", "z", "acme:a"]
    assert [name for name, _ in registry.models(Principal("none", Role.inference), None, 9)] == []


def test_index_of_a_restart_is_that_of_before(
    open_registry: OpenRegistry, add_tenant: AddTenant, make_small_router: MakeRouter
) -> None:
    registry = open_registry()
    a = add_tenant(registry, "acme")
    edits = TaskEdits(registry)
    for seed in range(3):
        registry.register(OPERATOR, "a", make_small_router(seed), replace=True)
    registry.register(a, "gone", make_small_router())
    edits.set_alias(OPERATOR, "a", "prod", 1)
    edits.set_canary(OPERATOR, "a", 2, 1.0)
    edits.share(OPERATOR, "a", "acme")
    edits.drop(a, "gone")
    registry.close()
    again = open_registry()
    pinned = [again.pin(a, name).info.version for name in ("default:a", "default:a@prod")]
    assert pinned == [2, 1]
    assert [name for name, _ in again.models(a, None, 10)] == ["default:a"]
    assert (len(again), again.revision) == (1, registry.revision)


def test_cache_keeps_what_was_used_last_within_its_bytes(
    registry: TaskRegistry, make_small_router: MakeRouter
) -> None:
    registry.register(OPERATOR, "a", make_small_router(0))
    version = registry.pin(OPERATOR, "a")
    one = version.router.logits.nbytes + version.router.weights.nbytes + 2048
    cache = VersionCache(most_bytes=2 * one)
    for task_id in (1, 2):
        cache.put(task_id, version)
    cache.get(1, 1)
    cache.put(3, version)
    assert [cache.get(task_id, 1) is version for task_id in (1, 2, 3)] == [True, False, True]
    small = VersionCache(most_bytes=one - 1)
    small.put(1, version)
    assert small.get(1, 1) is None
