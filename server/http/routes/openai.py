"""OpenAI's routes: completions, chat completions, models."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from polyrex.adapters.errors import UnknownTask
from polyrex.server.http.conditions import MIN_REVISION_REACHED
from polyrex.server.http.context import AppContext, Asker, Context
from polyrex.server.http.responses import ChatShape, CompletionShape, Json, Shape, version_headers
from polyrex.server.http.streaming import EventStream, until_disconnect
from polyrex.server.registry.principal import Principal
from polyrex.server.requests.bodies import ChatCompletionRequest, CompletionRequest, Sampling
from polyrex.server.requests.generation import collect, generate
from polyrex.server.requests.prepare import PreparedRequest
from polyrex.server.admission.quotas import Meter

router = APIRouter(prefix="/v1", dependencies=[MIN_REVISION_REACHED])

MOST_MODELS = 10_000
"""The most models on a page of GET /v1/models, and the default."""


@dataclass(frozen=True)
class Admission:
    """A request's place in the server, which it has until `held` is closed."""

    asker: Principal
    meter: Meter
    held: ExitStack


@router.post("/completions")
async def completions(
    body: CompletionRequest, request: Request, context: Context, asker: Asker
) -> Response:
    """Complete one prompt or several."""
    context.readiness.check()
    with ExitStack() as admitted:
        admitted.enter_context(context.gate.admit(body.completions))
        meter = admitted.enter_context(context.quotas.admit(asker.tenant, body.completions))
        prepared = await context.preparer.completion(body, asker)
        admission = Admission(asker, meter, admitted)
        return await _answer(context, request, body, prepared, CompletionShape(), admission)


@router.post("/chat/completions")
async def chat_completions(
    body: ChatCompletionRequest, request: Request, context: Context, asker: Asker
) -> Response:
    """Answer a chat, in the base model's own template."""
    context.readiness.check()
    with ExitStack() as admitted:
        admitted.enter_context(context.gate.admit(body.completions))
        meter = admitted.enter_context(context.quotas.admit(asker.tenant, body.completions))
        prepared = await context.preparer.chat(body, asker)
        admission = Admission(asker, meter, admitted)
        return await _answer(context, request, body, prepared, ChatShape(), admission)


async def _answer(
    context: AppContext,
    request: Request,
    body: Sampling,
    prepared: PreparedRequest,
    shape: Shape,
    admission: Admission,
) -> Response:
    """Generate, whole or as a stream; a stream keeps the request admitted until it ends."""
    admission.meter.tokens += prepared.prompt_tokens
    generated = generate(context.engine, context.tokenizer, context.metrics, prepared)
    pieces = admission.meter.count(generated)
    headers = version_headers(prepared) | context.quotas.headers(admission.asker.tenant)
    if body.stream:
        events = shape.stream(prepared, pieces, include_usage=body.include_usage)
        return EventStream(events, headers, admission.held.pop_all())
    whole = await until_disconnect(request.receive, collect(pieces, len(prepared.choices)))
    return JSONResponse(shape.whole(prepared, whole), headers=headers)


@router.get("/models")
async def models(
    context: Context,
    asker: Asker,
    after: Annotated[
        str | None, Query(description="a task's name; the page begins after it")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_MODELS)] = MOST_MODELS,
) -> Response:
    """List the base model, and every task that may be used as a model whose parent it is.

    Own tasks come first, then those that other tenants share, as `tenant:name`.
    """
    return await asyncio.to_thread(_models, context, asker, after, limit)


def _models(context: AppContext, asker: Principal, after: str | None, limit: int) -> Response:
    base = _base_model(context)
    tasks = context.registry.models(asker, after, limit + 1)
    shown = [_task_model(base, name, created) for name, created in tasks[:limit]]
    if after is None:
        shown.insert(0, base)
    return JSONResponse({"object": "list", "data": shown, "has_more": len(tasks) > limit})


@router.get("/models/{name}")
async def model(name: str, context: Context, asker: Asker) -> Response:
    """Show the base model or a task; `name@3` or `name@alias` is that version of it."""
    base = _base_model(context)
    if name == context.config.model:
        return JSONResponse(base)
    task = await context.reads.run(context.registry.find, asker, name)
    version = await context.reads.run(context.registry.version, asker, name)
    if version.inventory_sha256 != context.registry.inventory.sha256:
        raise UnknownTask  # it cannot be used as a model, and is not listed either
    created = version.created if "@" in name else task.created
    return JSONResponse(_task_model(base, name, created))


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


def _task_model(base: Json, name: str, created: float) -> Json:
    return {**base, "id": name, "created": int(created), "parent": base["id"]}
