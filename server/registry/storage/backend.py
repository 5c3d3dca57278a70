"""What the registry needs of a kind of database."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError


class Backend(Protocol):
    """An open database."""

    engine: Engine
    reading: Mapping[str, Any]
    """Execution options of a connection that only reads."""
    writing: Mapping[str, Any]
    """Execution options of a connection that also writes."""

    def announce(self, connection: Connection, revision: int) -> None:
        """Within the transaction that makes a revision: tell whoever follows the registry."""

    def settle(self, connection: Connection, change: str, error: DBAPIError) -> bool:
        """After a COMMIT failed: see to it that the change is there for good, or not for good.

        Returns whether it is there. Raises StorageError where that cannot be found out.
        """

    def touch(self, connection: Connection) -> None:
        """Write something, within a transaction, that changes nothing of the registry."""

    def close(self) -> None:
        """Close every connection."""
