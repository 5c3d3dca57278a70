"""The task registry: tasks of all tenants in a database, and an index of them in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType

from sqlalchemy import ColumnElement, Connection, and_, func, or_, select

from polyrex.adapters.errors import UnknownTask
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.router import read_router
from polyrex.adapters.files.task import TaskVersion
from polyrex.server.config import RegistryConfig
from polyrex.server.errors import InvalidRequest, RevisionNotReached, StorageError

from .database import Change, Database
from .memory.canary_counts import CanaryCounts
from .memory.follow import Follower
from .memory.index import Index
from .memory.news import AuditRow, News, Position
from .names import Reference, check_labels, check_task_name
from .principal import Principal, Role
from .records import TaskPage, TaskRecord, VersionRecord
from .registration import Registered, Registration, check_before, check_text, register_in
from .routers import read_version
from .rows import (
    Expected,
    is_live,
    load_task,
    load_tasks,
    load_versions,
    select_task,
    selected_version,
    visible_task,
)
from .schema import state, tasks, tenants, versions

logger = logging.getLogger(__name__)

_DEFAULTS = RegistryConfig()
_NONE_REJECTED: Mapping[str, str] = MappingProxyType({})


class TaskRegistry:
    """The tasks of one server; every method may be called from any thread.

    Tasks are found in memory, and routers that were used lately; everything else is read from the
    database. `rejected` are files that could not be taken over: path -> reason.
    """

    def __init__(
        self,
        database: Database,
        inventory: Inventory,
        config: RegistryConfig = _DEFAULTS,
        rejected: Mapping[str, str] = _NONE_REJECTED,
    ) -> None:
        """Load the index. Raises StorageError."""
        self.database = database
        self.inventory = inventory
        self.rejected = rejected
        self.canary_counts = CanaryCounts()
        self.config = config
        self._reached = threading.Condition()
        self._catching_up = threading.Lock()
        self._position = Position()
        self._index = Index()
        self._listeners: list[Callable[[Sequence[AuditRow]], None]] = []
        self._follower = Follower(database, self.catch_up)
        self.catch_up()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def revision(self) -> int:
        """The revision that the index has reached."""
        return self._position.revision

    def start(self) -> None:
        """Begin to follow what others change in the database."""
        self._follower.start()

    def close(self) -> None:
        """Stop following, and close the database."""
        self._follower.stop()
        self.database.close()

    def on_change(self, listener: Callable[[Sequence[AuditRow]], None]) -> None:
        """Call `listener` with the changes that the index takes, before they are acknowledged.

        No rows at all mean that anything may have changed.
        """
        self._listeners.append(listener)

    def pin(self, asker: Principal, name: str, *, sticky: str | None = None) -> TaskVersion:
        """The version that answers a request for a task: valid for whoever holds it.

        A canary answers the same users (`sticky`) again. Raises UnknownTask, InventoryMismatch
        where the version was made for another inventory, TaskDamaged, or StorageError where the
        router has to be read and cannot be.
        """
        reference = Reference.parse(name)
        found = self._pin(asker, reference, sticky)
        if found is None:  # it may have been pruned by a server that knew of a newer one
            self.catch_up()
            found = self._pin(asker, reference, sticky)
        if found is None:
            raise UnknownTask
        return found

    def pin_cached(
        self, asker: Principal, name: str, *, sticky: str | None = None
    ) -> TaskVersion | None:
        """As `pin`, from memory alone; None where the database has to be asked."""
        return self._pin(asker, Reference.parse(name), sticky, cached=True)

    def _pin(
        self, asker: Principal, reference: Reference, sticky: str | None, *, cached: bool = False
    ) -> TaskVersion | None:
        index = self._index  # one for all that follows: a reload exchanges it
        entry = index.find(asker, reference)
        number = entry.select(reference.selector, sticky)
        if number > entry.last_version:
            raise UnknownTask
        found = index.versions.get(entry.id, number)
        if found is None and not cached:
            with self.database.read() as connection:
                found = read_version(connection, entry, number, self.inventory)
            if found is not None:
                index.versions.put(entry.id, found)
        if found is not None and entry.canary is not None and reference.selector is None:
            self.canary_counts.count(entry, number)
        return found

    def find(self, asker: Principal, name: str, *, deleted: bool = False) -> TaskRecord:
        """A task as the database has it; with `deleted`, also one that can be undeleted.

        Raises UnknownTask, also where the name selects a version that is not there.
        """
        reference = Reference.parse(name)
        with self.database.read() as connection:
            row = visible_task(connection, asker, reference, deleted=deleted)
            if reference.selector is not None:
                selected_version(connection, row, reference)
            found = load_task(connection, row.id)
        if found is None:
            raise UnknownTask
        return found

    def version(self, asker: Principal, name: str) -> VersionRecord:
        """The version that a name selects, or the task's current one; raises UnknownTask."""
        reference = Reference.parse(name)
        with self.database.read() as connection:
            row = visible_task(connection, asker, reference)
            return selected_version(connection, row, reference)

    def versions(self, asker: Principal, name: str) -> list[VersionRecord]:
        """The versions of a task that are kept, in their order; raises UnknownTask."""
        reference = Reference.parse(name)
        with self.database.read() as connection:
            row = visible_task(connection, asker, reference, deleted=True)
            return load_versions(connection, row.id)

    def page(
        self,
        asker: Principal,
        *,
        text: str | None = None,
        labels: Mapping[str, str] = MappingProxyType({}),
        deleted: bool = False,
        after: str | None = None,
        limit: int = 100,
    ) -> TaskPage:
        """The asker's own tasks in the order of their names, beginning behind the name `after`.

        `text` must be in the name or the description, whatever the case; `deleted`: only tasks
        that can be undeleted. Raises InvalidRequest where no task could have these labels, or this
        text.
        """
        check_labels(labels)
        for param, given in (("q", text), ("after", after)):
            if given is not None and "\0" in given:  # PostgreSQL's text has none
                raise InvalidRequest(f"{param} holds a NUL character", param)
        wanted = [tenants.c.name == asker.tenant, _in_state(deleted=deleted)]
        wanted += [tasks.c.labels[key].as_string() == value for key, value in labels.items()]
        if after is not None:
            wanted.append(tasks.c.name > after)
        if text is not None:
            wanted.append(_has_text(text))
        statement = select_task().where(*wanted).order_by(tasks.c.name).limit(limit + 1)
        with self.database.read() as connection:
            rows = connection.execute(statement).all()
            found = load_tasks(connection, rows[:limit])
        return TaskPage(tuple(found), len(rows) > limit)

    def models(self, asker: Principal, after: str | None, limit: int) -> list[tuple[str, float]]:
        """Names that the asker may use as models, with the times when the tasks were made.

        Own tasks come first, then those shared with the asker as `tenant:name`; tasks that this
        server's inventory cannot serve are left out. From memory.
        """
        return self._index.names(asker, after, limit)

    def register(
        self,
        asker: Principal,
        name: str,
        data: bytes,
        *,
        replace: bool = False,
        expected: Expected = None,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Registered:
        """Register a router's file as the next version of a task; returns once it is served.

        The same bytes again change nothing, but repair what was damaged. Raises InvalidTaskName,
        FileError where the router is not one of this inventory, InvalidRequest for the labels,
        TaskExists where the name has another router and not `replace`, PreconditionFailed,
        IdempotencyMismatch, QuotaExceeded, or StorageError.
        """
        owner, plain = _owner(asker, name)
        check_labels(labels or {})
        source = f"router of task {plain}"
        router = read_router(data, source, self.inventory)
        check_text(router, source)
        wanted = Registration(
            tenant=owner,
            name=plain,
            data=data,
            router=router,
            replace=replace,
            expected=expected,
            labels=labels,
            idempotency_key=idempotency_key,
            keep_versions=self.config.keep_versions,
        )
        with self.change(asker) as change:
            return register_in(change, wanted)

    def check_registration(
        self,
        asker: Principal,
        name: str,
        *,
        replace: bool = False,
        expected: Expected = None,
        idempotency_key: str | None = None,
    ) -> None:
        """Raise what `register` would, as far as it is known before there is a router."""
        owner, plain = _owner(asker, name)
        with self.database.read() as connection:
            check_before(
                connection,
                owner,
                plain,
                replace=replace,
                expected=expected,
                idempotency_key=idempotency_key,
            )

    def wait_for(self, revision: int, timeout: float) -> None:
        """Wait until the index has a revision; raises RevisionNotReached."""
        if self.revision >= revision:
            return
        with self._reached:
            if not self._reached.wait_for(lambda: self.revision >= revision, timeout):
                raise RevisionNotReached(
                    f"this server is at revision {self.revision}, not at {revision} yet"
                )

    @contextmanager
    def change(self, asker: Principal) -> Iterator[Change]:
        """A change of the database that this server serves when the context ends.

        The index is read inside the transaction, so that nothing that can fail follows the commit.
        Where nothing was recorded, what others changed before is served at the end. Raises
        StorageError.
        """
        with ExitStack() as held:
            with self._begun(asker) as change:
                yield change
                if change.recorded:
                    held.enter_context(self._catching_up)
                    news = self._news(change.connection, change.revision)
            if not change.recorded:
                if change.revision > self.revision:
                    self.catch_up()
                return
            try:
                self._take(news)
            except StorageError:  # of a listener that read something else; the follower asks again
                logger.warning("the registry could not be followed beyond its own change")

    @contextmanager
    def _begun(self, asker: Principal) -> Iterator[Change]:
        """A change of the database, before which an index that is far behind catches up.

        Within the change, reading all anew would hold up the changes of every server.
        """
        with self.database.change(asker) as change:
            if not self._position.is_far_from(change.revision):
                yield change
                return
        self.catch_up()
        with self.database.change(asker) as change:
            yield change

    def catch_up(self) -> int:
        """Take what has changed in the database; returns the revision reached.

        Raises StorageError.
        """
        with self._catching_up:
            with self.database.read() as connection:
                revision = connection.execute(select(state.c.revision)).scalar_one()
                news = self._news(connection, revision)
            self._take(news)
            return self.revision

    def _news(self, connection: Connection, revision: int) -> News:
        return self._position.news(connection, revision, self.inventory.sha256)

    def _take(self, news: News) -> None:
        if news.position == self._position:
            return
        self._index = news.apply(self._index)
        with_canary = {entry.id for entry in news.entries if entry.canary is not None}
        self.canary_counts.forget(news.ids - with_canary)
        for listener in self._listeners:
            listener(news.changes)
        with self._reached:
            self._position = news.position
            self._reached.notify_all()


def _owner(asker: Principal, name: str) -> tuple[str, str]:
    """The tenant and the plain name under which a task is to be registered."""
    if ":" not in name:
        check_task_name(name)
        return asker.tenant, name
    reference = Reference.parse(name)
    owner = reference.tenant or asker.tenant
    if reference.selector is not None or (
        owner != asker.tenant and asker.role is not Role.server_admin
    ):
        raise UnknownTask
    return owner, reference.name


def _in_state(*, deleted: bool) -> ColumnElement[bool]:
    if not deleted:
        return is_live()
    return and_(tasks.c.current_version.is_not(None), tasks.c.deleted.is_not(None))


def _has_text(text: str) -> ColumnElement[bool]:
    described = (
        select(versions.c.task_id)
        .where(
            versions.c.task_id == tasks.c.id,
            versions.c.version == tasks.c.current_version,
            func.lower(versions.c.description).contains(text.lower(), autoescape=True),
        )
        .exists()
    )
    return or_(tasks.c.name.contains(text.lower(), autoescape=True), described)
