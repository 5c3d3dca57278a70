"""What the server says of its event loop."""

from __future__ import annotations

import asyncio
import time

from prometheus_client import CollectorRegistry, Histogram

from polyrex.server.observability.loop_lag import LoopLag
from support.fake_server import Served


def test_a_call_that_keeps_the_loop_is_seen_as_long_as_it_took() -> None:
    registry = CollectorRegistry()
    lag = LoopLag(Histogram("lag", "lag", buckets=(0.1, 60), registry=registry))

    async def stall() -> None:
        measuring = asyncio.create_task(lag.run())
        await asyncio.sleep(0.2)
        time.sleep(0.5)
        await asyncio.sleep(0.2)
        measuring.cancel()
        await asyncio.gather(measuring, return_exceptions=True)

    asyncio.run(stall())
    above = (registry.get_sample_value("lag_bucket", {"le": "60.0"}) or 0) - (
        registry.get_sample_value("lag_bucket", {"le": "0.1"}) or 0
    )
    assert above >= 1


def test_a_server_measures_its_loop(served: Served) -> None:
    for _ in range(1000):
        text = served.client.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("polyrex_loop_lag")]
        if any(line.split()[0].endswith("_count") and float(line.split()[1]) for line in lines):
            break
        time.sleep(0.01)
    counts = [float(line.split()[1]) for line in lines if "_count" in line]
    assert len(counts) == 1
    assert counts[0] > 0
