"""What every route may answer: one table, for the OpenAPI document and its test.

A route that is not in the table keeps the document from being made. What the guard and the limits
answer, in front of every route, is said once (`FIRST`, `GUARD`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST

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
    DeadlineExceeded,
    EngineError,
    EngineOutOfMemory,
    EngineStopped,
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

from . import shapes

REVISION = "x-polyrex-revision"
REQUEST_ID = "x-request-id"
EVENTS = "text/event-stream"
NO_TYPE = ""
"""Text of which the answer does not say what it is, as vLLM has it."""
_ABOVE_0 = r"0{0,8}[1-9][0-9]{0,8}(\.[0-9]{1,6})?|0{1,9}\.0{0,5}[1-9][0-9]{0,5}"

HEADERS: Mapping[str, str] = {
    "ETag": "the task's revision, for If-Match",
    "Retry-After": "seconds after which the request may be sent again",
    "WWW-Authenticate": "`Bearer`",
    REQUEST_ID: "the request's name, as it came, or a new one",
    "cache-control": "no cache may keep the answer",
    REVISION: "the registry's revision, for x-polyrex-min-revision",
    "x-polyrex-task-version": "the version of the task that answers; absent for the base model",
    "x-ratelimit-limit-requests": "the tenant's requests a minute, where it has such a quota",
    "x-ratelimit-remaining-requests": "what is left of them",
    "x-ratelimit-reset-requests": "when there are as many again, as `12s`",
    "x-ratelimit-limit-tokens": "the tenant's tokens a minute, where it has such a quota",
    "x-ratelimit-remaining-tokens": "what is left of them",
    "x-ratelimit-reset-tokens": "when there are as many again, as `12s`",
}
"""What the headers of answers mean."""

PARAMETERS: Mapping[str, tuple[str, str]] = {
    REQUEST_ID: ("[A-Za-z0-9._-]{1,64}", "the request's name, in the answer and in logs"),
    "x-polyrex-timeout": (_ABOVE_0, "seconds that the client will wait"),
    "x-envoy-expected-rq-timeout-ms": (_ABOVE_0, "milliseconds that the client will wait"),
}
"""Headers that any request may have: the pattern of each, and what it means."""

RATE_LIMITS = tuple(name for name in HEADERS if name.startswith("x-ratelimit-"))


@dataclass(frozen=True)
class Success:
    """An answer that is no error: JSON of a shape, or text of a media type.

    `headers` always come, `may_have` sometimes. Where `streams`, it may be a stream of events.
    """

    description: str
    body: type[shapes.Shape] | str
    headers: tuple[str, ...] = ()
    may_have: tuple[str, ...] = ()
    streams: bool = False


Errors = tuple[type[PolyrexError], ...]


@dataclass(frozen=True)
class Answers:
    """The successes of a route by status, and the errors that it raises itself."""

    success: Mapping[int, Success]
    errors: Errors = ()


FIRST: Errors = (
    InvalidRequest,  # of the headers in PARAMETERS
    HeadersTooLarge,
    TooLarge,
    ReceiptTimeout,
    TooManyConnections,
    ShuttingDown,
    DeadlineExceeded,
)
"""What the limits in front of every route answer."""
GUARD: Errors = (AuthenticationError, Forbidden)
"""What the guard answers in front of every route but those that are open to anybody."""

_READ: Errors = (RevisionNotReached, StorageError)
_WRITE: Errors = (UnsupportedBody, Overloaded, StorageError, StorageFull)
_EDIT: Errors = (UnknownTask, PreconditionFailed, RevisionNotReached, *_WRITE)
_REGISTER: Errors = (
    InvalidTaskName,
    QuotaExceeded,
    UnknownTask,
    TaskExists,
    InventoryMismatch,
    PreconditionFailed,
    FileError,
    IdempotencyMismatch,
    RevisionNotReached,
    *_WRITE,
)
_GENERATE: Errors = (
    UnknownTask,
    UnknownModel,
    InventoryMismatch,
    UnsupportedBody,
    Overloaded,
    RateLimited,
    ServerFull,
    EngineError,
    EngineOutOfMemory,
    TaskDamaged,
    EngineStopped,
    *_READ,
)
_LOAD: Errors = (
    InvalidTaskName,
    QuotaExceeded,
    UnknownTask,
    InventoryMismatch,
    FileError,
    *_WRITE,
)

_TASK = Success("the task as it stands now", shapes.Task, ("ETag", REVISION))
_NEW_TASK = Success("the task is new", shapes.Task, ("ETag", REVISION))
_EDITED = Answers({200: _TASK}, _EDIT)
_VERSION_EDITED = Answers({200: _TASK}, (InventoryMismatch, *_EDIT))
_KEY_MADE = Success("the key, whole: nothing shows it again", shapes.NewApiKey, ("cache-control",))


def _generated(shape: type[shapes.Shape]) -> Answers:
    told = ("x-polyrex-task-version", *RATE_LIMITS)
    return Answers({200: Success("the answer", shape, may_have=told, streams=True)}, _GENERATE)


ROUTES: Mapping[tuple[str, str], Answers] = {
    ("GET", "/"): Answers({200: Success("where to go", shapes.Index)}),
    ("GET", "/livez"): Answers({200: Success("no restart helps", shapes.Alive)}, (EngineStopped,)),
    ("GET", "/readyz"): Answers(
        {200: Success("requests are answered", shapes.Ready)}, (EngineStopped,)
    ),
    ("GET", "/metrics"): Answers({200: Success("the metrics", CONTENT_TYPE_LATEST)}),
    ("POST", "/v1/completions"): _generated(shapes.Completion),
    ("POST", "/v1/chat/completions"): _generated(shapes.ChatCompletion),
    ("GET", "/v1/models"): Answers(
        {200: Success("a page of models", shapes.ModelList)}, (RevisionNotReached,)
    ),
    ("GET", "/v1/models/{name}"): Answers(
        {200: Success("the model", shapes.Model)}, (UnknownTask, *_READ)
    ),
    ("POST", "/v1/tasks"): Answers({200: _TASK, 201: _NEW_TASK}, _REGISTER),
    ("PUT", "/v1/tasks/{name}"): Answers({200: _TASK, 201: _NEW_TASK}, _REGISTER),
    ("GET", "/v1/tasks"): Answers(
        {200: Success("a page of tasks", shapes.TaskList, (REVISION,))}, _READ
    ),
    ("GET", "/v1/tasks/{name}"): Answers({200: _TASK}, (UnknownTask, *_READ)),
    ("DELETE", "/v1/tasks/{name}"): Answers(
        {200: Success("it is dropped", shapes.DroppedTask, ("ETag", REVISION))}, _EDIT
    ),
    ("POST", "/v1/tasks/{name}/undelete"): Answers({200: _TASK}, (QuotaExceeded, *_EDIT)),
    ("PUT", "/v1/tasks/{name}/labels"): _EDITED,
    ("PUT", "/v1/tasks/{name}/shared_with/{tenant}"): Answers(
        {200: _TASK}, (UnknownTenant, *_EDIT)
    ),
    ("DELETE", "/v1/tasks/{name}/shared_with/{tenant}"): _EDITED,
    ("GET", "/v1/tasks/{name}/versions"): Answers(
        {200: Success("the versions", shapes.VersionList, (REVISION,))}, (UnknownTask, *_READ)
    ),
    ("POST", "/v1/tasks/{name}/rollback"): _VERSION_EDITED,
    ("PUT", "/v1/tasks/{name}/aliases/{alias}"): _EDITED,
    ("DELETE", "/v1/tasks/{name}/aliases/{alias}"): _EDITED,
    ("PUT", "/v1/tasks/{name}/canary"): _VERSION_EDITED,
    ("DELETE", "/v1/tasks/{name}/canary"): _EDITED,
    ("POST", "/v1/tasks/{name}/fit"): Answers(
        {200: Success("the steps of the fit, as events", EVENTS)},
        (
            InvalidTaskName,
            QuotaExceeded,
            UnknownTask,
            TaskExists,
            PreconditionFailed,
            UnsupportedBody,
            Overloaded,
            RateLimited,
            EngineStopped,
            *_READ,
        ),
    ),
    ("POST", "/v1/load_lora_adapter"): Answers(
        {200: Success("it is loaded", NO_TYPE, (REVISION,))}, _LOAD
    ),
    ("POST", "/v1/unload_lora_adapter"): Answers(
        {200: Success("it is unloaded", NO_TYPE, (REVISION,))}, (UnknownTask, *_WRITE)
    ),
    ("GET", "/v1/whoami"): Answers({200: Success("the key's tenant and role", shapes.Whoami)}),
    ("POST", "/v1/tenants"): Answers(
        {201: Success("the tenant is new", shapes.Tenant)}, (TenantExists, *_WRITE)
    ),
    ("GET", "/v1/tenants"): Answers({200: Success("a page of tenants", shapes.TenantList)}),
    ("GET", "/v1/tenants/{name}"): Answers(
        {200: Success("the tenant", shapes.Tenant)}, (UnknownTenant,)
    ),
    ("PATCH", "/v1/tenants/{name}"): Answers(
        {200: Success("the tenant as it stands now", shapes.Tenant)}, (UnknownTenant, *_WRITE)
    ),
    ("POST", "/v1/tenants/{name}/keys"): Answers({201: _KEY_MADE}, (UnknownTenant, *_WRITE)),
    ("GET", "/v1/tenants/{name}/keys"): Answers(
        {200: Success("the keys, oldest first", shapes.ApiKeyList)}, (UnknownTenant,)
    ),
    ("POST", "/v1/keys/{key_id}/rotate"): Answers({201: _KEY_MADE}, (UnknownKey, *_WRITE)),
    ("DELETE", "/v1/keys/{key_id}"): Answers(
        {200: Success("the key as it was", shapes.ApiKey)}, (UnknownKey, *_WRITE)
    ),
}
"""(method, path) -> what the route may answer. http/access.py says who may ask."""
