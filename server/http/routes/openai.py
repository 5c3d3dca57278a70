"""OpenAI's routes: completions, chat completions, models."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from polyrex.adapters.files.task import TaskInfo
from polyrex.server.http.context import AppContext, Asker, Context
from polyrex.server.http.responses import ChatShape, CompletionShape, Json, Shape, version_headers
from polyrex.server.http.streaming import EventStream, until_disconnect
from polyrex.server.requests.bodies import ChatCompletionRequest, CompletionRequest, Sampling
from polyrex.server.requests.generation import collect, generate
from polyrex.server.requests.prepare import PreparedRequest

router = APIRouter(prefix="/v1")

MOST_MODELS = 10_000
"""The most models on a page of GET /v1/models, and the default."""


@router.post("/completions")
async def completions(
    body: CompletionRequest, request: Request, context: Context, asker: Asker
) -> Response:
    """Complete one prompt or several."""
    context.readiness.check()
    with ExitStack() as admitted:
        admitted.enter_context(context.gate.admit(body.completions))
        prepared = await asyncio.to_thread(context.preparer.completion, body, asker)
        return await _answer(context, request, body, prepared, CompletionShape(), admitted)


@router.post("/chat/completions")
async def chat_completions(
    body: ChatCompletionRequest, request: Request, context: Context, asker: Asker
) -> Response:
    """Answer a chat, in the base model's own template."""
    context.readiness.check()
    with ExitStack() as admitted:
        admitted.enter_context(context.gate.admit(body.completions))
        prepared = await asyncio.to_thread(context.preparer.chat, body, asker)
        return await _answer(context, request, body, prepared, ChatShape(), admitted)


async def _answer(
    context: AppContext,
    request: Request,
    body: Sampling,
    prepared: PreparedRequest,
    shape: Shape,
    admitted: ExitStack,
) -> Response:
    """Generate, whole or as a stream; a stream keeps the request admitted until it ends."""
    pieces = generate(context.engine, context.tokenizer, context.metrics, prepared)
    headers = version_headers(prepared)
    if body.stream:
        events = shape.stream(prepared, pieces, include_usage=body.include_usage)
        return EventStream(events, headers, admitted.pop_all())
    whole = await until_disconnect(request.receive, collect(pieces, len(prepared.choices)))
    return JSONResponse(shape.whole(prepared, whole), headers=headers)


@router.get("/models")
async def models(
    context: Context,
    after: Annotated[
        str | None, Query(description="a task's name; the page begins after it")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_MODELS)] = MOST_MODELS,
) -> Response:
    """List the base model, and every task as a model whose parent is the base model."""
    tasks = await asyncio.to_thread(context.registry.list, after, limit + 1)
    shown = [_task_model(context, task) for task in tasks[:limit]]
    if after is None:
        shown.insert(0, _base_model(context))
    return JSONResponse({"object": "list", "data": shown, "has_more": len(tasks) > limit})


@router.get("/models/{name}")
async def model(name: str, context: Context) -> Response:
    """Show the base model or a task."""
    if name == context.config.model:
        return JSONResponse(_base_model(context))
    task = await asyncio.to_thread(context.registry.info, name)
    return JSONResponse(_task_model(context, task))


def _base_model(context: AppContext) -> Json:
    return {
        "id": context.config.model,
        "object": "model",
        "created": context.started,
        "owned_by": "polyrex",
        "root": context.config.model,
        "parent": None,
        "max_model_len": context.engine.context_length,
    }


def _task_model(context: AppContext, task: TaskInfo) -> Json:
    own = {"id": task.name, "created": int(task.created), "parent": context.config.model}
    return _base_model(context) | own
