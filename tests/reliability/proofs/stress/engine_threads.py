"""The whole embedded engine, asked from several threads at once, each with its own event loop.

Clients leave at random moments: before the first token, between tokens, after the last. What they
get must be what the request gets alone, or the beginning of it; in the end nothing is held.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import torch

from polyrex.adapters.files.inventory import load_experts
from polyrex.adapters.model.base_model import load_base
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.base import GenerationRequest
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from polyrex.server.engines.embedded.generation import Outcome
from polyrex.server.errors import EngineError, EngineStopped
from reliability.result import Result
from support.reliability.small_base import SmallBase
from support.reliability.stress.engine_state import violations
from support.reliability.stress.requests import Answer, Known, known_requests

from .scheduler import KNOWN, plant

THREADS = 4
AT_ONCE = 8
"""Requests of each thread."""
LEAVING = 0.3
"""The share of requests whose clients do not wait for the end."""
SECONDS = 60
"""A generous wait for what should have come long before."""

SIZES = EmbeddedConfig(
    kv_cache_tokens=160, slots=4, max_running=8, max_batch_tokens=32, prefix_cache=True
)


@dataclass
class _Clients:
    """Those of all threads."""

    engine: EmbeddedEngine
    known: Sequence[Known]
    each: int  # requests of each thread
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def thread(self, seed: int) -> None:
        """Everything that one thread asks."""
        try:
            asyncio.run(self._ask(random.Random(seed)))
        except Exception as error:
            self.wrong.append(f"thread {seed}: {type(error).__name__} {error}")

    async def _ask(self, chosen: random.Random) -> None:
        numbers = iter(range(self.each))

        async def one_after_the_other() -> None:
            for _ in numbers:
                async with asyncio.timeout(SECONDS):
                    await self._one(chosen.choice(self.known), chosen)

        await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))

    async def _one(self, known: Known, chosen: random.Random) -> None:
        leaves = chosen.randrange(6) if chosen.random() < LEAVING else None
        if leaves == 0:
            await self._leave_at_once(known.request)
            return
        outcomes: list[Outcome] = []
        try:
            async with aclosing(self.engine.generate(known.request)) as chunks:
                async for chunk in chunks:
                    outcomes.append(chunk)
                    if len(outcomes) == leaves and chunk.finish_reason is None:
                        self.counts["left"] += 1
                        return
        except EngineStopped:
            raise
        except EngineError as error:
            outcomes.append(error)
        self.counts["answers"] += 1
        if not Answer.of(outcomes).agrees(known.alone):
            self.counts["answers that differ from those alone"] += 1
            self.wrong.append(f"{known.request.id}: {outcomes}, alone {known.alone}")

    async def _leave_at_once(self, request: GenerationRequest) -> None:
        """Go before the first token."""

        async def first() -> None:
            async with aclosing(self.engine.generate(request)) as chunks:
                await anext(chunks)

        asking = asyncio.create_task(first())
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        self.counts["left"] += 1


def engine_threads(small: SmallBase, *, each: int, defects: Sequence[str] = ()) -> Result:
    """Let every thread ask so many requests."""
    inventory = small.read_inventory()
    adapted = load_experts(inventory, load_base(str(small.base), torch.float32))
    known = known_requests(adapted, inventory, KNOWN)
    engine = EmbeddedEngine(adapted, inventory, replace(SIZES))
    plant(engine._runner, defects)
    clients = _Clients(engine, known, each)

    async def run() -> list[str]:
        await engine.start()
        threads = [threading.Thread(target=clients.thread, args=(n,)) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        left = await _left_behind(engine)
        await engine.stop()
        return left

    left = asyncio.run(run())
    return Result(
        goal="the embedded engine asked from several threads",
        length=f"{THREADS} threads, {each} requests of each, {AT_ONCE} at once",
        figures={
            "answers": clients.counts["answers"],
            "clients that left": clients.counts["left"],
            "answers that differ from those alone": clients.counts[
                "answers that differ from those alone"
            ],
            "errors": len(clients.wrong),
            "left behind": len(left),
        },
        at_most={"answers that differ from those alone": 0, "errors": 0, "left behind": 0},
        at_least={"answers": THREADS * each // 2, "clients that left": THREADS * each // 10},
        remarks=[*clients.wrong, *left],
    )


async def _left_behind(engine: EmbeddedEngine) -> list[str]:
    """What requests still hold when all have ended."""
    end = time.monotonic() + SECONDS
    while (stats := engine.stats()).running or stats.waiting:
        if time.monotonic() > end:
            return [f"{stats.running} requests run, {stats.waiting} wait"]
        await asyncio.sleep(0.01)
    pool = engine._runner._cache.pool
    held = [] if pool.available == pool._blocks else [f"{pool.usage} of the blocks are held"]
    return [*held, *violations(engine._runner)]
