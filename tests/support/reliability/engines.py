"""Engines whose answers say which router they were given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from polyrex.adapters.files.task import TaskVersion
from polyrex.server.engines.base import Engine, EngineStats, GenerationRequest, Token, TokenChunk

DIGITS = 16
"""The digits of a router's sha256 that an answer of EchoEngine holds."""


class EchoEngine:
    """Answers with the first digits of the sha256 of the pinned router: token n is the digit n."""

    context_length = 256
    most_running = 256

    async def start(self) -> None:
        """Nothing has to be loaded."""

    async def stop(self) -> None:
        """Nothing has to be freed."""

    def check(self) -> None:
        """It can always serve."""

    def stats(self) -> EngineStats:
        """Nothing is counted."""
        return EngineStats(0, 0, 0.0, 0, 0, 0, 0)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Every token at once."""
        await asyncio.sleep(0)
        digits = "0" * DIGITS if request.task is None else request.task.router.sha256[:DIGITS]
        yield TokenChunk(tuple(Token(int(digit, 16)) for digit in digits), "length")


@dataclass
class WrappedEngine:
    """An engine that does what another one does."""

    engine: Engine

    @property
    def context_length(self) -> int:
        """The engine's own."""
        return self.engine.context_length

    @property
    def most_running(self) -> int:
        """The engine's own."""
        return self.engine.most_running

    async def start(self) -> None:
        """Start the engine."""
        await self.engine.start()

    async def stop(self) -> None:
        """Stop the engine."""
        await self.engine.stop()

    def check(self) -> None:
        """Ask the engine."""
        self.engine.check()

    def stats(self) -> EngineStats:
        """The engine's own."""
        return self.engine.stats()

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """The engine's own."""
        return self.engine.generate(request)


@dataclass
class UnpinnedEngine(WrappedEngine):
    """A planted defect: the second half of an answer comes from the version current by then."""

    current: Callable[[str], TaskVersion]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Generate the first half, look the task up again, and generate the rest."""
        wanted = request.sampling.max_tokens
        first = replace(request.sampling, max_tokens=wanted // 2)
        prompt = request.prompt
        async with aclosing(self.engine.generate(replace(request, sampling=first))) as chunks:
            async for chunk in chunks:
                prompt += tuple(token.id for token in chunk.tokens)
                yield replace(chunk, finish_reason=None)
        task = request.task and self.current(request.task.info.name)
        second = replace(request.sampling, max_tokens=wanted - wanted // 2)
        rest = replace(request, id=f"{request.id}-rest", prompt=prompt, sampling=second, task=task)
        async with aclosing(self.engine.generate(rest)) as chunks:
            async for chunk in chunks:
                yield chunk
