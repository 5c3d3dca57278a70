"""Tenants and API keys in the database, and what a server remembers of them."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest
from sqlalchemy import select

from polyrex.adapters.files.inventory import Inventory
from polyrex.server.errors import (
    AuthenticationError,
    InvalidRequest,
    ServerError,
    TenantExists,
    UnknownKey,
    UnknownTenant,
)
from polyrex.server.registry.database import Change, Database
from polyrex.server.registry.principal import DEFAULT_TENANT, OPERATOR, Principal, Role
from polyrex.server.registry.registry import TaskRegistry
from polyrex.server.registry.schema import audit, keys
from polyrex.server.registry.tenants.directory import Directory
from polyrex.server.registry.tenants.records import NewKey, Quotas


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with closing(Database(database_url)) as opened:
        yield opened


@pytest.fixture
def directory(database: Database) -> Directory:
    return Directory(database)


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether the condition holds soon: a second is promised, and a busy machine gets more."""
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


def refused(directory: Directory, secret: str) -> bool:
    try:
        directory.authenticate(secret)
    except AuthenticationError:
        return True
    return False


def test_a_key_is_its_tenant_in_its_role(directory: Directory) -> None:
    directory.create_tenant(OPERATOR, "acme", Quotas())
    made = directory.create_key(OPERATOR, "acme", Role.task_admin, label="ci")
    principal = directory.authenticate(made.secret)
    assert (principal.tenant, principal.role) == ("acme", Role.task_admin)
    assert principal.key == made.key.id
    assert made.secret.startswith(f"plx_{made.key.id}_")
    assert len(made.secret) > 60  # 256 bits and the id


def test_nothing_like_a_key_is_a_key(directory: Directory) -> None:
    made = directory.create_key(OPERATOR, DEFAULT_TENANT, Role.inference)
    other = directory.create_key(OPERATOR, DEFAULT_TENANT, Role.server_admin)
    mixed = f"plx_{other.key.id}_{made.secret.rpartition('_')[2]}"
    for text in ("", "plx_", "plx__", made.secret[:-1], made.secret + "x", mixed, made.key.id):
        assert refused(directory, text), text
    assert refused(directory, made.secret.upper())


def test_the_database_holds_no_secret(directory: Directory, database: Database) -> None:
    made = directory.create_key(OPERATOR, DEFAULT_TENANT, Role.inference)
    with database.read() as connection:
        rows = [*connection.execute(select(keys)), *connection.execute(select(audit))]
    secret = made.secret.removeprefix(f"plx_{made.key.id}_")
    assert len(rows) == 2
    assert not any(secret in str(value) for row in rows for value in row)


