"""`polyrex`, with defects: `python -m reliability.fuzz.planted DEFECT ... serve FLAG ...`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs

from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from polyrex.server.cli.main import main
from polyrex.server.http.app import create_app

ODD_QUERY = "odd-query"
"""A page of models that begins after an empty name is a 500."""
UNDECLARED = "undeclared"
"""The longest page of tenants is a 418, which the OpenAPI document does not know."""
ODD_HEADER = "odd-header"
"""A header with a byte that is none of ASCII is a 500."""
SILENT = "silent"
"""TRACE is never answered."""
GULLIBLE = "gullible"
"""A Host that has a slash in it opens every route."""


@dataclass
class Planted:
    """A middleware in front of the application that has the defects."""

    app: ASGIApp
    defects: Sequence[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or spoil it."""
        status = self._wrong(scope) if scope["type"] == "http" else None
        if status is not None:
            await JSONResponse({"error": "planted"}, status)(scope, receive, send)
            return
        if self._is_let_in(scope):
            scope["path"], scope["raw_path"] = "/livez", b"/livez"
        if SILENT in self.defects and scope.get("method") == "TRACE":
            await asyncio.Event().wait()
        await self.app(scope, receive, send)

    def _wrong(self, scope: Scope) -> int | None:
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        page = scope["path"], query.get("after"), query.get("limit")
        if ODD_QUERY in self.defects and page[:2] == ("/v1/models", [""]):
            return 500
        if UNDECLARED in self.defects and page[::2] == ("/v1/tenants", ["1000"]):
            return 418
        odd = any(not value.isascii() for _, value in scope["headers"])
        return 500 if ODD_HEADER in self.defects and odd else None

    def _is_let_in(self, scope: Scope) -> bool:
        host = dict(scope.get("headers", ())).get(b"host", b"")
        return GULLIBLE in self.defects and b"/" in host


def _plant(defects: Sequence[str]) -> None:
    def planted(*arguments: Any, **others: Any) -> FastAPI:
        app = create_app(*arguments, **others)
        app.add_middleware(Planted, defects=defects)
        return app

    patch("polyrex.server.launch.loading.create_app", planted).start()


if __name__ == "__main__":
    at = sys.argv.index("serve")
    if at > 1:
        _plant(sys.argv[1:at])
    sys.argv = ["polyrex", *sys.argv[at:]]
    main()
