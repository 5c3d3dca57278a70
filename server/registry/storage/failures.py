"""What clients and operators are told when the database fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, TimeoutError

from polyrex.server.errors import InvalidRequest, StorageError, StorageFull

logger = logging.getLogger(__name__)

OUTCOME_UNKNOWN = (
    "the registry's database failed while it committed the change, so it is not known whether it "
    "has happened; ask again with the same Idempotency-Key, or look"
)
_FULL_IN_POSTGRESQL = "53100"
_FULL_IN_SQLITE = "SQLITE_FULL"


class Access(Enum):
    """What is done with a registry."""

    reading = "read"
    writing = "written"
    following = "followed"


@dataclass(frozen=True)
class Health:
    """Whether the database works, why not, and since when (unix time)."""

    ok: bool
    reason: str
    since: float


class Watch:
    """Keeps a database's health by what its users find, and logs every turn of it once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reasons: dict[Access, str] = {}
        self._health = Health(True, "", time.time())

    @property
    def health(self) -> Health:
        return self._health

    def fails(self, access: Access) -> bool:
        """Whether the last transaction of this kind failed."""
        return access in self._reasons

    @contextmanager
    def over(self, access: Access) -> Iterator[None]:
        """Turn the database's errors within into StorageError or StorageFull, and note them.

        A value that the database cannot hold becomes InvalidRequest: a client has sent it.
        """
        try:
            yield
        except IntegrityError:  # the statement is at fault
            raise
        except DataError as error:
            raise InvalidRequest("the request has a value that cannot be stored") from error
        except (DBAPIError, TimeoutError) as error:
            failure = _failure(error)
            self._note(access, f"{_reason(error)}", error)
            raise failure from error
        except StorageError as error:
            self._note(access, str(error), error)
            raise
        self._note(access, None)

    def follows(self, error: Exception | None) -> None:
        """Note that the registry could be followed, or what prevented it."""
        self._note(Access.following, None if error is None else type(error).__name__, error)

    def _note(self, access: Access, reason: str | None, error: Exception | None = None) -> None:
        if reason is None and access not in self._reasons:
            return
        with self._lock:
            if reason is None:
                self._reasons.pop(access, None)
            else:
                self._reasons[access] = f"the registry cannot be {access.value}: {reason}"
            before, ok = self._health, not self._reasons
            text = "; ".join(self._reasons.values())
            self._health = Health(ok, text, before.since if ok is before.ok else time.time())
        if before.ok and not ok:
            logger.error("%s", text, exc_info=error)
        elif ok and not before.ok:
            logger.info("the registry's database works again")


def _failure(error: DBAPIError | TimeoutError) -> StorageError:
    """The error that a client is told, without statements, values or paths."""
    if _is_full(error):
        return StorageFull("the registry's database is full; nothing has changed")
    return StorageError("the registry's database does not work now; nothing has changed")


def _reason(error: DBAPIError | TimeoutError) -> str:
    if _is_full(error):
        return "no space is left"
    if isinstance(error, TimeoutError):
        return "every connection is in use"
    return type(error.orig).__name__


def _is_full(error: DBAPIError | TimeoutError) -> bool:
    if isinstance(error, TimeoutError):
        return False
    code = getattr(error.orig, "sqlite_errorname", None) or getattr(error.orig, "sqlstate", None)
    return code in (_FULL_IN_SQLITE, _FULL_IN_POSTGRESQL)
