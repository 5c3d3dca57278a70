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
    ├── ReceiptTimeout       408: the rest of the request did not come in time
    ├── PreconditionFailed   412: the task has changed since the client looked
    ├── IdempotencyMismatch  422: an Idempotency-Key comes again, with another request
    ├── TooLarge             413: the body
    ├── HeadersTooLarge      431
    ├── UnsupportedBody      415
    ├── Overloaded           429, with Retry-After: the tenant has its share already
    │   ├── RateLimited      429: the tenant's requests or tokens of this minute are used up
    │   └── ServerFull       503: the server has no room, though the tenant has not its share
    ├── ClientDisconnected   499: nobody is left to read the answer
    ├── EngineError          500: this request failed in the engine; others go on
    │   └── EngineOutOfMemory 503: the step that it was part of needed more memory than there is
    ├── FitFailed            500: the worker could not fit a task
    ├── TaskDamaged          500: the task's file is not what was registered
    ├── StorageError         503: the registry's database failed; nothing has changed
    │   └── StorageFull      507: it is full
    ├── RevisionNotReached   503: this replica does not know the revision yet that was asked for
    ├── TooManyConnections   503
    ├── ShuttingDown         503: the server takes no more requests, or ends this one
    ├── DeadlineExceeded     504: the request took longer than the server, or its client, allows
    └── EngineStopped        503: the engine is starting, down or shutting down
        └── EngineRestarting 503: it has failed, and is started again

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


class ReceiptTimeout(ServerError):
    """The rest of the request did not arrive in time."""


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
    """Too many requests are under way already; `retry_after` seconds, and there may be room."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(Overloaded):
    """The tenant has used up its requests or tokens; `headers` say what is left of each quota."""

    def __init__(self, message: str, retry_after: int, headers: Mapping[str, str]) -> None:
        super().__init__(message, retry_after)
        self.headers = headers


class ServerFull(Overloaded):
    """The server has no room for a request, though the tenant that asks has not its share."""


class ClientDisconnected(ServerError):
    """The client disconnected before it had its answer."""


class EngineError(ServerError):
    """The engine failed on this request."""


class EngineOutOfMemory(EngineError):
    """The engine had too little memory for the step that the request was part of."""


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


class TooManyConnections(ServerError):
    """The server, or one client address, has as many connections as it may have."""


class ShuttingDown(ServerError):
    """The server takes no more requests, or ends those under way, because it is stopping."""


class DeadlineExceeded(ServerError):
    """The request has taken longer than the server, or its client, allows."""


class EngineStopped(ServerError):
    """The engine is not running."""


class EngineRestarting(EngineStopped):
    """The engine has failed, and is started again by the server itself."""
