"""Fitting over HTTP: from a few rows to a live task."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing

from fastapi import APIRouter
from starlette.responses import Response

from polyrex.adapters.errors import InvalidTaskName
from polyrex.adapters.files.registry import TASK_NAME
from polyrex.adapters.files.task import TaskInfo
from polyrex.server.http.context import Context
from polyrex.server.http.responses import Json, task_shape
from polyrex.server.http.streaming import EventStream
from polyrex.server.requests.bodies import FitRequest
from polyrex.server.requests.fitting import Event

router = APIRouter(prefix="/v1/tasks")


@router.post("/{name}/fit")
async def fit(name: str, body: FitRequest, context: Context) -> Response:
    """Fit a router to rows, and register it if it beats the base model; streams events.

    A client that disconnects ends the fit.
    """
    context.readiness.check()
    context.check_name(name)
    if not TASK_NAME.fullmatch(name):
        raise InvalidTaskName(f"a task name matches {TASK_NAME.pattern}, got {name!r:.80}")
    with ExitStack() as admitted:
        admitted.enter_context(context.fitter.admit(name, body))
        return EventStream(_shown(context.fitter.fit(name, body)), {}, admitted.pop_all())


async def _shown(events: AsyncGenerator[Event | TaskInfo, None]) -> AsyncGenerator[Json, None]:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, TaskInfo):
                yield {"event": "registered", "task": task_shape(event)}
            else:
                yield event
