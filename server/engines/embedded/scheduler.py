"""Which requests run, and which of their tokens make the next batch.

First come, first served, without exceptions: the request at the head of the queue waits for a
routing slot and for cache blocks, and nobody passes it, so nobody starves. When the cache runs
out under running requests, the youngest goes back to the head of the queue with what it has
generated, and is computed again later: nothing is ever refused or cut for lack of memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

import torch

from polyrex.server.config import EngineConfig
from polyrex.server.engines.base import GenerationRequest, Token, TokenChunk
from polyrex.server.engines.slots import SlotCache

from .paged_cache import PagedCache, Span, packing_order
from .sampling import Draw

Outcome = TokenChunk | Exception


@dataclass(eq=False)
class Generation:
    """A request under way: its tokens, and what it holds of the engine while it runs."""

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    # At most one entry a token, so no longer than the model's context.
    outcomes: asyncio.Queue[Outcome] = field(default_factory=asyncio.Queue)
    tokens: list[int] = field(init=False)  # prompt and completion
    scores: list[Token] = field(init=False)  # of the prompt, where they are asked for
    draw: Draw = field(init=False)
    computed: int = 0  # tokens whose keys are in the cache
    blocks: list[int] = field(default_factory=list)
    slot: int = 0

    def __post_init__(self) -> None:
        prompt, sampling = self.request.prompt, self.request.sampling
        self.tokens = list(prompt)
        self.scores = [Token(prompt[0])]
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        self.draw = Draw(sampling, generator)

    @property
    def generated(self) -> int:
        """Tokens of the completion so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens that a forward pass must still compute before the next one can be drawn."""
        return len(self.tokens) - self.computed

    def unscored(self, count: int) -> range:
        """Positions among the next `count` whose logits score a token of the prompt."""
        if self.request.sampling.prompt_logprobs is None:
            return range(0)
        end = min(self.computed + count, len(self.request.prompt) - 1)
        return range(max(self.computed, len(self.scores) - 1), end)


class Scheduler:
    """The queue and the running requests, oldest first. Only the engine's thread calls it."""

    def __init__(self, config: EngineConfig, cache: PagedCache, slots: SlotCache | None) -> None:
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self._config = config
        self._cache = cache
        self._slots = slots

    def schedule(self) -> list[Span[Generation]]:
        """The next batch: a token of every request that generates, then prompts while room is."""
        self._admit()
        spans, budget = [], self._config.max_batch_tokens
        for generation in sorted(self.running, key=lambda one: one.pending > 1):
            count = min(generation.pending, budget)
            if generation not in self.running or not count:
                continue
            if self._make_room(generation, generation.computed + count):
                spans.append(Span(generation, count))
                budget -= count
        return sorted(spans, key=packing_order)

    def remove(self, generation: Generation) -> None:
        """Forget a request, wherever it is, and free what it holds."""
        if generation in self.running:
            self.running.remove(generation)
            self._release(generation)
        elif generation in self.waiting:
            self.waiting.remove(generation)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._config.max_running:
            generation = self.waiting[0]
            if not self._take_slot(generation):
                return
            if not self._cache.reserve(generation.blocks, len(generation.tokens)):
                self._release(generation)
                return
            self.running.append(self.waiting.popleft())

    def _take_slot(self, generation: Generation) -> bool:
        task = generation.request.task
        if task is None:
            return True
        assert self._slots is not None, "the engine lets no task in without an inventory"
        slot = self._slots.acquire(task)
        if slot is None:
            return False
        generation.slot = slot
        return True

    def _make_room(self, generation: Generation, tokens: int) -> bool:
        """Blocks for a running request's tokens; False where it had to go back to the queue.

        A prompt's blocks were reserved when it was admitted, so it is requests that generate who
        ask for more, oldest first: whoever goes is not in the batch yet.
        """
        while not self._cache.reserve(generation.blocks, tokens):
            youngest = self.running.pop()
            self._release(youngest)
            youngest.computed = 0
            self.waiting.appendleft(youngest)
            if youngest is generation:
                return False
        return True

    def _release(self, generation: Generation) -> None:
        self._cache.release(generation.blocks)
        task = generation.request.task
        if task is not None and self._slots is not None:
            self._slots.release(task)
