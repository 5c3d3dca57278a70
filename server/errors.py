"""The server's own errors.

PolyrexError (adapters/errors.py)
└── ServerError
    ├── StartError           the server cannot start: the command line prints it and exits
    ├── InvalidRequest       400: a field is wrong; `param` names it
    ├── AuthenticationError  401
    ├── UnknownModel         404: neither the base model nor a task
    ├── TooLarge             413: the body
    ├── HeadersTooLarge      431
    ├── UnsupportedBody      415
    ├── Overloaded           429, with Retry-After
    ├── ClientDisconnected   499: nobody is left to read the answer
    ├── EngineError          500: this request failed in the engine; others go on
    ├── FitFailed            500: the worker could not fit a task
    ├── TaskDamaged          500: the task's file is not what was registered
    └── EngineStopped        503: the engine is starting, down or shutting down

Engines raise these without importing FastAPI; http/error_handlers.py turns them into responses.
"""

from __future__ import annotations

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


class UnknownModel(ServerError):
    """The field `model` names neither the base model nor a task."""

    param = "model"


class TooLarge(ServerError):
    """The body is larger than the server accepts."""


class HeadersTooLarge(ServerError):
    """The headers are more, or larger, than the server accepts."""


class UnsupportedBody(ServerError):
    """This route does not read bodies of this content type."""


class Overloaded(ServerError):
    """Too many requests are under way already."""


class ClientDisconnected(ServerError):
    """The client disconnected before it had its answer."""


class EngineError(ServerError):
    """The engine failed on this request."""


class FitFailed(ServerError):
    """The worker could not fit a task."""


class TaskDamaged(ServerError):
    """A registered task's file can no longer be read."""


class EngineStopped(ServerError):
    """The engine is not running."""
