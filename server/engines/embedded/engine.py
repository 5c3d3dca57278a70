"""The embedded engine: continuous batching in this process, wherever torch and transformers run.

How a request travels: `generate` puts a Generation in the inbox -> the engine's thread adds it to
the ModelRunner -> every step (runner.py) computes tokens of many requests and draws the next ones
-> they go back to the callers, with one call into their event loop for the whole step.

How a task travels: its name became a version of it in server/requests/prepare.py. The engine knows
the version by the sha256 of its router, and gives it a slot, which is a row of the routing table,
while requests use it (engines/slots.py). The layers read the rows of the slots that occur in a step
(kernels/routing.py).

Why not transformers' own continuous batching? Except on CUDA, every request attends there, under a
dense mask, to the keys of all requests together, and the mask spans the whole cache (`make bench`
compares its throughput with ours). Besides, seeds, alternatives' and prompts' log-probabilities,
waiting for a slot, and failing one request alone would each override another private class.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.base import EngineStats, GenerationRequest, TokenChunk
from polyrex.server.engines.warm_up import warm_up
from polyrex.server.errors import EngineStopped

from .cuda_graphs import CudaGraphs
from .generation import Generation
from .runner import Delivery, ModelRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Abort:
    """Tells the engine's thread that nobody waits for this request any more."""

    generation: Generation


class _Stop:
    """Tells the engine's thread to end."""


class EmbeddedEngine:
    """Implements `base.Engine`.

    Everything that changes belongs to the engine's thread, which is reached through the inbox.
    """

    def __init__(self, adapted: AdaptedModel, inventory: Inventory, config: EmbeddedConfig) -> None:
        """`adapted` has the inventory's experts. Raises StartError if the sizes cannot work."""
        self._inventory = inventory
        self._most_running = config.max_running
        device = next(adapted.model.parameters()).device
        record = CudaGraphs() if config.cuda_graphs and device.type == "cuda" else None
        self._runner = ModelRunner(adapted, inventory, config, record)
        self._inbox: queue.SimpleQueue[Generation | _Abort | _Stop] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="polyrex-engine", daemon=True)
        self._down: str | None = "the engine has not been started"

    @property
    def context_length(self) -> int:
        return self._runner.context_length

    @property
    def most_running(self) -> int:
        return self._most_running

    async def start(self) -> None:
        self._down = None
        self._thread.start()
        await warm_up(self, self._inventory)

    async def stop(self) -> None:
        self._down = self._down or "the engine is shutting down"
        if self._thread.is_alive():
            self._inbox.put(_Stop())
            await asyncio.to_thread(self._thread.join)

    def check(self) -> None:
        if self._down is not None:
            raise EngineStopped(self._down)

    def stats(self) -> EngineStats:
        return self._runner.stats(arriving=self._inbox.qsize())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        self.check()
        request.check(self._runner.vocabulary, self._runner.context_length)
        generation = Generation(request, asyncio.get_running_loop())
        self._inbox.put(generation)
        self.check()  # again: a thread that ended in between has not seen the request
        over = False
        try:
            while not over:
                outcome = await generation.outcomes.get()
                over = isinstance(outcome, Exception) or outcome.finish_reason is not None
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
        finally:
            if not over:
                self._inbox.put(_Abort(generation))

    # From here on, everything runs in the engine's thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._runner.prepare()
                while self._receive():
                    self._runner.step()
                    _deliver(self._runner.take_deliveries())
        except Exception as error:
            logger.exception("the engine's thread died")
            self._down = f"the engine's thread died: {error}"
        self._end_all(EngineStopped(self._down or "the engine is down"))

    def _receive(self) -> bool:
        """Handle the messages that came in, waiting for one if idle; False means stop."""
        idle = self._runner.idle
        while idle or not self._inbox.empty():
            message = self._inbox.get()
            idle = False
            if isinstance(message, _Stop):
                return False
            if isinstance(message, _Abort):
                self._runner.abort(message.generation)
            else:
                self._runner.add(message)
        return True

    def _end_all(self, error: EngineStopped) -> None:
        """End the requests that run or wait, and those still in the inbox."""
        self._runner.end_all(error)
        unseen: list[Delivery] = []
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, Generation):
                unseen.append((message, error))
        _deliver([*self._runner.take_deliveries(), *unseen])


def _deliver(deliveries: Sequence[Delivery]) -> None:
    """Hand outcomes to the callers that wait for them, with one call per event loop."""
    for loop in {generation.loop for generation, _ in deliveries}:
        own = [delivery for delivery in deliveries if delivery[0].loop is loop]
        with suppress(RuntimeError):  # the loop is closed: nobody waits there any more
            loop.call_soon_threadsafe(_put, own)


def _put(deliveries: Sequence[Delivery]) -> None:
    for generation, outcome in deliveries:
        generation.outcomes.put_nowait(outcome)
