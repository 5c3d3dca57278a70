"""The index of live tasks in memory: what a request needs to know of a task, and no more.

A hundred thousand entries take some 40 MB. rows.py decides the same in SQL.
"""

from __future__ import annotations

import hashlib
import random
import sys
import threading
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy import Connection, Executable, Row, select

from polyrex.adapters.errors import UnknownTask
from polyrex.server.registry.names import Reference
from polyrex.server.registry.principal import Principal, Role
from polyrex.server.registry.records import Canary
from polyrex.server.registry.rows import (
    ALIASES,
    ALIASES_OF,
    IS_CURRENT,
    OF_IDS,
    SHARES,
    SHARES_OF,
    is_live,
)
from polyrex.server.registry.schema import tasks, tenants, versions

from .cache import VersionCache

_LIVE = (
    select(
        tasks.c.id,
        tenants.c.name.label("tenant"),
        tasks.c.name,
        tasks.c.current_version,
        tasks.c.last_version,
        tasks.c.created,
        tasks.c.canary_version,
        tasks.c.canary_share,
        versions.c.inventory_sha256,
    )
    .select_from(tasks.join(tenants, tasks.c.tenant_id == tenants.c.id).join(versions, IS_CURRENT))
    .where(is_live())
    .order_by(tasks.c.tenant_id, tasks.c.name)
)
_LIVE_OF = _LIVE.where(tasks.c.id.in_(OF_IDS))


class Entry(NamedTuple):
    """A live task."""

    id: int
    tenant: str
    name: str
    version: int  # the current one
    last_version: int
    created: float
    servable: bool  # the current version was made for the server's inventory
    aliases: tuple[tuple[str, int], ...]
    canary: Canary | None
    shared_with: tuple[str, ...]

    def select(self, selector: int | str | None, sticky: str | None) -> int:
        """The version that answers a request; raises UnknownTask where an alias has none.

        Without a selector, the canary gets its share: the same requests again where `sticky` is
        the same.
        """
        if isinstance(selector, int):
            return selector
        if selector is None:
            return self._canary_or_current(sticky)
        for alias, version in self.aliases:
            if alias == selector:
                return version
        raise UnknownTask

    def _canary_or_current(self, sticky: str | None) -> int:
        if self.canary is None:
            return self.version
        drawn = random.random() if sticky is None else self._point(sticky)
        return self.canary.version if drawn < self.canary.share else self.version

    def _point(self, sticky: str) -> float:
        """A number in [0, 1) that looks random, and is the same for the same user and task."""
        digest = hashlib.sha256(f"{self.id}:{sticky}".encode()).digest()
        return int.from_bytes(digest[:6]) / (1 << 48)


class Index:
    """The live tasks by owner and name. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.versions = VersionCache()
        self._lock = threading.Lock()  # of what changes several of these at once
        self._by_id: dict[int, Entry] = {}
        self._own: dict[str, dict[str, Entry]] = {}
        self._names: defaultdict[str, list[str]] = defaultdict(list)  # of own tasks, sorted
        self._shared: defaultdict[str, list[str]] = defaultdict(list)  # `owner:name`, sorted

    def __len__(self) -> int:
        return len(self._by_id)

    def find(self, asker: Principal, reference: Reference) -> Entry:
        """The task that the asker means, and may use; raises UnknownTask."""
        entry = self._own.get(reference.tenant or asker.tenant, {}).get(reference.name)
        if entry is None or not (
            entry.tenant == asker.tenant
            or asker.role is Role.server_admin
            or asker.tenant in entry.shared_with
        ):
            raise UnknownTask
        return entry

    def put(self, entries: Iterable[Entry], gone: Iterable[int] = ()) -> None:
        """Take entries, new or changed, and forget tasks by their ids."""
        with self._lock:
            for task_id in gone:
                self._forget(task_id)
            for entry in entries:
                self._put(entry)

    def names(self, asker: Principal, after: str | None, limit: int) -> list[tuple[str, float]]:
        """Tasks that the asker may use and the server can, with the times when they were made.

        First his own in the order of their names, then those shared with him as `owner:name`,
        beginning behind the name `after`.
        """
        with self._lock:
            return list(islice(self._listed(asker.tenant, after), limit))

    def _listed(self, tenant: str, after: str | None) -> Iterator[tuple[str, float]]:
        among_shared = after is not None and ":" in after
        if not among_shared and tenant in self._own:
            own = self._own[tenant]
            for name in _behind(self._names[tenant], after):
                if own[name].servable:
                    yield name, own[name].created
        for full in _behind(self._shared.get(tenant, []), after if among_shared else None):
            owner, _, name = full.partition(":")
            if (entry := self._own[owner][name]).servable:
                yield full, entry.created

    def _put(self, entry: Entry) -> None:
        before = self._by_id.get(entry.id)
        self._by_id[entry.id] = entry
        self._own.setdefault(entry.tenant, {})[entry.name] = entry
        if before is None:
            insort(self._names[entry.tenant], entry.name)
        self._share(entry, set(before.shared_with) if before else set(), set(entry.shared_with))

    def _forget(self, task_id: int) -> None:
        entry = self._by_id.pop(task_id, None)
        if entry is not None:
            del self._own[entry.tenant][entry.name]
            _take_out(self._names[entry.tenant], entry.name)
            self._share(entry, set(entry.shared_with), set())

    def _share(self, entry: Entry, before: AbstractSet[str], now: AbstractSet[str]) -> None:
        full = f"{entry.tenant}:{entry.name}"
        for tenant in before - now:
            _take_out(self._shared[tenant], full)
        for tenant in now - before:
            insort(self._shared[tenant], full)


def load_entries(
    connection: Connection, inventory_sha256: str, ids: Collection[int] | None = None
) -> Iterator[Entry]:
    """The live ones of some tasks, or of all, in the order of their names."""
    every = ids is None
    of_ids = {} if ids is None else {"ids": list(ids)}
    named = _grouped(connection, ALIASES if every else ALIASES_OF, of_ids)
    shared = _grouped(connection, SHARES if every else SHARES_OF, of_ids)
    live = _LIVE.execution_options(yield_per=10_000) if every else _LIVE_OF
    for row in connection.execute(live, of_ids):
        canary = None
        if row.canary_version is not None:
            canary = Canary(row.canary_version, row.canary_share)
        yield Entry(
            id=row.id,
            tenant=sys.intern(row.tenant),
            name=row.name,
            version=row.current_version,
            last_version=row.last_version,
            created=row.created,
            servable=row.inventory_sha256 == inventory_sha256,
            aliases=tuple((alias.name, alias.version) for alias in named.get(row.id, ())),
            canary=canary,
            shared_with=tuple(share.tenant for share in shared.get(row.id, ())),
        )


def _grouped(
    connection: Connection, statement: Executable, parameters: Mapping[str, Any]
) -> dict[int, list[Row[Any]]]:
    """Rows by the id of their task, which is their first column."""
    found: dict[int, list[Row[Any]]] = {}
    for row in connection.execute(statement, parameters):
        found.setdefault(row[0], []).append(row)
    return found


def _behind(names: list[str], after: str | None) -> Iterator[str]:
    start = 0 if after is None else bisect_right(names, after)
    return (names[place] for place in range(start, len(names)))


def _take_out(names: list[str], name: str) -> None:
    del names[bisect_left(names, name)]
