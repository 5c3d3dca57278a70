"""Routes for operators: what the server is, whether it is alive and ready, what it is doing."""

from __future__ import annotations

from contextlib import suppress

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from polyrex.server.errors import EngineRestarting
from polyrex.server.http.context import Context

router = APIRouter()


@router.get("/")
async def index(request: Request) -> Response:
    """Show the server's name and version, and where to go from here."""
    return JSONResponse(
        {
            "name": "polyrex",
            "version": request.app.version,
            "docs": "/docs",
            "tasks": "/v1/tasks",
            "models": "/v1/models",
            "metrics": "/metrics",
            "health": "/readyz",
        }
    )


@router.get("/livez")
async def livez(context: Context) -> Response:
    """503 where only a restart helps: the engine failed to start, or is down for good. Else 200.

    An engine that the server itself starts again is no reason to restart the server.
    """
    if context.readiness.settled.is_set():
        context.readiness.check()
        with suppress(EngineRestarting):
            context.engine.check()
    return JSONResponse({"status": "alive"})


@router.get("/readyz")
async def readyz(context: Context) -> Response:
    """503 until the engine has started and warmed up, and while it is down. Else 200.

    While the registry's database fails, the status says `degraded`: tasks are answered, and cannot
    be changed. Anybody may ask, so why it fails is in the log alone.
    """
    context.readiness.check()
    context.engine.check()
    works = context.registry.database.health.ok
    return JSONResponse({"status": "ready" if works else "degraded"})


@router.get("/metrics")
async def metrics(context: Context) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(context.metrics.text(), media_type=CONTENT_TYPE_LATEST)
