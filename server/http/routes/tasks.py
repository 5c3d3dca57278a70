"""Registers, lists, shows, drops and shares tasks while requests run."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Body, Query, Request
from pydantic import TypeAdapter
from starlette.responses import JSONResponse, Response

from polyrex.server.errors import InvalidRequest, UnsupportedBody
from polyrex.server.http.conditions import (
    JSON_ONLY,
    MIN_REVISION_REACHED,
    Conditions,
    EditCondition,
    RegisterConditions,
    revision_headers,
)
from polyrex.server.http.context import AppContext, Asker, Context
from polyrex.server.http.json_body import JsonRoute, media_type
from polyrex.server.http.responses import Json, task_shape
from polyrex.server.registry.principal import Principal
from polyrex.server.registry.records import TaskRecord, VersionRecord
from polyrex.server.requests.bodies import NewTask, RouterBody

router = APIRouter(prefix="/v1/tasks", route_class=JsonRoute, dependencies=[MIN_REVISION_REACHED])

TaskBody = TypeVar("TaskBody", NewTask, RouterBody)
_NEW_TASK, _ROUTER = TypeAdapter(NewTask), TypeAdapter(RouterBody)
LabelQuery = Annotated[
    list[str] | None, Query(description="a label as key=value; may be given several times")
]

MOST_TASKS = 1000
"""The most tasks on a page of GET /v1/tasks."""


def _router_body(kind: type[TaskBody]) -> dict[str, Any]:
    """What OpenAPI says of a body that is a router, in JSON or as the file itself."""
    content = {
        "application/json": {"schema": kind.model_json_schema()},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    }
    return {"requestBody": {"required": True, "content": content}}


@router.post(
    "",
    openapi_extra=_router_body(NewTask),
)
async def add(
    request: Request,
    context: Context,
    asker: Asker,
    conditions: RegisterConditions,
    name: Annotated[
        str | None, Query(description="the task's name, where the body is a safetensors file")
    ] = None,
    label: LabelQuery = None,
) -> Response:
    """Register a task from JSON (NewTask), or from a router file as application/octet-stream.

    201 for a new task, 200 where it exists with the same router, 409 where with another one.
    """
    body = await request.body()
    if _is_json(request):
        if name is not None:
            raise InvalidRequest("with a JSON body, the name belongs in the body", "name")
        task = await _read(context, _NEW_TASK, body, label)
        data, labels = _decoded(task.router), task.labels
        return await _register(context, asker, task.name, data, labels, conditions, replace=False)
    if name is None:
        raise InvalidRequest("with a safetensors body, give the name as ?name=", "name")
    labels = _labels(label)
    return await _register(context, asker, name, body, labels, conditions, replace=False)


@router.put(
    "/{name}",
    openapi_extra=_router_body(RouterBody),
)
async def replace(
    name: str,
    request: Request,
    context: Context,
    asker: Asker,
    conditions: RegisterConditions,
    label: LabelQuery = None,
) -> Response:
    """Register a task or give it a new version; requests under way keep the version they have."""
    body = await request.body()
    labels = None
    if _is_json(request):
        task = await _read(context, _ROUTER, body, label)
        body, labels = _decoded(task.router), task.labels
    else:
        labels = _labels(label)
    return await _register(context, asker, name, body, labels, conditions, replace=True)


@router.get("")
async def tasks(
    context: Context,
    asker: Asker,
    q: Annotated[
        str | None, Query(max_length=256, description="text in the name or the description")
    ] = None,
    label: LabelQuery = None,
    deleted: Annotated[
        bool, Query(description="the tasks that were dropped, and can be undeleted")
    ] = False,
    after: Annotated[
        str | None, Query(description="a task's name; the page begins after it")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_TASKS)] = 100,
) -> Response:
    """List a page of the tenant's own tasks, ordered by name."""
    page = await context.reads.run(
        context.registry.page,
        asker,
        text=q,
        labels=_labels(label) or {},
        deleted=deleted,
        after=after,
        limit=limit,
    )
    shown = [_shape(context, asker, task) for task in page.tasks]
    return JSONResponse(
        {"object": "list", "data": shown, "has_more": page.has_more},
        headers=revision_headers(context),
    )


@router.get("/{name}")
async def task(name: str, context: Context, asker: Asker) -> Response:
    """Show one task; `name@3` or `name@alias` shows that version of it."""
    found = await context.reads.run(context.registry.find, asker, name)
    version = None
    if "@" in name:
        version = await context.reads.run(context.registry.version, asker, name)
    return show(context, asker, found, version)


