"""The errors of requests, as they pass from the engine's process to the server."""

from __future__ import annotations

import logging

from polyrex.server.errors import (
    EngineError,
    EngineOutOfMemory,
    EngineRestarting,
    EngineStopped,
    ServerError,
)

from .wire import Failed

logger = logging.getLogger(__name__)

RESTARTING = "the engine stopped, and is started again"
"""What clients are told; the log says why."""
_STOPPED = "stopped"
_KINDS: dict[str, type[ServerError]] = {
    _STOPPED: EngineStopped,
    "memory": EngineOutOfMemory,
    "failed": EngineError,
}
_MOST_CHARACTERS = 1000


def pack_failure(number: int, request: str, error: Exception) -> Failed:
    """The message that a request failed; the log alone tells of an error that is none of ours."""
    for kind, cls in _KINDS.items():
        if isinstance(error, cls):
            return Failed(number, kind, str(error)[:_MOST_CHARACTERS])
    logger.error("request %s failed in the engine", request, exc_info=error)
    return Failed(number, "failed", "the engine failed on this request")


def unpack_failure(failed: Failed) -> ServerError:
    """The error to raise for the request. Where the engine is down, its process ends with it."""
    if failed.kind == _STOPPED:
        return EngineRestarting(RESTARTING)
    return _KINDS[failed.kind](failed.message)
