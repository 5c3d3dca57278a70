"""Tenants and API keys: in memory for every request, in the database for good."""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import Connection, Row, insert, select, update

from polyrex.server.errors import (
    AuthenticationError,
    InvalidRequest,
    TenantExists,
    UnknownKey,
    UnknownTenant,
)
from polyrex.server.registry.database import Change, Database
from polyrex.server.registry.names import check_tenant_name
from polyrex.server.registry.principal import DEFAULT_TENANT, Principal, Role
from polyrex.server.registry.schema import keys, state, tenants

from .records import Key, NewKey, Quotas, Tenant
from .secret_keys import digest, id_of, make_key

MOST_LABEL = 256
"""The most characters of a key's label."""


class Audited(Protocol):
    """A row of the audit table, as far as this file reads it."""

    @property
    def subject(self) -> str: ...


@dataclass(frozen=True)
class _Known:
    key: Key
    digest: bytes


@dataclass(frozen=True)
class _View:
    """All tenants and keys as they stood at one revision of the registry."""

    revision: int
    tenants: Mapping[str, Tenant]
    keys: Mapping[str, _Known]


class Directory:
    """The tenants and keys of one registry. Every method may be called from any thread.

    Reading asks memory alone. A change is in this directory's memory before its method returns;
    a change that another server made is there once `follow` has been told of it.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        """Read all tenants and keys; `clock` gives unix time. Raises StorageError."""
        self._database = database
        self._clock = clock
        self._begun = clock() - time.monotonic()
        # A key with an unknown id is compared as well, with this, so that it takes as long.
        self._nobody = secrets.token_bytes(32)
        self._replacing = threading.Lock()  # the view, which is read without it
        self.refresh()

    def refresh(self) -> None:
        """Read all tenants and keys again. Raises StorageError."""
        with self._replacing, self._database.read() as connection:
            revision = connection.execute(select(state.c.revision)).scalar_one()
            self._view = _read(connection, revision)

    def follow(self, changes: Sequence[Audited]) -> None:
        """Read again where a tenant or a key has changed. Raises StorageError.

        No changes at all mean that anything may have.
        """
        if not changes or any(change.subject in ("tenant", "key") for change in changes):
            self.refresh()

    def authenticate(self, text: str) -> Principal:
        """Who comes with this key; raises AuthenticationError where it is not valid."""
        view = self._view
        known = view.keys.get(id_of(text))
        same = hmac.compare_digest(digest(text), known.digest if known else self._nobody)
        if known is None or not same or not self._is_valid(view, known.key):
            raise AuthenticationError("this server needs an API key it knows: Bearer KEY")
        return Principal(known.key.tenant, known.key.role, known.key.id)

    def tenant(self, name: str) -> Tenant:
        """A tenant; raises UnknownTenant."""
        try:
            return self._view.tenants[name]
        except KeyError as error:
            raise UnknownTenant(f"no tenant {name!r:.80}") from error

    def tenants(self) -> list[Tenant]:
        """All tenants, ordered by name."""
        return list(self._view.tenants.values())

    def key(self, key_id: str) -> Key:
        """A key, valid or not; raises UnknownKey."""
        try:
            return self._view.keys[key_id].key
        except KeyError as error:
            raise UnknownKey(f"no API key with the id {key_id!r:.80}") from error

    def keys(self, tenant: str) -> list[Key]:
        """The keys of a tenant, valid or not, oldest first; raises UnknownTenant."""
        self.tenant(tenant)
        own = (known.key for known in self._view.keys.values() if known.key.tenant == tenant)
        return sorted(own, key=lambda key: (key.created, key.id))

    def create_tenant(self, asker: Principal, name: str, quotas: Quotas) -> Tenant:
        """Make a tenant. Raises InvalidRequest, TenantExists or StorageError."""
        check_tenant_name(name, "name")
        with self._change(asker) as change:
            if _find_tenant(change.connection, name) is not None:
                raise TenantExists(f"a tenant {name!r} exists already")
            row = {"name": name, "created": self._clock(), "quotas": quotas.stored()}
            statement = insert(tenants).values(row).returning(tenants.c.id)
            tenant_id = change.connection.execute(statement).scalar_one()
            change.record("create", "tenant", tenant_id, detail=_detail(name, quotas))
        return self.tenant(name)

    def change_tenant(
        self,
        asker: Principal,
        name: str,
        *,
        quotas: Mapping[str, int | None] | None = None,
        disabled: bool | None = None,
    ) -> Tenant:
        """Change some of a tenant's quotas, or whether its keys are refused.

        Raises UnknownTenant, InvalidRequest or StorageError.
        """
        if disabled and name == DEFAULT_TENANT:
            raise InvalidRequest(f"the tenant {name} cannot be disabled", "disabled")
        with self._change(asker) as change:
            row = _find_tenant(change.connection, name)
            if row is None:
                raise UnknownTenant(f"no tenant {name!r:.80}")
            wanted = Quotas.read(row.quotas).changed(quotas or {})
            off = row.disabled if disabled is None else disabled
            if (wanted.stored(), off) != (row.quotas, row.disabled):
                statement = update(tenants).where(tenants.c.id == row.id)
                change.connection.execute(statement.values(quotas=wanted.stored(), disabled=off))
                detail = _detail(name, wanted, disabled=off)
                change.record("change", "tenant", row.id, detail=detail)
        return self.tenant(name)

    def create_key(
        self,
        asker: Principal,
        tenant: str,
        role: Role,
        *,
        label: str = "",
        lifetime: float | None = None,
    ) -> NewKey:
        """Make a key, for `lifetime` seconds or without an end.

        Raises UnknownTenant, InvalidRequest or StorageError.
        """
        if len(label) > MOST_LABEL or not label.isprintable():
            raise InvalidRequest(f"a label has at most {MOST_LABEL} printable characters", "label")
        with self._change(asker) as change:
            row = _find_tenant(change.connection, tenant)
            if row is None:
                raise UnknownTenant(f"no tenant {tenant!r:.80}")
            key_id, secret = self._insert(change, row.id, role, label, lifetime)
        return NewKey(self.key(key_id), secret)

    def rotate_key(self, asker: Principal, key_id: str, grace: float = 0) -> NewKey:
        """Make a key like another one, whose time ends in `grace` seconds, or now.

        The new key lives as long as the old one was made for. Raises UnknownKey, InvalidRequest
        where the old one is not valid any more, or StorageError.
        """
        with self._change(asker) as change:
            row, now = _find_key(change.connection, key_id), self._clock()
            if row.revoked is not None or (row.expires is not None and row.expires <= now):
                raise InvalidRequest("the key is revoked or has expired: make a new one")
            lifetime = None if row.expires is None else row.expires - row.created
            made, secret = self._insert(
                change, row.tenant_id, Role(row.role), row.label, lifetime, f"after {key_id}"
            )
            if grace:
                end = now + grace if row.expires is None else min(row.expires, now + grace)
                values = {"expires": end}
            else:
                values = {"revoked": now}
            change.connection.execute(update(keys).where(keys.c.id == key_id).values(values))
            change.record("rotate", "key", key_id, detail=f"to {made}")
        return NewKey(self.key(made), secret)

    def revoke_key(self, asker: Principal, key_id: str) -> Key:
        """Refuse a key from now on, for good. Raises UnknownKey or StorageError."""
        with self._change(asker) as change:
            if _find_key(change.connection, key_id).revoked is None:
                statement = update(keys).where(keys.c.id == key_id)
                change.connection.execute(statement.values(revoked=self._clock()))
                change.record("revoke", "key", key_id)
        return self.key(key_id)

    @contextmanager
    def _change(self, asker: Principal) -> Iterator[Change]:
        """A change of the database that is in memory too when the context ends.

        Memory gets what the transaction itself read: nothing that can fail follows the commit.
        """
        with self._database.change(asker) as change:
            yield change
            view = _read(change.connection, change.revision)
        with self._replacing:
            if view.revision > self._view.revision:
                self._view = view

    def _insert(
        self,
        change: Change,
        tenant_id: int,
        role: Role,
        label: str,
        lifetime: float | None,
        detail: str | None = None,
    ) -> tuple[str, str]:
        key_id, secret = make_key()
        now = self._clock()
        row = {
            "id": key_id,
            "tenant_id": tenant_id,
            "role": role.value,
            "label": label,
            "digest": digest(secret),
            "created": now,
            "expires": None if lifetime is None else now + lifetime,
        }
        change.connection.execute(insert(keys), row)
        change.record("create", "key", key_id, detail=detail)
        return key_id, secret

    def _is_valid(self, view: _View, key: Key) -> bool:
        # A clock that is set back brings no expired key to life again.
        now = max(self._clock(), self._begun + time.monotonic())
        expired = key.expires is not None and key.expires <= now
        return key.revoked is None and not expired and not view.tenants[key.tenant].disabled


def _read(connection: Connection, revision: int) -> _View:
    named = {row.id: _tenant(row) for row in connection.execute(select(tenants))}
    known = [_known(row, named) for row in connection.execute(select(keys))]
    return _View(
        revision,
        {tenant.name: tenant for tenant in sorted(named.values(), key=lambda each: each.name)},
        {each.key.id: each for each in known},
    )


def _tenant(row: Row[Any]) -> Tenant:
    return Tenant(row.id, row.name, row.created, Quotas.read(row.quotas), row.disabled)


def _known(row: Row[Any], named: Mapping[int, Tenant]) -> _Known:
    key = Key(
        id=row.id,
        tenant=named[row.tenant_id].name,
        role=Role(row.role),
        label=row.label,
        created=row.created,
        expires=row.expires,
        revoked=row.revoked,
    )
    return _Known(key, row.digest)


def _find_tenant(connection: Connection, name: str) -> Any:
    return connection.execute(select(tenants).where(tenants.c.name == name)).one_or_none()


def _find_key(connection: Connection, key_id: str) -> Any:
    row = connection.execute(select(keys).where(keys.c.id == key_id)).one_or_none()
    if row is None:
        raise UnknownKey(f"no API key with the id {key_id!r:.80}")
    return row


def _detail(name: str, quotas: Quotas, **others: object) -> str:
    return json.dumps({"name": name, "quotas": quotas.stored(), **others})
