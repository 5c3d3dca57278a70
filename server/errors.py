"""The server's own errors, and the one place where any error becomes an HTTP response.

PolyrexError (adapters/errors.py)
└── ServerError
    ├── InvalidRequest       400: a field is wrong; `param` names it
    ├── AuthenticationError  401
    ├── TooLarge             413
    ├── Overloaded           429, with Retry-After
    ├── EngineError          500: this request failed in the engine; others go on
    └── EngineStopped        503: the engine is down or shutting down
"""

from __future__ import annotations

from polyrex.adapters.errors import PolyrexError


class ServerError(PolyrexError):
    """Root of what the server raises."""


class InvalidRequest(ServerError):
    """A request that cannot be served as it is; `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class AuthenticationError(ServerError):
    """No API key, or none that is known."""


class TooLarge(ServerError):
    """The body is larger than the server takes."""


class Overloaded(ServerError):
    """Too many requests wait already."""


class EngineError(ServerError):
    """The engine failed on this request."""


class EngineStopped(ServerError):
    """The engine is not running."""
