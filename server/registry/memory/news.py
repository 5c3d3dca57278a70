"""What has changed in the database since the index was read."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, select

from polyrex.server.registry.schema import audit

from .index import Entry, Index, load_entries

_MOST_BEHIND = 10_000  # revisions; beyond, reading everything anew is sooner done


class AuditRow(NamedTuple):
    """A change of the registry, as whoever follows it is told."""

    revision: int
    change: str  # the transaction
    action: str
    subject: str  # task, tenant or key
    subject_id: str
    version: int | None


_CHANGES = (
    select(*(audit.c[name] for name in AuditRow._fields))
    .where(audit.c.revision.between(bindparam("first"), bindparam("last")))
    .order_by(audit.c.revision)
)


class Position(NamedTuple):
    """How far an index has been read."""

    revision: int = -1
    change: str = ""  # the transaction that made this revision

    def news(self, connection: Connection, revision: int, inventory_sha256: str) -> News:
        """All that has changed from here to a revision; raises what the database raises."""
        changes = self._changes(connection, revision)
        if changes is None:
            last = select(audit.c.change).where(audit.c.revision == revision)
            index = Index()
            index.put(load_entries(connection, inventory_sha256))
            change = connection.execute(last).scalar_one_or_none() or ""
            return News(Position(revision, change), index=index)
        if not changes:
            return News(self)
        ids = {int(change.subject_id) for change in changes if change.subject == "task"}
        found = list(load_entries(connection, inventory_sha256, ids)) if ids else []
        return News(Position(revision, changes[-1].change), changes, ids, found)

    def is_far_from(self, revision: int) -> bool:
        """Whether what lies between is too much to be followed, so that all must be read anew."""
        return not 0 <= self.revision <= revision <= self.revision + _MOST_BEHIND

    def _changes(self, connection: Connection, revision: int) -> list[AuditRow] | None:
        """The rows of the audit from here on; None where all must be read anew."""
        if self.is_far_from(revision):
            return None
        between = {"first": self.revision, "last": revision}
        found = [AuditRow(*row) for row in connection.execute(_CHANGES, between)]
        ours = [row.change for row in found if row.revision == self.revision]
        if ours != ([self.change] if self.change else []):
            return None  # the database was restored from a copy, and has changed since
        news = found[len(ours) :]
        return news if len(news) == revision - self.revision else None


@dataclass(frozen=True)
class News:
    """What an index needs to reach a position: changes of it, or a whole new index."""

    position: Position
    changes: Sequence[AuditRow] = ()
    ids: Set[int] = frozenset()  # of tasks that changed
    entries: Sequence[Entry] = ()  # those that are live
    index: Index | None = None

    def apply(self, index: Index) -> Index:
        """The index with the news: a new one, or the same one changed."""
        if self.index is not None:
            return self.index
        gone = self.ids - {entry.id for entry in self.entries}
        index.put(self.entries, gone)
        for task_id in gone:
            index.versions.forget(task_id)
        for change in self.changes:
            if change.action == "prune":
                index.versions.forget(int(change.subject_id), change.version)
        return index
