"""An engine in a process of its own, which is started again when it dies or hangs."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any

from polyrex.server.engines.base import EngineStats, GenerationRequest, TokenChunk
from polyrex.server.errors import EngineRestarting, EngineStopped, StartError

from .failures import RESTARTING
from .running_host import TURN_SECONDS, RunningHost
from .wire import Start, unpack_chunk

logger = logging.getLogger(__name__)

_SLOWER_START = 3
"""How many times as long as the first start another one may take."""


@dataclass(frozen=True)
class Supervision:
    """When an engine is started again, and how often."""

    stall_seconds: float = 60.0  # a process that stands still for as long is killed
    pauses: tuple[float, ...] = (0.0, 1.0, 4.0)
    """Seconds before each new start; there are no more than these in a row."""
    healthy_seconds: float = 60.0
    """An engine that has served for as long begins a new row."""


class EngineClient:
    """Implements `base.Engine`: the engine is another process, which `host.py` runs.

    When that process ends, is stopped, or makes no progress, its requests end with
    EngineRestarting, and a new one takes its place. Requests bring their tasks with them, so it
    has nothing to learn. After too many ends in a row the engine is down for good.
    """

    def __init__(
        self,
        build: str,
        settings: dict[str, Any],
        most_running: int,
        supervision: Supervision | None = None,
    ) -> None:
        """`build` names a function, as `module:function`, that makes the engine of the settings.

        It is called in the engine's process, with settings as msgpack holds them.
        """
        self.most_running = most_running
        self._start_message = Start(build, settings, logging.getLogger().getEffectiveLevel())
        self._supervision = supervision or Supervision()
        self._host: RunningHost | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._context_length: int | None = None
        self._restarts = self._in_a_row = 0
        self._down: str | None = "the engine has not been started"
        self._restarting = False

    @property
    def context_length(self) -> int:
        """Raises EngineStopped until the engine has started for the first time."""
        if self._context_length is None:
            raise EngineStopped("the engine is starting")
        return self._context_length

    @property
    def pid(self) -> int | None:
        """The id of the engine's process, if there is one."""
        return None if self._host is None else self._host.pid

    async def start(self) -> None:
        """Raises StartError, and leaves no process behind."""
        try:
            self._host = host = await self._begin()
            ready = await asyncio.shield(host.ready)
        except OSError as error:
            raise StartError(f"the engine's process could not be started: {error}") from error
        except StartError:
            await host.gone()
            raise
        self._context_length = ready.context_length
        self._down = None
        self._supervising = asyncio.create_task(self._supervise(host))

    async def stop(self) -> None:
        self._down, self._restarting = "the engine is shutting down", False
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.gather(self._supervising, return_exceptions=True)
        if self._host is not None:
            await self._host.stop(EngineStopped(self._down))

    def check(self) -> None:
        self._serving()

    def stats(self) -> EngineStats:
        """What the process said last, at most a turn ago; its totals begin with it."""
        stats = EngineStats() if self._host is None else self._host.stats
        return replace(stats, restarts=self._restarts)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        host = self._serving()
        number, answers = host.ask(request)
        try:
            finished = False
            while not finished:
                outcome = await answers.get()
                if isinstance(outcome, Exception):
                    raise outcome
                chunk = unpack_chunk(outcome)
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            host.forget(number)

    def _serving(self) -> RunningHost:
        if self._down is not None:
            error = EngineRestarting if self._restarting else EngineStopped
            raise error(self._down)
        assert self._host is not None
        if self._host.ended.done():  # the supervisor has its turn next
            raise EngineRestarting(RESTARTING)
        return self._host

    async def _begin(self, start_turns: float = math.inf) -> RunningHost:
        stall_seconds = self._supervision.stall_seconds
        return await RunningHost.begin(self._start_message, stall_seconds, start_turns)

    async def _supervise(self, first: RunningHost) -> None:
        """Start the engine again whenever it has ended; return when it is given up."""
        longest = _SLOWER_START * first.ready_at + self._supervision.stall_seconds / TURN_SECONDS
        host: RunningHost | None = first
        try:
            while host is not None:
                reason = await asyncio.shield(host.ended)
                if host.served_seconds >= self._supervision.healthy_seconds:
                    self._in_a_row = 0
                host = await self._restart(host, reason, longest)
        except Exception:
            logger.exception("the engine cannot be supervised any more")
        self._down, self._restarting = "the engine failed too often, and is given up", False

    async def _restart(
        self, host: RunningHost, reason: str, start_turns: float
    ) -> RunningHost | None:
        """A new process, once its engine is ready; None where the engine is given up."""
        self._down, self._restarting = RESTARTING, True
        began = time.monotonic()
        for pause in self._supervision.pauses[self._in_a_row :]:
            self._in_a_row += 1
            logger.error("the engine %s; it is started again (%d in a row)", reason, self._in_a_row)
            await host.gone()
            await asyncio.sleep(pause)
            self._restarts += 1
            try:
                self._host = host = await self._begin(start_turns)
                await asyncio.shield(host.ready)
            except (StartError, OSError) as error:
                reason = f"did not start: {error}"
                continue
            self._down = None
            logger.warning("the engine serves again, after %.1f s", time.monotonic() - began)
            return host
        logger.critical("the engine %s; it is given up", reason)
        await host.gone()
        return None