@router.delete("/{name}", dependencies=[JSON_ONLY])
async def drop(name: str, context: Context, asker: Asker, expected: EditCondition) -> Response:
    """Drop a task; requests under way finish with it, and it can be undeleted for some days."""
    task = await context.writes.run(context.edits.drop, asker, name, expected)
    headers = revision_headers(context, task)
    return JSONResponse({"name": name, "object": "task", "deleted": True}, headers=headers)


@router.post("/{name}/undelete", dependencies=[JSON_ONLY])
async def undelete(name: str, context: Context, asker: Asker, expected: EditCondition) -> Response:
    """Take back a drop, with all versions, aliases, labels and shares that the task had."""
    return await edit(context, asker, context.edits.undelete, name, expected)


@router.put("/{name}/labels", dependencies=[JSON_ONLY])
async def label(
    name: str,
    labels: Annotated[dict[str, str], Body()],
    context: Context,
    asker: Asker,
    expected: EditCondition,
) -> Response:
    """Replace a task's labels."""
    return await edit(context, asker, context.edits.set_labels, name, labels, expected)


@router.put(
    "/{name}/shared_with/{tenant}",
    dependencies=[JSON_ONLY],
)
async def share(
    name: str, tenant: str, context: Context, asker: Asker, expected: EditCondition
) -> Response:
    """Let another tenant use a task, as `tenant:name`."""
    return await edit(context, asker, context.edits.share, name, tenant, expected)


@router.delete(
    "/{name}/shared_with/{tenant}",
    dependencies=[JSON_ONLY],
)
async def unshare(
    name: str, tenant: str, context: Context, asker: Asker, expected: EditCondition
) -> Response:
    """Stop sharing a task with another tenant."""
    return await edit(context, asker, context.edits.unshare, name, tenant, expected)


async def edit(
    context: AppContext, asker: Principal, change: Callable[..., TaskRecord], *arguments: Any
) -> Response:
    """Change a task off the event loop, and show it as it stands then."""
    return show(context, asker, await context.writes.run(change, asker, *arguments))


def show(
    context: AppContext,
    asker: Principal,
    task: TaskRecord,
    version: VersionRecord | None = None,
    status: int = 200,
) -> Response:
    """The answer that shows a task, in one version; without it, in the current one."""
    shown = _shape(context, asker, task, version)
    return JSONResponse(shown, status, revision_headers(context, task))


def _shape(
    context: AppContext, asker: Principal, task: TaskRecord, version: VersionRecord | None = None
) -> Json:
    registry = context.registry
    counted = registry.canary_counts.of(task.id)
    return task_shape(task, asker, registry.inventory.sha256, version, counted)


async def _register(
    context: AppContext,
    asker: Principal,
    name: str,
    data: bytes,
    labels: dict[str, str] | None,
    conditions: Conditions,
    *,
    replace: bool,
) -> Response:
    context.check_name(name)
    done = await context.writes.run(
        context.registry.register,
        asker,
        name,
        data,
        replace=replace,
        expected=conditions.expected,
        labels=labels,
        idempotency_key=conditions.idempotency_key,
    )
    return show(context, asker, done.task, done.version, 201 if done.created else 200)


def _is_json(request: Request) -> bool:
    """Whether the body is JSON; raises UnsupportedBody unless it is that or a file.

    Browsers ask (CORS preflight) before a web page may send either of them to another site.
    """
    found = media_type(request)
    if found not in ("application/json", "application/octet-stream"):
        raise UnsupportedBody(
            f"content-type must be application/json or application/octet-stream, got {found!r:.80}"
        )
    return found == "application/json"


async def _read(
    context: AppContext, kind: TypeAdapter[TaskBody], body: bytes, label: Sequence[str] | None
) -> TaskBody:
    if label:
        raise InvalidRequest("with a JSON body, the labels belong in the body", "label")
    return await context.bodies.read(kind, body)


def _labels(given: Sequence[str] | None) -> dict[str, str] | None:
    """Labels from a query; raises InvalidRequest."""
    if given is None:
        return None
    pairs = [text.split("=", 1) for text in given]
    if any(len(pair) != 2 for pair in pairs) or len({pair[0] for pair in pairs}) < len(pairs):
        raise InvalidRequest("labels are given as key=value, each key once", "label")
    return dict(pairs)


def _decoded(router: str) -> bytes:
    try:
        return base64.b64decode(router, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"router: not base64: {error}", "router") from error
