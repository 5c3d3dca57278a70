"""A request's places in the engine, one for each of its completions, as they become free."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from polyrex.server.engines.base import Engine, GenerationRequest, TokenChunk
from polyrex.server.errors import DeadlineExceeded, Overloaded

from .fair_queue import Waiting
from .quotas import Meter
from .shares import DrainRate, Mean, Share


class _Places(Protocol):
    """What a request needs of places.py."""

    engine: Engine
    clock: Callable[[], float]
    drain: DrainRate
    first_token: Mean

    def give_back(self, place: Place, completions: int) -> None: ...
    def leave(self, place: Place, tokens: float) -> None: ...
    def refuse(self, place: Place, error: Overloaded | DeadlineExceeded) -> None: ...
    def too_late(self, place: Place) -> Overloaded | DeadlineExceeded: ...


class Place:
    """Made by `Places.admit`; as a context, it gives back all that it has when it ends."""

    waiting: Waiting[Place]
    longest: float  # seconds to wait for the first place, at most

    def __init__(
        self, places: _Places, share: Share[Place], completions: int, prompt: float, since: float
    ) -> None:
        """`prompt` are a completion's tokens of the prompt, by estimate."""
        self.share = share
        self.since = since
        self.running = 0  # completions that have a place now
        self.granted = 0  # completions that have or had one
        self.meter = Meter()  # of what the request has had
        self._places = places
        self._completions = completions
        self._prompt = prompt
        self._free = 0  # places that no completion has taken yet
        self._turns: deque[asyncio.Future[None]] = deque()
        self._granted_at = since
        self._refused: Overloaded | DeadlineExceeded | None = None
        self._begun = False
        self._over = False

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        whole = self.meter.finished >= self._completions
        had: float = self.meter.tokens if self._begun else 0
        if self._begun and not whole:
            # How much the engine did for a client that left is not known: not less than expected.
            had = max(had, self.granted * self.waiting.cost)
        if whole:
            self.share.typical.add(self.meter.generated / self._completions)
        self._places.leave(self, had)

    @property
    def waits(self) -> bool:
        """Whether not even one of its completions has a place."""
        return not self.granted

    async def wait(self) -> float:
        """Wait for the first place; returns the seconds that it took.

        Raises Overloaded, or DeadlineExceeded, where it does not come in time.
        """
        if self.waits:
            left = self.longest - (self._places.clock() - self.since)
            try:
                async with asyncio.timeout(left):
                    await self._turn()
            except TimeoutError:
                if self._refused is None:
                    self._places.refuse(self, self._places.too_late(self))
                assert self._refused is not None
                raise self._refused from None
            self._free += 1  # for the completion that takes it
        return self._granted_at - self.since

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """As the engine's own: streams a completion of this request, once it has a place."""
        await self._turn()
        run = _Run(self, self._places)
        try:
            asked = replace(request, ended=run.end)
            async with aclosing(self._places.engine.generate(asked)) as chunks:
                async for chunk in chunks:
                    if not self._begun:
                        self._begun = True
                        now = self._places.clock()
                        self._places.first_token.add(now - self._granted_at)
                    run.tokens += len(chunk.tokens)
                    yield chunk
        except Exception:
            run.failed = True
            raise
        finally:
            run.close(self._prompt)

    def grant(self, now: float) -> None:
        """One more of the completions may run."""
        if not self.granted:
            self._granted_at = now
        self.granted += 1
        if not self._wake():
            self._free += 1

    def refuse(self, error: Overloaded | DeadlineExceeded) -> None:
        """Let the request end with an error instead of waiting on."""
        self._refused = error
        self._wake()

    def end_one(self) -> None:
        """The engine has nothing more to do for one of the completions."""
        if not self._over:
            self._places.give_back(self, 1)

    async def _turn(self) -> None:
        """Take a place, as soon as there is one."""
        if self._free:
            self._free -= 1
            return
        if self._refused is None:
            turn = asyncio.get_running_loop().create_future()
            self._turns.append(turn)
            await turn
        if self._refused is not None:
            raise self._refused

    def _wake(self) -> bool:
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(None)
                return True
        return False


class _Run:
    """One completion in the engine."""

    def __init__(self, place: Place, places: _Places) -> None:
        self.tokens = 0  # generated and read
        self.failed = False
        self._place = place
        self._places = places
        self._began = places.clock()
        self._ended: float | None = None

    def end(self) -> None:
        """The engine is done with it, though the reader may not be."""
        if self._ended is None:
            self._ended = self._places.clock()
            self._place.end_one()

    def close(self, prompt: float) -> None:
        """Nobody reads on; `prompt` are its tokens of the prompt, by estimate."""
        self.end()
        if self.tokens and not self.failed and self._ended is not None:
            self._places.drain.add(prompt + self.tokens, self._ended - self._began)