@pytest.mark.parametrize("known", [True, False])
def test_a_wrong_key_takes_one_comparison_whether_its_id_is_known_or_not(
    directory: Directory, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    made = directory.create_key(OPERATOR, DEFAULT_TENANT, Role.inference)
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    key_id = made.key.id if known else "0" * 16
    assert refused(directory, f"plx_{key_id}_{'x' * 43}")
    assert [(len(left), len(right)) for left, right in compared] == [(32, 32)]


def test_a_revoked_key_is_refused_for_good(directory: Directory, database: Database) -> None:
    made = directory.create_key(OPERATOR, DEFAULT_TENANT, Role.inference)
    assert directory.revoke_key(OPERATOR, made.key.id).revoked is not None
    assert refused(directory, made.secret)
    assert refused(Directory(database), made.secret)
    again = directory.revoke_key(OPERATOR, made.key.id)
    assert again == directory.key(made.key.id)
    with pytest.raises(InvalidRequest):
        directory.rotate_key(OPERATOR, made.key.id)


def test_a_rotated_key_passes_its_tenant_role_and_label_on(directory: Directory) -> None:
    directory.create_tenant(OPERATOR, "acme", Quotas())
    old = directory.create_key(OPERATOR, "acme", Role.metrics, label="prometheus")
    new = directory.rotate_key(OPERATOR, old.key.id)
    assert refused(directory, old.secret)
    assert (new.key.tenant, new.key.role, new.key.label) == ("acme", Role.metrics, "prometheus")
    assert directory.authenticate(new.secret).key == new.key.id != old.key.id


def test_a_rotated_key_is_valid_while_its_grace_lasts(database: Database) -> None:
    clock = Clock()
    directory = Directory(database, clock)
    old = directory.create_key(OPERATOR, DEFAULT_TENANT, Role.inference)
    new = directory.rotate_key(OPERATOR, old.key.id, grace=60)
    clock.now += 59
    assert not refused(directory, old.secret)
    clock.now += 1
    assert refused(directory, old.secret)
    assert not refused(directory, new.secret)


def test_a_key_expires_and_what_replaces_it_does_too(database: Database) -> None:
    clock = Clock()
    directory = Directory(database, clock)
    old = directory.create_key(OPERATOR, DEFAULT_TENANT, Role.inference, lifetime=100)
    clock.now += 40
    new = directory.rotate_key(OPERATOR, old.key.id, grace=1000)
    clock.now += 60
    assert refused(directory, old.secret)  # grace does not prolong it
    assert not refused(directory, new.secret)
    clock.now += 40
    assert refused(directory, new.secret)


def test_a_clock_that_is_set_back_brings_no_expired_key_to_life(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monotonic = Clock()
    monkeypatch.setattr(time, "monotonic", monotonic)
    directory = Directory(database, clock)
    made = directory.create_key(OPERATOR, DEFAULT_TENANT, Role.inference, lifetime=100)
    for each in (clock, monotonic):
        each.now += 100
    assert refused(directory, made.secret)
    clock.now -= 3600
    assert refused(directory, made.secret)


def test_a_disabled_tenants_keys_are_refused_until_it_is_enabled(directory: Directory) -> None:
    directory.create_tenant(OPERATOR, "acme", Quotas())
    made = directory.create_key(OPERATOR, "acme", Role.inference)
    assert directory.change_tenant(OPERATOR, "acme", disabled=True).disabled
    assert refused(directory, made.secret)
    directory.change_tenant(OPERATOR, "acme", disabled=False)
    assert not refused(directory, made.secret)
    with pytest.raises(InvalidRequest):
        directory.change_tenant(OPERATOR, DEFAULT_TENANT, disabled=True)


def test_quotas_are_changed_one_by_one(directory: Directory, database: Database) -> None:
    directory.create_tenant(OPERATOR, "acme", Quotas(tasks=5, concurrent=2))
    changes = {"concurrent": None, "requests_per_minute": 60}
    changed = directory.change_tenant(OPERATOR, "acme", quotas=changes)
    assert changed.quotas == Quotas(tasks=5, requests_per_minute=60)
    assert Directory(database).tenant("acme") == changed == directory.tenant("acme")


@pytest.mark.parametrize("name", ["", "A", "a b", "-a", "a_b", "a" * 64, "ä", "a\n", "a:b"])
def test_a_tenants_name_is_plain(directory: Directory, name: str) -> None:
    with pytest.raises(InvalidRequest):
        directory.create_tenant(OPERATOR, name, Quotas())
    assert [tenant.name for tenant in directory.tenants()] == [DEFAULT_TENANT]


@pytest.mark.parametrize("label", ["x" * 257, "two\nlines", "\x1b[31m"])
def test_a_keys_label_is_one_short_line(directory: Directory, label: str) -> None:
    with pytest.raises(InvalidRequest):
        directory.create_key(OPERATOR, DEFAULT_TENANT, Role.inference, label=label)
    assert directory.keys(DEFAULT_TENANT) == []


Use = Callable[[Directory], object]
MISUSES: dict[str, tuple[type[ServerError], Use]] = {
    "tenant twice": (TenantExists, lambda d: d.create_tenant(OPERATOR, "default", Quotas())),
    "no tenant": (UnknownTenant, lambda d: d.tenant("nobody")),
    "change of no tenant": (UnknownTenant, lambda d: d.change_tenant(OPERATOR, "nobody")),
    "key of no tenant": (
        UnknownTenant,
        lambda d: d.create_key(OPERATOR, "nobody", Role.inference),
    ),
    "keys of no tenant": (UnknownTenant, lambda d: d.keys("nobody")),
    "no key": (UnknownKey, lambda d: d.key("nothing")),
    "revoke of no key": (UnknownKey, lambda d: d.revoke_key(OPERATOR, "nothing")),
    "rotate of no key": (UnknownKey, lambda d: d.rotate_key(OPERATOR, "nothing")),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_what_is_not_there_is_said_to_be_missing_and_nothing_changes(
    directory: Directory, database: Database, misuse: str
) -> None:
    error, use = MISUSES[misuse]
    with pytest.raises(error):
        use(directory)
    with database.read() as connection:
        assert connection.execute(select(audit)).all() == []


def test_every_change_is_audited_with_who_did_it(directory: Directory, database: Database) -> None:
    admin = directory.create_key(OPERATOR, DEFAULT_TENANT, Role.server_admin)
    asker = directory.authenticate(admin.secret)
    directory.create_tenant(asker, "acme", Quotas())
    directory.change_tenant(asker, "acme", quotas={"tasks": 1})
    directory.change_tenant(asker, "acme", quotas={"tasks": 1})  # changes nothing
    made = directory.create_key(asker, "acme", Role.inference)
    rotated = directory.rotate_key(asker, made.key.id)
    directory.revoke_key(asker, rotated.key.id)
    with database.read() as connection:
        rows = connection.execute(select(audit).order_by(audit.c.revision)).all()
    assert [row.revision for row in rows] == list(range(1, len(rows) + 1))
    assert [(row.subject, row.action) for row in rows] == [
        ("key", "create"),
        ("tenant", "create"),
        ("tenant", "change"),
        ("key", "create"),
        ("key", "create"),
        ("key", "rotate"),
        ("key", "revoke"),
    ]
    assert {row.key for row in rows[1:]} == {admin.key.id}


def test_another_servers_change_is_known_once_it_is_told(database: Database) -> None:
    here, there = Directory(database), Directory(database)
    made = there.create_key(OPERATOR, DEFAULT_TENANT, Role.inference)
    with database.read() as connection:
        changes = connection.execute(select(audit)).all()
    here.follow([change for change in changes if change.subject == "task"] or changes[:1])
    assert here.authenticate(made.secret).key == made.key.id
    there.revoke_key(OPERATOR, made.key.id)
    here.follow([])  # anything may have changed
    assert refused(here, made.secret)


def test_a_key_that_another_replica_revokes_is_refused_soon_after(
    postgres_url: str, random_inventory: Inventory
) -> None:
    with (
        closing(TaskRegistry(Database(postgres_url), random_inventory)) as near,
        closing(TaskRegistry(Database(postgres_url), random_inventory)) as far,
    ):
        here, there = Directory(near.database), Directory(far.database)
        near.on_change(here.follow)
        near.start()
        made = there.create_key(OPERATOR, DEFAULT_TENANT, Role.inference)
        known = eventually(lambda: not refused(here, made.secret))
        there.revoke_key(OPERATOR, made.key.id)
        unknown = eventually(lambda: refused(here, made.secret))
    assert (known, unknown) == (True, True)


def test_a_change_that_is_overtaken_does_not_put_back_what_it_saw(
    directory: Directory, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    later: list[NewKey] = []
    change = database.change

    @contextmanager
    def overtaken(asker: Principal) -> Iterator[Change]:
        with change(asker) as found:
            yield found
        if not later:  # committed, and not in memory yet
            monkeypatch.undo()
            later.append(directory.create_key(OPERATOR, DEFAULT_TENANT, Role.inference))

    monkeypatch.setattr(database, "change", overtaken)
    earlier = directory.create_key(OPERATOR, DEFAULT_TENANT, Role.inference)
    secrets = (earlier.secret, later[0].secret)
    assert [refused(directory, secret) for secret in secrets] == [False, False]


def test_changes_at_once_leave_memory_as_the_database_is(
    directory: Directory, database: Database
) -> None:
    directory.create_tenant(OPERATOR, "acme", Quotas())

    def make_and_revoke(number: int) -> str:
        made = directory.create_key(OPERATOR, "acme", Role.inference, label=str(number))
        if number % 2:
            directory.revoke_key(OPERATOR, made.key.id)
        return made.secret

    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(make_and_revoke, range(24)))
    assert [refused(directory, secret) for secret in secrets] == [False, True] * 12
    assert directory.keys("acme") == Directory(database).keys("acme")
