"""Fitting over HTTP: from a few rows to a live task."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing

from fastapi import APIRouter, Request
from starlette.responses import Response

from polyrex.server.http.conditions import MIN_REVISION_REACHED, RegisterConditions
from polyrex.server.http.context import Asker, Context
from polyrex.server.http.deadlines import seconds_allowed
from polyrex.server.http.json_body import JsonRoute
from polyrex.server.http.responses import Json, task_shape
from polyrex.server.http.streaming import EventStream
from polyrex.server.registry.principal import Principal
from polyrex.server.registry.registration import Registered
from polyrex.server.requests.bodies import FitRequest
from polyrex.server.requests.fitting import Event, WantedFit

router = APIRouter(prefix="/v1/tasks", route_class=JsonRoute)


@router.post("/{name}/fit", dependencies=[MIN_REVISION_REACHED])
async def fit(
    name: str,
    body: FitRequest,
    request: Request,
    context: Context,
    asker: Asker,
    conditions: RegisterConditions,
) -> Response:
    """Fit a router to rows, and register it if it beats the base model; streams events.

    A client that disconnects ends the fit.
    """
    context.readiness.check()
    context.check_name(name)
    limit = context.config.fit_seconds + context.config.request_seconds
    request.state.lifetime.begin(seconds_allowed(request.headers, limit))
    served = context.registry.inventory.sha256
    wanted = WantedFit(asker, name, body, conditions.expected, conditions.idempotency_key)
    with ExitStack() as admitted:
        admitted.enter_context(context.fitter.admit())
        await context.fitter.check(wanted)
        admitted.enter_context(context.quotas.admit(asker.tenant, 1))
        events = _shown(context.fitter.fit(wanted), asker, served)
        return EventStream(events, {}, admitted.pop_all())


async def _shown(
    events: AsyncGenerator[Event | Registered, None], asker: Principal, served: str
) -> AsyncGenerator[Json, None]:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Registered):
                task = task_shape(event.task, asker, served, event.version)
                yield {"event": "registered", "task": task}
            else:
                yield event
