"""The server's own errors.

PolyrexError (adapters/errors.py)
└── ServerError
    ├── StartError           the server cannot start: the command line prints it and exits
    ├── InvalidRequest       400: a field is wrong; `param` names it
    ├── AuthenticationError  401
    ├── Forbidden            403: the key's role may not do this
    ├── QuotaExceeded        403: the tenant has as many tasks, or bytes, as it may have
    ├── UnknownModel         404: neither the base model nor a task
    ├── UnknownTenant        404
    ├── UnknownKey           404
    ├── TenantExists         409
    ├── PreconditionFailed   412: the task has changed since the client looked
    ├── IdempotencyMismatch  422: an Idempotency-Key comes again, with another request
    ├── TooLarge             413: the body
    ├── HeadersTooLarge      431
    ├── UnsupportedBody      415
    ├── Overloaded           429, with Retry-After
    │   └── RateLimited      429: the tenant's requests or tokens of this minute are used up
    ├── ClientDisconnected   499: nobody is left to read the answer
    ├── EngineError          500: this request failed in the engine; others go on
    ├── FitFailed            500: the worker could not fit a task
    ├── TaskDamaged          500: the task's file is not what was registered
    ├── StorageError         503: the registry's database failed; nothing has changed
    │   └── StorageFull      507: it is full
    ├── RevisionNotReached   503: this replica does not know the revision yet that was asked for
    └── EngineStopped        503: the engine is starting, down or shutting down

Engines raise these without importing FastAPI; http/error_handlers.py turns them into responses.
"""

from __future__ import annotations

from collections.abc import Mapping

from polyrex.adapters.errors import PolyrexError


class ServerError(PolyrexError):
    """Root of the errors that the server raises."""


class StartError(ServerError):
    """The server cannot start with these settings."""


class InvalidRequest(ServerError):
    """The request cannot be served as it stands; `param` names the wrong field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class AuthenticationError(ServerError):
    """The request carries no API key, or an unknown one."""


class Forbidden(ServerError):
    """The key's role may not do this."""


class QuotaExceeded(ServerError):
    """The tenant has as many tasks, or bytes of them, as it may have."""


class PreconditionFailed(ServerError):
    """The task has changed since the client looked at it."""


class IdempotencyMismatch(ServerError):
    """An Idempotency-Key was used before, for another request."""


class UnknownModel(ServerError):
    """The field `model` names neither the base model nor a task."""

    param = "model"


class UnknownTenant(ServerError):
    """No tenant has this name."""


class UnknownKey(ServerError):
    """No API key has this id."""


class TenantExists(ServerError):
    """The name is taken by another tenant."""


class TooLarge(ServerError):
    """The body is larger than the server accepts."""


class HeadersTooLarge(ServerError):
    """The headers are more, or larger, than the server accepts."""


class UnsupportedBody(ServerError):
    """This route does not read bodies of this content type."""


class Overloaded(ServerError):
    """Too many requests are under way already."""


class RateLimited(Overloaded):
    """The tenant has used up its requests or tokens; `retry_after` seconds, and there are more.

    `headers` say what is left of each quota.
    """

    def __init__(self, message: str, retry_after: int, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.headers = headers


class ClientDisconnected(ServerError):
    """The client disconnected before it had its answer."""


class EngineError(ServerError):
    """The engine failed on this request."""


class FitFailed(ServerError):
    """The worker could not fit a task."""


class TaskDamaged(ServerError):
    """A registered task's file can no longer be read."""


class StorageError(ServerError):
    """The registry's database failed; what was asked for has not happened."""


class StorageFull(StorageError):
    """The registry's database has no room left."""


class RevisionNotReached(ServerError):
    """This replica has not seen the revision that the client asked for."""


class EngineStopped(ServerError):
    """The engine is not running."""
