"""OpenAI's routes: completions, chat completions, models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from polyrex.adapters.errors import UnknownTask
from polyrex.server.admission.places import Ask
from polyrex.server.http.conditions import MIN_REVISION_REACHED
from polyrex.server.http.context import AppContext, Asker, Context
from polyrex.server.http.json_body import JsonRoute
from polyrex.server.http.responses import ChatShape, CompletionShape, Json, Shape, version_headers
from polyrex.server.http.streaming import EventStream, until_disconnect
from polyrex.server.registry.principal import Principal
from polyrex.server.requests.bodies import ChatCompletionRequest, CompletionRequest
from polyrex.server.requests.generation import collect, generate
from polyrex.server.requests.prepare import PreparedRequest

router = APIRouter(prefix="/v1", route_class=JsonRoute, dependencies=[MIN_REVISION_REACHED])

MOST_MODELS = 10_000
"""The most models on a page of GET /v1/models, and the default."""
_BYTES_OF_TOKEN = 4  # in English, of most tokenizers


@router.post("/completions")
async def completions(
    body: CompletionRequest, request: Request, context: Context, asker: Asker
) -> Response:
    """Complete one prompt or several."""
    prompts = sum(_tokens(prompt) for prompt in body.prompts)
    ask = _ask(context, asker, body, prompts, body.max_tokens)
    prepare = partial(context.preparer.completion, body, asker)
    return await _answer(context, request, body, ask, prepare, CompletionShape())


@router.post("/chat/completions")
async def chat_completions(
    body: ChatCompletionRequest, request: Request, context: Context, asker: Asker
) -> Response:
    """Answer a chat, in the base model's own template."""
    prompt = sum(_tokens(message.text) for message in body.messages)
    ask = _ask(context, asker, body, prompt, body.max_completion_tokens or body.max_tokens)
    prepare = partial(context.preparer.chat, body, asker)
    return await _answer(context, request, body, ask, prepare, ChatShape())


async def _answer(
    context: AppContext,
    request: Request,
    body: CompletionRequest | ChatCompletionRequest,
    ask: Ask,
    prepare: Callable[[], Awaitable[PreparedRequest]],
    shape: Shape,
) -> Response:
    """Generate, whole or as a stream; a stream keeps the request admitted until it ends."""
    context.readiness.check()
    with ExitStack() as held:
        place = held.enter_context(context.places.admit(ask, request.state.deadline.left()))
        place.meter = held.enter_context(context.quotas.admit(ask.tenant, ask.completions))
        if place.waits:
            waited = await until_disconnect(request.receive, place.wait())
        else:
            waited = 0.0
        context.metrics.admitted(waited)
        prepared = await prepare()
        place.meter.tokens += prepared.prompt_tokens
        generated = generate(place, context.tokenizer, context.metrics, prepared)
        pieces = place.meter.count(generated)
        headers = version_headers(prepared) | context.quotas.headers(ask.tenant)
        if body.stream:
            events = shape.stream(prepared, pieces, include_usage=body.include_usage)
            return EventStream(events, headers, held.pop_all())
        whole = await until_disconnect(request.receive, collect(pieces, len(prepared.choices)))
        return JSONResponse(shape.whole(prepared, whole), headers=headers)


def _ask(
    context: AppContext,
    asker: Principal,
    body: CompletionRequest | ChatCompletionRequest,
    prompt_tokens: float,
    max_tokens: int | None,
) -> Ask:
    weight = context.directory.tenant(asker.tenant).quotas.weight or 1
    return Ask(asker.tenant, weight, body.completions, prompt_tokens, max_tokens)


def _tokens(prompt: str | list[int]) -> float:
    """About how many tokens a prompt has, before it is tokenised."""
    return len(prompt.encode()) / _BYTES_OF_TOKEN if isinstance(prompt, str) else len(prompt)


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
