"""The versions of a task: which there are, which is current, their other names, and a canary."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from polyrex.server.http.conditions import (
    JSON_ONLY,
    MIN_REVISION_REACHED,
    EditCondition,
    revision_headers,
)
from polyrex.server.http.context import Asker, Context
from polyrex.server.http.json_body import JsonRoute
from polyrex.server.http.responses import version_shape
from polyrex.server.requests.bodies import AliasBody, CanaryBody, RollBack

from .tasks import edit

router = APIRouter(
    prefix="/v1/tasks/{name}",
    route_class=JsonRoute,
    dependencies=[MIN_REVISION_REACHED, JSON_ONLY],
)


@router.get("/versions")
async def versions(name: str, context: Context, asker: Asker) -> Response:
    """List the versions of a task that are kept, in the order of their numbers."""
    found = await context.reads.run(context.registry.versions, asker, name)
    shown = [version_shape(each, context.registry.inventory.sha256) for each in found]
    return JSONResponse({"object": "list", "data": shown}, headers=revision_headers(context))


@router.post("/rollback")
async def roll_back(
    name: str, body: RollBack, context: Context, asker: Asker, expected: EditCondition
) -> Response:
    """Make a version the current one; requests under way keep the version they have.

    Without `version`, it is the last one kept before the current; a later one is promoted. Repeat
    a request without `version` only with If-Match: it goes back once more.
    """
    return await edit(context, asker, context.edits.select, name, body.version, expected)


@router.put("/aliases/{alias}")
async def set_alias(
    name: str,
    alias: str,
    body: AliasBody,
    context: Context,
    asker: Asker,
    expected: EditCondition,
) -> Response:
    """Let `name@alias` mean a version, whichever it meant before."""
    change = context.edits.set_alias
    return await edit(context, asker, change, name, alias, body.version, expected)


@router.delete("/aliases/{alias}")
async def remove_alias(
    name: str, alias: str, context: Context, asker: Asker, expected: EditCondition
) -> Response:
    """Take an alias away; the version stays."""
    return await edit(context, asker, context.edits.remove_alias, name, alias, expected)


@router.put("/canary")
async def set_canary(
    name: str, body: CanaryBody, context: Context, asker: Asker, expected: EditCondition
) -> Response:
    """Let another version answer a share of the task's requests.

    Requests with the same `user` get the same version.
    """
    change = context.edits.set_canary
    return await edit(context, asker, change, name, body.version, body.share, expected)


@router.delete("/canary")
async def remove_canary(
    name: str, context: Context, asker: Asker, expected: EditCondition
) -> Response:
    """Let the current version answer every request again."""
    return await edit(context, asker, context.edits.remove_canary, name, expected)
