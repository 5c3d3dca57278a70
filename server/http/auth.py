"""API keys: read from a file, and required on every path but the two health checks."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from polyrex.server.errors import AuthenticationError, StartError

from .error_handlers import error_response

OPEN_PATHS = frozenset({"/livez", "/readyz"})


def read_key_digests(path: Path) -> tuple[bytes, ...]:
    """Read a file of keys, one a line, as sha256 digests; raises StartError where it has none."""
    try:
        keys = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"{path}: the API keys cannot be read: {error}") from error
    digests = tuple(_digest(key.strip()) for key in keys if key.strip())
    if not digests:
        raise StartError(f"{path}: holds no API key; it needs one a line")
    return digests


class Authentication:
    """Lets a request through only if its bearer token is a known key.

    Which paths are open is decided by the path that the router uses, never by one that is
    reconstructed from headers.
    """

    def __init__(self, app: ASGIApp, digests: Sequence[bytes]) -> None:
        self._app = app
        self._digests = tuple(digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = Headers(scope=scope).getlist("authorization")
            if len(given) != 1 or not self._knows(given[0]):
                refused = AuthenticationError("this server needs an API key it knows: Bearer KEY")
                await error_response(refused)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _knows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        # Every key is compared, so that the time taken reveals nothing about any of them.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
