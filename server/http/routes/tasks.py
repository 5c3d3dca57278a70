"""Registers, lists, shows, replaces and drops tasks while requests run."""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from polyrex.server.errors import InvalidRequest, UnsupportedBody
from polyrex.server.http.context import AppContext, Context
from polyrex.server.http.error_handlers import invalid_fields
from polyrex.server.http.responses import task_shape
from polyrex.server.requests.bodies import NewTask, RouterBody

router = APIRouter(prefix="/v1/tasks")

Body = TypeVar("Body", NewTask, RouterBody)

MOST_TASKS = 1000
"""The most tasks on a page of GET /v1/tasks."""


@router.post("")
async def register(
    request: Request,
    context: Context,
    name: Annotated[
        str | None, Query(description="the task's name, where the body is a safetensors file")
    ] = None,
) -> Response:
    """Register a task from JSON (NewTask), or from a router file as application/octet-stream.

    201 for a new task, 200 where it exists with the same router, 409 where with another one.
    """
    body = await request.body()
    if _media_type(request) == "application/json":
        if name is not None:
            raise InvalidRequest("with a JSON body, the name belongs in the body", "name")
        task = _parse(NewTask, body)
        return await _register(context, task.name, _decoded(task.router), replace=False)
    if name is None:
        raise InvalidRequest("with a safetensors body, give the name as ?name=", "name")
    return await _register(context, name, body, replace=False)


@router.put("/{name}")
async def replace(name: str, request: Request, context: Context) -> Response:
    """Register a task or give it a new version; requests under way keep the version they have."""
    body = await request.body()
    if _media_type(request) == "application/json":
        body = _decoded(_parse(RouterBody, body).router)
    return await _register(context, name, body, replace=True)


@router.get("")
async def tasks(
    context: Context,
    after: Annotated[
        str | None, Query(description="a task's name; the page begins after it")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_TASKS)] = 100,
) -> Response:
    """List a page of tasks, ordered by name."""
    found = await asyncio.to_thread(context.registry.list, after, limit + 1)
    page = [task_shape(task) for task in found[:limit]]
    return JSONResponse({"object": "list", "data": page, "has_more": len(found) > limit})


@router.get("/{name}")
async def task(name: str, context: Context) -> Response:
    """Show one task."""
    return JSONResponse(task_shape(await asyncio.to_thread(context.registry.info, name)))


@router.delete("/{name}")
async def drop(name: str, context: Context) -> Response:
    """Drop a task; requests under way finish with it."""
    await asyncio.to_thread(context.registry.drop, name)
    return JSONResponse({"name": name, "object": "task", "deleted": True})


async def _register(context: AppContext, name: str, data: bytes, *, replace: bool) -> Response:
    context.check_name(name)
    info, created = await asyncio.to_thread(context.registry.register, name, data, replace=replace)
    return JSONResponse(task_shape(info), 201 if created else 200)


def _media_type(request: Request) -> str:
    """The body's media type; raises UnsupportedBody unless it is one of the two that are read.

    Browsers ask (CORS preflight) before a web page may send either of them to another site.
    """
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found not in ("application/json", "application/octet-stream"):
        raise UnsupportedBody(
            f"content-type must be application/json or application/octet-stream, got {found!r:.80}"
        )
    return found


def _parse(kind: type[Body], body: bytes) -> Body:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise invalid_fields(error.errors()) from error


def _decoded(router: str) -> bytes:
    try:
        return base64.b64decode(router, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"router: not base64: {error}", "router") from error
