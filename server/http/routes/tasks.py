"""Tasks: register, list, read, replace and drop them while requests run."""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from polyrex.server.errors import InvalidRequest, UnsupportedBody, invalid_fields
from polyrex.server.http.context import Services, ServicesDep
from polyrex.server.http.task_shape import task_shape
from polyrex.server.requests.bodies import NewTask, RouterBody

router = APIRouter(prefix="/v1/tasks")

Body = TypeVar("Body", NewTask, RouterBody)

MOST_TASKS = 1000
"""Tasks on a page of GET /v1/tasks."""


@router.post("")
async def register(
    request: Request,
    services: ServicesDep,
    name: Annotated[str | None, Query(description="with a safetensors body: the task")] = None,
) -> Response:
    """Register a new task: JSON (NewTask), or a router file as application/octet-stream.

    201 when it is new, 200 when it was there with the same router, 409 with another one.
    """
    body = await request.body()
    if _media_type(request) == "application/json":
        if name is not None:
            raise InvalidRequest("with a JSON body, the name belongs into the body", "name")
        task = _parse(NewTask, body)
        return await _register(services, task.name, _decoded(task.router), replace=False)
    if name is None:
        raise InvalidRequest("with a safetensors body, give the name as ?name=", "name")
    return await _register(services, name, body, replace=False)


@router.put("/{name}")
async def replace(name: str, request: Request, services: ServicesDep) -> Response:
    """Register a task, or give it a new version; requests under way keep the one they have."""
    body = await request.body()
    if _media_type(request) == "application/json":
        body = _decoded(_parse(RouterBody, body).router)
    return await _register(services, name, body, replace=True)


@router.get("")
async def tasks(
    services: ServicesDep,
    after: Annotated[
        str | None, Query(description="a task's name; the page begins behind it")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_TASKS)] = 100,
) -> Response:
    """A page of the tasks, in the order of their names."""
    found = await asyncio.to_thread(services.registry.list, after, limit + 1)
    page = [task_shape(task) for task in found[:limit]]
    return JSONResponse({"object": "list", "data": page, "has_more": len(found) > limit})


@router.get("/{name}")
async def task(name: str, services: ServicesDep) -> Response:
    """One task."""
    return JSONResponse(task_shape(await asyncio.to_thread(services.registry.info, name)))


@router.delete("/{name}")
async def drop(name: str, services: ServicesDep) -> Response:
    """Drop a task; requests under way finish with it."""
    await asyncio.to_thread(services.registry.drop, name)
    return JSONResponse({"name": name, "object": "task", "deleted": True})


async def _register(services: Services, name: str, data: bytes, *, replace: bool) -> Response:
    if name == services.config.model:
        raise InvalidRequest(f"{name!r} is the base model's name", "name")
    info, created = await asyncio.to_thread(services.registry.register, name, data, replace=replace)
    return JSONResponse(task_shape(info), 201 if created else 200)


def _media_type(request: Request) -> str:
    """Raises UnsupportedBody unless it is one of the two that are read; a web page cannot send
    either to another site without asking first."""
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
