"""OpenAI's routes: completions, chat completions, models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from polyrex.adapters.files.registry import TaskInfo
from polyrex.server.http.context import Services, ServicesDep
from polyrex.server.http.responses import ChatShape, CompletionShape, Json, Shape
from polyrex.server.http.streaming import EventStream, collect, stream_events, until_disconnect
from polyrex.server.requests.bodies import ChatCompletionRequest, CompletionRequest, Sampling
from polyrex.server.requests.prepare import Plan, plan_chat, plan_completion

router = APIRouter(prefix="/v1")

MOST_MODELS = 10_000
"""Models on a page of GET /v1/models, and how many there are on one unless asked otherwise."""


@router.post("/completions")
async def completions(body: CompletionRequest, request: Request, services: ServicesDep) -> Response:
    """Complete one prompt or several."""
    count = len(body.prompts) * body.n

    def plan() -> Plan:
        return plan_completion(services, body)

    return await _answer(services, request, body, count, plan, CompletionShape())


@router.post("/chat/completions")
async def chat_completions(
    body: ChatCompletionRequest, request: Request, services: ServicesDep
) -> Response:
    """Answer a chat, in the base model's own template."""

    def plan() -> Plan:
        return plan_chat(services, body)

    return await _answer(services, request, body, body.n, plan, ChatShape())


async def _answer(
    services: Services,
    request: Request,
    body: Sampling,
    count: int,
    make_plan: Callable[[], Plan],
    shape: Shape,
) -> Response:
    services.readiness.check()
    with ExitStack() as admitted:
        admitted.enter_context(services.gate.admit(count))
        plan = await asyncio.to_thread(make_plan)
        if body.stream:
            events = stream_events(services, plan, shape, include_usage=body.include_usage)
            return EventStream(events, plan.headers, admitted.pop_all())
        pieces = await until_disconnect(request.receive, collect(services, plan))
        return JSONResponse(shape.whole(plan, pieces), headers=plan.headers)


@router.get("/models")
async def models(
    services: ServicesDep,
    after: Annotated[
        str | None, Query(description="a task's name; the page begins behind it")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_MODELS)] = MOST_MODELS,
) -> Response:
    """The base model, and every task as a model whose parent it is."""
    tasks = await asyncio.to_thread(services.registry.list, after, limit + 1)
    shown = [_task_model(services, task) for task in tasks[:limit]]
    if after is None:
        shown.insert(0, _base_model(services))
    return JSONResponse({"object": "list", "data": shown, "has_more": len(tasks) > limit})


@router.get("/models/{name}")
async def model(name: str, services: ServicesDep) -> Response:
    """The base model, or a task."""
    if name == services.config.model:
        return JSONResponse(_base_model(services))
    task = await asyncio.to_thread(services.registry.info, name)
    return JSONResponse(_task_model(services, task))


def _base_model(services: Services) -> Json:
    return {
        "id": services.config.model,
        "object": "model",
        "created": services.started,
        "owned_by": "polyrex",
        "root": services.config.model,
        "parent": None,
        "max_model_len": services.engine.context_length,
    }


def _task_model(services: Services, task: TaskInfo) -> Json:
    own = {"id": task.name, "created": int(task.created), "parent": services.config.model}
    return _base_model(services) | own
