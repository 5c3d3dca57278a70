"""Which requests run, and which of their tokens make up the next batch.

First come, first served, without exceptions: the request at the head of the queue waits for a
routing slot and for cache blocks, and none passes it, so none starves. When running requests use up
the cache, the youngest goes back to the head of the queue with what it has generated, and is
computed again later: no request is ever refused or cut short for lack of memory.

A request looks for a known prefix when it is admitted, and again before its tokens are computed: of
many requests that come at once with one system prompt, the first computes it for all.
"""

from __future__ import annotations

from collections import deque

from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.slots import SlotCache

from .generation import Generation
from .paged_cache import PagedCache, Span, packing_order
from .prefix_cache import PrefixCache


class Scheduler:
    """The queue and the running requests, oldest first. Only the engine's thread changes it."""

    def __init__(self, config: EmbeddedConfig, cache: PagedCache, slots: SlotCache) -> None:
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self.failed: list[tuple[Generation, Exception]] = []  # the runner takes them from here
        self.preemptions = 0
        self._config = config
        self._cache = cache
        self._slots = slots
        self._prefixes = PrefixCache(cache.pool)

    def schedule(self) -> list[Span[Generation]]:
        """The next batch: a token of every request that generates, then prompts as room allows.

        A request that cannot be placed for a fault of its own leaves, and is in `failed`.
        """
        self._admit()
        spans, budget = [], self._config.max_batch_tokens
        for generation in sorted(self.running, key=lambda one: one.pending > 1):
            if not generation.blocks or not budget:  # it had to go, for an older one's room
                continue
            try:
                count = self._count(generation, budget)
            except Exception as error:
                self.remove(generation)
                self.failed.append((generation, error))
                continue
            if count:
                spans.append(Span(generation, count))
                budget -= count
        return sorted(spans, key=packing_order)

    def remove(self, generation: Generation) -> None:
        """Forget a request, running or waiting, and free what it holds."""
        if generation in self.running:
            self.running.remove(generation)
            self._release(generation)
        elif generation in self.waiting:
            self.waiting.remove(generation)

    def adopts(self, generation: Generation) -> bool:
        """Whether a request may use what others have computed.

        Where the prompt's log-probabilities are asked for, all its tokens are computed.
        """
        return self._config.prefix_cache and (generation.request.sampling.prompt_logprobs is None)

    def share(self, generation: Generation) -> None:
        """Let others use what a request has computed; a token was drawn from it just now."""
        if self._config.prefix_cache:
            self._prefixes.remember(generation)

    def _adopt(self, generation: Generation) -> None:
        if self.adopts(generation):
            self._prefixes.adopt(generation)

    def _admit(self) -> None:
        """Let waiting requests run, as far as there are slots and blocks for them."""
        while self.waiting and len(self.running) < self._config.max_running:
            generation = self.waiting[0]
            try:
                if not self._place(generation):
                    return
            except Exception as error:
                self.failed.append((self.waiting.popleft(), error))
                continue
            self.running.append(self.waiting.popleft())

    def _place(self, generation: Generation) -> bool:
        """Give a request a slot and blocks; where there are none, or it fails, it holds nothing."""
        if not self._take_slot(generation):
            return False
        placed = False
        try:
            self._adopt(generation)
            placed = self._cache.reserve(generation.blocks, len(generation.tokens))
        finally:
            if not placed:
                self._release(generation)
        return placed

    def _take_slot(self, generation: Generation) -> bool:
        task = generation.request.task
        if task is None:
            return True
        slot = self._slots.acquire(task)
        if slot is None:
            return False
        generation.slot = slot
        return True

    def _count(self, generation: Generation, budget: int) -> int:
        """How many tokens of a running request are in the next batch; it has room for them."""
        self._adopt(generation)
        count = min(generation.pending, budget)
        return count if self._make_room(generation, generation.computed + count) else 0

    def _make_room(self, generation: Generation, tokens: int) -> bool:
        """Reserve blocks for a running request's tokens; False if it had to go back to the queue.

        A prompt's blocks are reserved when it is admitted, so only requests that generate ask for
        more, oldest first: a request that has to go is not in the batch yet.
        """
        while not self._cache.reserve(generation.blocks, tokens):
            youngest = self.running.pop()
            self.preemptions += 1
            self._release(youngest)
            self.waiting.appendleft(youngest)
            if youngest is generation:
                return False
        return True

    def _release(self, generation: Generation) -> None:
        self._cache.release(generation.blocks)
        generation.restart()
        task = generation.request.task
        if task is not None:
            self._slots.release(task)
