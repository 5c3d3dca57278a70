"""The one place where any error becomes an HTTP response, in the shape of OpenAI's errors."""

from __future__ import annotations

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
from polyrex.server.errors import (
    AuthenticationError,
    ClientDisconnected,
    DeadlineExceeded,
    EngineError,
    EngineOutOfMemory,
    EngineStopped,
    FitFailed,
    Forbidden,
    HeadersTooLarge,
    IdempotencyMismatch,
    InvalidRequest,
    Overloaded,
    PreconditionFailed,
    QuotaExceeded,
    RateLimited,
    ReceiptTimeout,
    RevisionNotReached,
    ServerFull,
    ShuttingDown,
    StorageError,
    StorageFull,
    TaskDamaged,
    TenantExists,
    TooLarge,
    TooManyConnections,
    UnknownKey,
    UnknownModel,
    UnknownTenant,
    UnsupportedBody,
)
from polyrex.server.observability.requests import current_request

from .access import methods_of


class _Answer(NamedTuple):
    status: int
    type: str
    code: str
    headers: Mapping[str, str] = {}  # a Mapping: the default is shared and must not change


_RETRY = {"Retry-After": "1"}
_CLOSE = {**_RETRY, "Connection": "close"}
_ANSWERS: Mapping[type[Exception], _Answer] = {
    InvalidRequest: _Answer(400, "invalid_request_error", "invalid_request"),
    InvalidTaskName: _Answer(400, "invalid_request_error", "invalid_task_name"),
    AuthenticationError: _Answer(
        401, "authentication_error", "invalid_api_key", {"WWW-Authenticate": "Bearer"}
    ),
    Forbidden: _Answer(403, "permission_error", "forbidden"),
    QuotaExceeded: _Answer(403, "permission_error", "quota_exceeded"),
    UnknownTask: _Answer(404, "not_found_error", "task_not_found"),
    UnknownModel: _Answer(404, "not_found_error", "model_not_found"),
    UnknownTenant: _Answer(404, "not_found_error", "tenant_not_found"),
    UnknownKey: _Answer(404, "not_found_error", "key_not_found"),
    TenantExists: _Answer(409, "conflict_error", "tenant_exists"),
    TaskExists: _Answer(409, "conflict_error", "task_exists"),
    InventoryMismatch: _Answer(409, "conflict_error", "inventory_mismatch"),
    ReceiptTimeout: _Answer(
        408, "invalid_request_error", "request_timeout", {"Connection": "close"}
    ),
    PreconditionFailed: _Answer(412, "conflict_error", "precondition_failed"),
    TooLarge: _Answer(413, "invalid_request_error", "body_too_large", {"Connection": "close"}),
    UnsupportedBody: _Answer(415, "invalid_request_error", "unsupported_media_type"),
    FileError: _Answer(422, "invalid_request_error", "invalid_router"),
    IdempotencyMismatch: _Answer(422, "invalid_request_error", "idempotency_mismatch"),
    Overloaded: _Answer(429, "overloaded_error", "overloaded", _RETRY),
    ServerFull: _Answer(503, "overloaded_error", "server_full", _RETRY),
    RateLimited: _Answer(429, "rate_limit_error", "rate_limit_exceeded"),
    HeadersTooLarge: _Answer(
        431, "invalid_request_error", "headers_too_large", {"Connection": "close"}
    ),
    ClientDisconnected: _Answer(499, "invalid_request_error", "client_disconnected"),
    EngineError: _Answer(500, "server_error", "engine_error"),
    FitFailed: _Answer(500, "server_error", "fit_failed"),
    TaskDamaged: _Answer(500, "server_error", "task_damaged"),
    EngineOutOfMemory: _Answer(503, "server_error", "engine_out_of_memory", _RETRY),
    EngineStopped: _Answer(503, "server_error", "engine_stopped", _RETRY),
    TooManyConnections: _Answer(503, "overloaded_error", "too_many_connections", _CLOSE),
    ShuttingDown: _Answer(503, "server_error", "server_shutdown", _CLOSE),
    DeadlineExceeded: _Answer(504, "server_error", "deadline_exceeded"),
    RevisionNotReached: _Answer(503, "server_error", "revision_not_reached", _RETRY),
    StorageError: _Answer(503, "server_error", "storage_error", _RETRY),
    StorageFull: _Answer(507, "server_error", "storage_full"),
}
_UNEXPECTED = _Answer(500, "server_error", "internal_error")


def error_body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    """The JSON body of an error response."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer_to(error: type[Exception]) -> _Answer:
    """How errors of this type are answered."""
    return next((_ANSWERS[cls] for cls in error.__mro__ if cls in _ANSWERS), _UNEXPECTED)


def error_response(error: Exception) -> JSONResponse:
    """The response to any error. An unexpected error reveals nothing about itself."""
    answer = answer_to(type(error))
    current_request().error = answer.code  # for its log line and metrics
    message = "the server failed on this request" if answer is _UNEXPECTED else str(error)
    body = error_body(message, answer.type, getattr(error, "param", None), answer.code)
    headers = dict(answer.headers)
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, RateLimited):
        headers |= error.headers
    return JSONResponse(body, answer.status, headers)


_PLACES = ("query", "path", "header")  # where FastAPI says that a field is, if not in the body
_OBJECT_WANTED = ("model_type", "model_attributes_type", "dict_type")  # their texts name classes
_LONGEST = 300  # characters of what is said about a body, whatever is in it


def invalid_fields(errors: Sequence[Any]) -> InvalidRequest:
    """The error for a body that requests/bodies.py rejects; it names one wrong field.

    `errors` is pydantic's list. A field of a union type has one error for each member: the deepest
    one belongs to the member that the value matched most closely.
    """
    deepest = max(errors, key=lambda e: (len(e["loc"]), e["type"] not in ("string_type",)))
    place = [str(part) for part in deepest["loc"]]
    if place[:1] == ["body"] or (len(place) > 1 and place[0] in _PLACES):
        del place[0]
    first = place[0][:80] if place else None
    if deepest["type"] == "extra_forbidden":
        # What names a member of a union is no part of the body.
        path = [part for part in place[:-1] if "[" not in part] + place[-1:]
        return InvalidRequest(f"unknown field {'.'.join(path)!r:.200}", first)
    if deepest["type"] == "missing":
        return InvalidRequest(f"{first or 'the body'} is missing", first)
    reason = str(deepest["msg"]).removeprefix("Value error, ")
    if deepest["type"] in _OBJECT_WANTED:
        reason = "Input should be an object"
    return InvalidRequest(f"{first or 'the body'}: {reason}"[:_LONGEST], first)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error that routes raise with `error_response`; request_log.py the unexpected."""

    async def polyrex_error(_request: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    async def wrong_body(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(invalid_fields(error.errors()))

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        known = {404: f"no route {request.scope['path']!r:.200}", 405: "method not allowed here"}
        message = known.get(error.status_code, str(error.detail))
        code = HTTPStatus(error.status_code).name.lower()
        body = error_body(message, "invalid_request_error", None, code)
        headers = dict(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(methods_of(request.scope))
        return JSONResponse(body, error.status_code, headers)

    app.add_exception_handler(PolyrexError, polyrex_error)
    app.add_exception_handler(RequestValidationError, wrong_body)
    app.add_exception_handler(HTTPException, http_error)
