"""An engine in virtual time behind the real admission, and tenants that ask it for completions."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from polyrex.server.admission.places import Ask, Places
from polyrex.server.config import ServerConfig
from polyrex.server.engines.base import (
    EngineStats,
    GenerationRequest,
    SamplingParams,
    Token,
    TokenChunk,
)
from polyrex.server.errors import ServerError

LONG = 1000.0
"""Seconds that a request may take where a test does not care."""


class SteppingEngine:
    """Gives each running completion a token every step, first come, first served.

    It is as `polyrex.server.engines.base.Engine` as far as admission uses it. It runs on whether
    its answers are read or not, and says at once when a completion has ended.
    """

    context_length = 4096

    def __init__(
        self, most_running: int = 16, step_seconds: float = 0.02, kv_blocks: int = 0
    ) -> None:
        self.most_running = most_running
        self.seen: list[str] = []
        self._step_seconds = step_seconds
        self._kv_blocks = kv_blocks
        self._running: dict[_Completion, None] = {}
        self._waiting: deque[_Completion] = deque()
        self._stepping: asyncio.Task[None] | None = None

    @property
    def under_way(self) -> int:
        """Completions that it has and has not ended."""
        return len(self._running) + len(self._waiting)

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0, 0, 0, 0, kv_block_size=16, kv_blocks=self._kv_blocks)

    async def start(self) -> None:
        raise NotImplementedError

    async def stop(self) -> None:
        raise NotImplementedError

    def check(self) -> None:
        return

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        self.seen.append(request.id)
        one = _Completion(request)
        self._waiting.append(one)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step_while_there_is_work())
        try:
            while True:
                chunk = await one.chunks.get()
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self._running.pop(one, None)
            if one in self._waiting:
                self._waiting.remove(one)

    async def _step_while_there_is_work(self) -> None:
        while self._running or self._waiting:
            while self._waiting and len(self._running) < self.most_running:
                self._running[self._waiting.popleft()] = None
            await asyncio.sleep(self._step_seconds)
            for one in list(self._running):
                one.given += 1
                over = one.given >= one.request.sampling.max_tokens
                one.chunks.put_nowait(TokenChunk((Token(1),), "length" if over else None))
                if over:
                    del self._running[one]
                    if one.request.ended is not None:
                        one.request.ended()


@dataclass(eq=False)
class _Completion:
    request: GenerationRequest
    given: int = 0
    chunks: asyncio.Queue[TokenChunk] = field(default_factory=asyncio.Queue)


def places(engine: SteppingEngine, **changes: Any) -> Places:
    """Admission before this engine, in the running loop's time; `changes` of ServerConfig."""
    config = replace(ServerConfig(), **changes)
    return Places(config, engine, asyncio.get_running_loop().time)


def ask(tenant: str = "a", *, completions: int = 1, tokens: int = 16, **changes: Any) -> Ask:
    """What a request of so many tokens a completion asks for, with next to no prompt."""
    return replace(Ask(tenant, 1, completions, 1.0, tokens), **changes)


@dataclass
class Seen:
    """What a tenant saw of its requests."""

    first_tokens: list[float] = field(default_factory=list)  # seconds, of those that were answered
    latencies: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)  # seconds until the refusal
    errors: Counter[str] = field(default_factory=Counter)


async def request(
    at: Places,
    wanted: Ask,
    seen: Seen | None = None,
    *,
    stall: float = 0.0,
    left: float = LONG,
) -> None:
    """One request as the routes make it; its reader waits for `stall` seconds before each chunk."""
    seen = seen if seen is not None else Seen()
    clock: Callable[[], float] = asyncio.get_running_loop().time
    began = clock()
    try:
        with at.admit(wanted, left) as place:
            await place.wait()
            place.meter.tokens += 1
            runs = [_read(place.generate, wanted, place.meter, stall)]
            runs += [
                _read(place.generate, wanted, place.meter, stall)
                for _ in range(wanted.completions - 1)
            ]
            firsts = await asyncio.gather(*runs)
            seen.first_tokens.append(min(firsts) - began)
            seen.latencies.append(clock() - began)
    except ServerError as error:
        seen.errors[type(error).__name__] += 1
        seen.refusals.append(clock() - began)


async def _read(generate: Any, wanted: Ask, meter: Any, stall: float) -> float:
    """Read one completion; returns when its first token came."""
    first = math.inf
    asked = GenerationRequest(wanted.tenant, (1,), SamplingParams(wanted.max_tokens or 16))
    async with aclosing(generate(asked)) as chunks:
        async for chunk in chunks:
            first = min(first, asyncio.get_running_loop().time())
            meter.tokens += 1
            meter.generated += 1
            meter.finished += chunk.finish_reason is not None
            if stall:
                await asyncio.sleep(stall)
    return first


async def open_loop(
    at: Places,
    wanted: Ask,
    rate: float,
    seconds: float,
    seen: Seen,
    *,
    seed: int = 0,
    stalled: float = 0.0,
) -> None:
    """Send requests at random moments, `rate` a second, without waiting for answers.

    A share of `stalled` of them reads nothing for a long time.
    """
    chance = random.Random(seed)
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    tasks = set()
    while loop.time() < end:
        await asyncio.sleep(chance.expovariate(rate))
        stall = 2.0 if chance.random() < stalled else 0.0
        task = asyncio.create_task(request(at, wanted, Seen() if stall else seen, stall=stall))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


def percentile(values: list[float], share: float) -> float:
    """The value below which so much of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
