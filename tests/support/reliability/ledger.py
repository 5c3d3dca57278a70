"""What clients sent and what was acknowledged, and whether a registry's database agrees."""

from __future__ import annotations

import hashlib
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlalchemy import Connection, Engine, create_engine, delete, select, update

from polyrex.server.registry.schema import audit, routers, state, tasks, versions


@dataclass
class Ledger:
    """The clients' side of the truth. May be used by several threads."""

    sent: dict[str, str] = field(default_factory=dict)  # sha256 -> task
    acknowledged: dict[tuple[str, int], str] = field(default_factory=dict)  # -> sha256
    refused: Counter[int] = field(default_factory=Counter)  # status -> number of requests
    twice: list[str] = field(default_factory=list)  # one version, acknowledged for two routers
    fresh: list[tuple[str, int, str]] = field(default_factory=list)  # nobody has checked them yet
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, task: str, router: bytes) -> str:
        """Note that a router is about to be sent; its sha256."""
        sha256 = hashlib.sha256(router).hexdigest()
        with self._lock:
            self.sent[sha256] = task
        return sha256

    def acknowledge(self, task: str, version: int, sha256: str) -> None:
        """Note an acknowledgement."""
        with self._lock:
            self.fresh.append((task, version, sha256))
            if self.acknowledged.setdefault((task, version), sha256) != sha256:
                self.twice.append(f"{task}@{version} was acknowledged for two routers")

    def take_fresh(self) -> list[tuple[str, int, str]]:
        """What was acknowledged since the last call."""
        with self._lock:
            fresh, self.fresh = self.fresh, []
            return fresh

    def refuse(self, status: int) -> None:
        """Note an answer that is no acknowledgement."""
        with self._lock:
            self.refused[status] += 1


@contextmanager
def reading(url: str) -> Iterator[Engine]:
    """Connections beside those of servers; SQLite's file is not locked against them."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        yield engine
    finally:
        engine.dispose()


def lose(engine: Engine, count: int) -> None:
    """Plant a defect: take the newest changes out of the database."""
    with engine.begin() as connection:
        last = connection.execute(select(state.c.revision)).scalar_one() - count
        connection.execute(delete(audit).where(audit.c.revision > last))
        connection.execute(update(state).values(revision=last))


@dataclass
class Examiner:
    """Follows the audit table, and compares it with the ledger: what was wrong is in `found`."""

    ledger: Ledger
    revision: int = 0  # the last that was read
    current: dict[str, tuple[int, str]] = field(default_factory=dict)  # task -> version, sha256
    stored: dict[tuple[str, int], str] = field(default_factory=dict)
    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _names: dict[str, str] = field(default_factory=dict)  # task id -> name

    def follow(self, engine: Engine) -> None:
        """Read what is new, and check that nothing acknowledged meanwhile is missing."""
        fresh = self.ledger.take_fresh()
        with engine.connect() as connection:
            self._read(connection)
        self._compare(fresh)

    def follow_again(self, engine: Engine) -> None:
        """Read the whole audit once more, and check everything that was ever acknowledged."""
        self.revision = 0
        self.current.clear()
        self.stored.clear()
        with engine.connect() as connection:
            self._read(connection)
        self._compare((*key, sha256) for key, sha256 in self.ledger.acknowledged.items())

    def _compare(self, acknowledged: Iterable[tuple[str, int, str]]) -> None:
        for task, version, sha256 in acknowledged:
            stored = self.stored.get((task, version))
            if stored != sha256:
                self._report("lost", f"{task}@{version} is {stored}, acknowledged {sha256}")
        for line in self.ledger.twice:
            self._report("lost", line)

    def _read(self, connection: Connection) -> None:
        last = connection.execute(select(state.c.revision)).scalar_one()
        rows = connection.execute(
            select(audit).where(audit.c.revision > self.revision).order_by(audit.c.revision)
        ).all()
        known = connection.execute(select(tasks.c.id, tasks.c.name)).all()
        self._names = {str(row.id): row.name for row in known}
        for row in rows:
            if row.revision != self.revision + 1:
                self._report("gaps", f"revision {row.revision} follows {self.revision}")
            self.revision = row.revision
            if row.subject == "task" and row.router_sha256 is not None:
                self._version(self._names[row.subject_id], row.version, row.router_sha256.hex())
        if last != self.revision:
            self._report("gaps", f"the registry is at {last}, its audit at {self.revision}")

    def _version(self, task: str, version: int, sha256: str) -> None:
        before = self.current.get(task, (0, ""))[0]
        if version != before + 1:
            self._report("gaps", f"{task}@{version} follows {task}@{before}")
        if self.ledger.sent.get(sha256) != task:
            self._report("invented", f"{task}@{version} is {sha256}, which nobody sent")
        self.current[task] = (version, sha256)
        self.stored[task, version] = sha256

    def _report(self, kind: str, what: str) -> None:
        if what not in self.found[kind]:
            self.found[kind].append(what)

    def unacknowledged(self) -> int:
        """How many versions are there that nobody was told of."""
        return len(self.stored.keys() - self.ledger.acknowledged.keys())

    def read_bytes(self, engine: Engine) -> int:
        """Check that the bytes of every version that is kept are what they should be."""
        with engine.connect() as connection:
            kept = connection.execute(
                select(tasks.c.name, versions.c.version, versions.c.router_sha256).join_from(
                    versions, tasks
                )
            ).all()
            wrong = {
                row.sha256
                for row in connection.execute(select(routers).execution_options(yield_per=1000))
                if hashlib.sha256(row.data).digest() != row.sha256
            }
            there = set(connection.execute(select(routers.c.sha256)).scalars())
        for row in kept:
            name, sha256 = f"{row.name}@{row.version}", row.router_sha256
            if sha256 in wrong or sha256 not in there:
                self._report("torn", f"the bytes of {name} are not {sha256.hex()}")
            if self.stored.get((row.name, row.version)) != sha256.hex():
                self._report("torn", f"{name} is {sha256.hex()}, not as its audit says")
        return len(kept)

    def sample(self, random_: random.Random, count: int) -> Iterable[str]:
        """Some of the tasks."""
        return random_.sample(sorted(self.current), min(count, len(self.current)))
