"""How late the event loop is: what one long call on it costs all other requests."""

from __future__ import annotations

import asyncio

from prometheus_client import Histogram

_SECONDS = 0.05


class LoopLag:
    """Measures, twenty times a second, by how much the event loop is late."""

    def __init__(self, lag: Histogram) -> None:
        """`lag` takes the seconds."""
        self._lag = lag

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _SECONDS
            await asyncio.sleep(_SECONDS)
            self._lag.observe(max(0.0, loop.time() - due))
