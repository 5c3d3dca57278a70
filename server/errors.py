"""The server's own errors, and the one place where any error becomes an HTTP response.

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
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from polyrex.adapters.errors import (
    FileError,
    InvalidTaskName,
    InventoryMismatch,
    PolyrexError,
    TaskExists,
    UnknownTask,
)

logger = logging.getLogger(__name__)


class ServerError(PolyrexError):
    """Root of what the server raises."""


class StartError(ServerError):
    """The server cannot start as it was asked to."""


class InvalidRequest(ServerError):
    """A request that cannot be served as it is; `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class AuthenticationError(ServerError):
    """No API key, or none that is known."""


class UnknownModel(ServerError):
    """The field `model` names neither the base model nor a task."""

    param = "model"


class TooLarge(ServerError):
    """The body is larger than the server takes."""


class HeadersTooLarge(ServerError):
    """The headers are larger, or more, than the server takes."""


class UnsupportedBody(ServerError):
    """The body is of a type that this route does not read."""


class Overloaded(ServerError):
    """Too many requests wait already."""


class ClientDisconnected(ServerError):
    """The client went away before it had its answer."""


class EngineError(ServerError):
    """The engine failed on this request."""


class FitFailed(ServerError):
    """The worker could not fit a task."""


class TaskDamaged(ServerError):
    """A registered task's file can no longer be read."""


class EngineStopped(ServerError):
    """The engine is not running."""


class _Answer(NamedTuple):
    status: int
    type: str
    code: str
    headers: Mapping[str, str] = {}  # a mapping that nobody can change


_RETRY = {"Retry-After": "1"}
_ANSWERS: Mapping[type[Exception], _Answer] = {
    InvalidRequest: _Answer(400, "invalid_request_error", "invalid_request"),
    InvalidTaskName: _Answer(400, "invalid_request_error", "invalid_task_name"),
    AuthenticationError: _Answer(
        401, "authentication_error", "invalid_api_key", {"WWW-Authenticate": "Bearer"}
    ),
    UnknownTask: _Answer(404, "not_found_error", "task_not_found"),
    UnknownModel: _Answer(404, "not_found_error", "model_not_found"),
    TaskExists: _Answer(409, "conflict_error", "task_exists"),
    InventoryMismatch: _Answer(409, "conflict_error", "inventory_mismatch"),
    TooLarge: _Answer(413, "invalid_request_error", "body_too_large", {"Connection": "close"}),
    UnsupportedBody: _Answer(415, "invalid_request_error", "unsupported_media_type"),
    FileError: _Answer(422, "invalid_request_error", "invalid_router"),
    Overloaded: _Answer(429, "overloaded_error", "overloaded", _RETRY),
    HeadersTooLarge: _Answer(
        431, "invalid_request_error", "headers_too_large", {"Connection": "close"}
    ),
    ClientDisconnected: _Answer(499, "invalid_request_error", "client_disconnected"),
    EngineError: _Answer(500, "server_error", "engine_error"),
    FitFailed: _Answer(500, "server_error", "fit_failed"),
    TaskDamaged: _Answer(500, "server_error", "task_damaged"),
    EngineStopped: _Answer(503, "server_error", "engine_stopped", _RETRY),
}
_UNEXPECTED = _Answer(500, "server_error", "internal_error")


def error_body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception) -> JSONResponse:
    """The HTTP response of any error; what was not raised on purpose tells nothing of itself."""
    answer = next((_ANSWERS[cls] for cls in type(error).__mro__ if cls in _ANSWERS), _UNEXPECTED)
    message = "the server failed on this request" if answer is _UNEXPECTED else str(error)
    body = error_body(message, answer.type, getattr(error, "param", None), answer.code)
    return JSONResponse(body, answer.status, answer.headers)


def invalid_fields(errors: Sequence[Any]) -> InvalidRequest:
    """The error of a body that is not as protocol.py wants it: the first field that is wrong.

    `errors` as pydantic lists them. Of a field that may have several types, the error of the type
    that came nearest is told.
    """
    deepest = max(errors, key=lambda e: (len(e["loc"]), e["type"] not in ("string_type",)))
    place = [str(part) for part in deepest["loc"] if part != "body"]
    first = place[0] if place else None
    if deepest["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field {'.'.join(place)!r:.200}", first)
    if deepest["type"] == "missing":
        return InvalidRequest(f"{first or 'the body'} is missing", first)
    if deepest["type"] == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {deepest['ctx']['error']}")
    reason = str(deepest["msg"]).removeprefix("Value error, ")
    if not place:
        return InvalidRequest(f"the body: {reason}")
    return InvalidRequest(f"{first}: {reason}", first)


def install_error_handlers(app: FastAPI) -> None:
    """Let every error of the app be answered by `error_response`."""

    async def polyrex_error(_request: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    async def wrong_body(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(invalid_fields(error.errors()))

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        known = {404: f"no route {request.url.path!r:.200}", 405: "method not allowed here"}
        message = known.get(error.status_code, str(error.detail))
        code = HTTPStatus(error.status_code).name.lower()
        body = error_body(message, "invalid_request_error", None, code)
        return JSONResponse(body, error.status_code, error.headers)

    app.add_exception_handler(PolyrexError, polyrex_error)
    app.add_exception_handler(RequestValidationError, wrong_body)
    app.add_exception_handler(HTTPException, http_error)
    # Starlette answers with this one and raises the error again, so that uvicorn logs it.
    app.add_exception_handler(Exception, polyrex_error)
