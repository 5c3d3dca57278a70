"""For the operator: is the process alive, is it ready, what is it doing."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from polyrex.server.http.context import ServicesDep

router = APIRouter()


@router.get("/livez")
async def livez(services: ServicesDep) -> Response:
    """503 when only a restart helps: the engine failed to start, or is down. Else 200."""
    if services.readiness.settled.is_set():
        services.readiness.check()
        services.engine.check()
    return JSONResponse({"status": "alive"})


@router.get("/readyz")
async def readyz(services: ServicesDep) -> Response:
    """503 until the engine has been started and warmed up, and when it is down. Else 200."""
    services.readiness.check()
    services.engine.check()
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def metrics(services: ServicesDep) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(services.metrics.text(), media_type=CONTENT_TYPE_LATEST)
