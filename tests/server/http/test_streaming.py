"""Event streams, as they are sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from typing import Any

import pytest

from polyrex.server.errors import FitFailed
from polyrex.server.http.responses import Json
from polyrex.server.http.streaming import EventStream


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_what_is_held_is_released_before_the_end_is_said(fails: bool) -> None:
    """Otherwise a client that reads the end and sends its next request at once would get a 429."""
    log: list[str] = []

    async def events() -> AsyncGenerator[Json, None]:
        yield {"event": "started"}
        if fails:
            raise FitFailed("no such thing")

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        body = message.get("body", b"").decode()
        log.extend(word for word in ("started", "[DONE]", "no such thing") if word in body)

    held = ExitStack()
    held.callback(log.append, "released")
    asyncio.run(EventStream(events(), {}, held)({"type": "http"}, receive, send))
    assert log == ["started", "released", "no such thing" if fails else "[DONE]"]
