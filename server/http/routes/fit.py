"""From a few rows to a live task: fitting over HTTP."""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import APIRouter
from starlette.responses import Response

from polyrex.adapters.errors import InvalidTaskName
from polyrex.adapters.files.registry import TASK_NAME
from polyrex.server.errors import InvalidRequest
from polyrex.server.http.context import ServicesDep
from polyrex.server.http.streaming import EventStream
from polyrex.server.requests.bodies import FitRequest

router = APIRouter(prefix="/v1/tasks")


@router.post("/{name}/fit")
async def fit(name: str, body: FitRequest, services: ServicesDep) -> Response:
    """Fit a router to rows and register it where it beats the base model; streams events.

    A client that goes away ends the fit.
    """
    services.readiness.check()
    if name == services.config.model:
        raise InvalidRequest(f"{name!r} is the base model's name", "name")
    if not TASK_NAME.fullmatch(name):
        raise InvalidTaskName(f"a task name matches {TASK_NAME.pattern}, got {name!r:.80}")
    with ExitStack() as admitted:
        admitted.enter_context(services.fitter.admit(name, body))
        return EventStream(services.fitter.fit(name, body), {}, admitted.pop_all())
