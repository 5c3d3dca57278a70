"""The embedded engine: continuous batching in this process, wherever torch and transformers run.

How a request goes: `generate` puts a Generation in the inbox -> the engine's thread takes it into
the Scheduler -> every step packs tokens of many requests in one row -> PagedCache plans their
attention, SlotCache their routing -> one forward pass -> `choose` draws the tokens -> they go back
to the callers, one call into their event loop for the whole step.

Why not transformers' own continuous batching? Away from CUDA every request attends there, under a
dense mask, to the keys of all requests together, and the mask spans the whole cache (`make bench`
has its throughput beside ours). Besides, seeds, top-N and prompt log-probabilities, waiting for a
slot, and failing one request alone would each override another private class.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.kernels.routing import RoutingTable
from polyrex.server.config import EngineConfig
from polyrex.server.engines.base import EngineStats, GenerationRequest, Token, TokenChunk
from polyrex.server.engines.slots import SlotCache
from polyrex.server.engines.warm_up import warm_up
from polyrex.server.errors import EngineError, EngineStopped, StartError

from .paged_cache import BLOCK, AttentionPlan, PagedCache, use_paged_attention
from .sampling import choose, score
from .scheduler import Generation, Outcome, Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Abort:
    """To the engine's thread: nobody waits for this request any more."""

    generation: Generation


class _Stop:
    """To the engine's thread: end."""


@dataclass(frozen=True)
class _Part:
    """The next `count` tokens of a request, in a batch."""

    generation: Generation
    count: int


class EmbeddedEngine:
    """Implements `base.Engine`; without an inventory it serves the base model alone.

    Everything that changes belongs to the engine's thread, which is reached through the inbox.
    """

    def __init__(
        self,
        adapted: AdaptedModel | None,
        model: nn.Module,
        inventory: Inventory | None,
        config: EngineConfig,
    ) -> None:
        """Allocate cache and routing table; raises StartError where the sizes cannot work."""
        if config.max_running > config.max_batch_tokens:
            raise StartError(
                f"max_running {config.max_running} is more than max_batch_tokens "
                f"{config.max_batch_tokens}: a step must hold a token of every running request"
            )
        use_paged_attention(model)
        weight = next(model.parameters())
        model_config: Any = model.config
        capacity = config.kv_cache_tokens // BLOCK * BLOCK
        self._context_length = min(int(model_config.max_position_embeddings), capacity)
        self._vocabulary = int(model_config.vocab_size)
        self._model = model
        self._adapted = adapted
        self._inventory = inventory
        self._dtype, self._device = weight.dtype, weight.device
        self._eos = _eos_tokens(model)
        self._cache = PagedCache(model_config, capacity, self._dtype, self._device)
        self._table: RoutingTable | None = None
        self._slots: SlotCache | None = None
        if inventory is not None:
            planner = None if adapted is None else adapted.serve(self._dtype, config.state_bytes)
            table = RoutingTable(
                config.slots, *inventory.table_shape, self._device, planner=planner
            )
            self._table, self._slots = (
                table,
                SlotCache(
                    config.slots,
                    lambda slot, task: table.write(slot, inventory.route(task.router.logits)),
                ),
            )
        self._scheduler = Scheduler(config, self._cache, self._slots)
        self._inbox: queue.SimpleQueue[Generation | _Abort | _Stop] = queue.SimpleQueue()
        self._outbox: list[tuple[Generation, Outcome]] = []
        self._thread = threading.Thread(target=self._run, name="polyrex-engine", daemon=True)
        self._down: str | None = "the engine has not been started"
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._adapter_steps: Counter[str] = Counter()

    @property
    def context_length(self) -> int:
        return self._context_length

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
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting) + self._inbox.qsize(),
            kv_cache_usage=self._cache.usage,
            slots_used=0 if self._slots is None else self._slots.used,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            adapter_steps=self._adapter_steps.copy(),
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        self.check()
        request.check(self._vocabulary, self._context_length)
        if request.task is not None and self._inventory is None:
            raise EngineError("the engine has no inventory, so it serves no tasks")
        generation = Generation(request, asyncio.get_running_loop())
        self._inbox.put(generation)
        self.check()  # again: a thread that ended in between has not seen it
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

    # The engine's thread, from here on.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._receive():
                    self._step()
                    self._flush()
        except Exception as error:
            logger.exception("the engine's thread died")
            self._down = f"the engine's thread died: {error}"
        self._end_all(EngineStopped(self._down or "the engine is down"))

    def _receive(self) -> bool:
        """Take what came in, waiting where there is nothing else to do; False: stop."""
        idle = not (self._scheduler.running or self._scheduler.waiting)
        while idle or not self._inbox.empty():
            message = self._inbox.get()
            idle = False
            if isinstance(message, _Stop):
                return False
            if isinstance(message, _Abort):
                self._scheduler.remove(message.generation)
            else:
                self._scheduler.waiting.append(message)
        return True

    def _step(self) -> None:
        spans = self._scheduler.schedule()
        if not spans:
            return
        self._steps += 1
        parts = [_Part(span.request, span.count) for span in spans]
        try:
            logits = self._forward(parts, self._cache.plan(spans))
        except Exception as error:
            logger.exception("a forward pass failed, and with it its %d requests", len(parts))
            for part in parts:
                self._end(part.generation, EngineError(f"the forward pass failed: {error}"))
            return
        row, ready, rows = 0, [], []
        for part in parts:
            generation, count = part.generation, part.count
            scored = generation.unscored(count)
            intact = self._score_prompt(generation, scored, logits[row : row + len(scored)])
            row += len(scored)
            generation.computed += count
            if not generation.pending:
                if intact:
                    ready.append(generation)
                    rows.append(row)
                row += 1
        self._draw(ready, logits if len(rows) == len(logits) else logits[rows])

    def _forward(self, parts: Sequence[_Part], plan: AttentionPlan) -> Tensor:
        """Logits [n, vocabulary], of each part first the scored positions, then the last one."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        kept: list[int] = []
        for part in parts:
            generation, count = part.generation, part.count
            start, end = generation.computed, generation.computed + count
            kept += [len(tokens) + place - start for place in generation.unscored(count)]
            tokens += generation.tokens[start:end]
            if end == len(generation.tokens):
                kept.append(len(tokens) - 1)
            positions += range(start, end)
            slots += [generation.slot] * count
        if self._adapted is not None and self._table is not None:
            step = self._adapted.context.step = self._table.step(slots, self._dtype)
            if step is not None:
                self._adapter_steps[step.plan.path] += 1
        output = self._model(
            input_ids=torch.tensor([tokens], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            use_cache=False,
            logits_to_keep=torch.tensor(kept, device=self._device, dtype=torch.long),
            plan=plan,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _score_prompt(self, generation: Generation, positions: range, logits: Tensor) -> bool:
        """Note the log-probabilities of prompt tokens; False where that failed the request."""
        if positions:
            following = generation.tokens[positions.start + 1 : positions.stop + 1]
            try:
                alternatives = generation.request.sampling.prompt_logprobs or 0
                generation.scores += score(logits, following, alternatives)
            except Exception as error:
                self._fail(generation, error)
                return False
        return True

    def _draw(self, generations: Sequence[Generation], logits: Tensor) -> None:
        """Draw a token for each request, from its row of logits [n, vocabulary]."""
        if not generations:
            return
        chosen = choose(logits, [generation.draw for generation in generations])
        for generation, outcome in zip(generations, chosen, strict=True):
            if isinstance(outcome, Exception):
                self._fail(generation, outcome)
            else:
                self._advance(generation, outcome)

    def _advance(self, generation: Generation, token: Token) -> None:
        """Add a drawn token to its request, and tell the caller."""
        sampling, prompt = generation.request.sampling, None
        if not generation.generated:
            self._prompt_tokens += len(generation.tokens)
            prompt = None if sampling.prompt_logprobs is None else tuple(generation.scores)
        if sampling.max_tokens == 0:
            self._end(generation, TokenChunk((), "length", prompt))
        elif token.id in self._eos and not sampling.ignore_eos:
            self._end(generation, TokenChunk((), "stop", prompt))
        else:
            generation.tokens.append(token.id)
            self._generated_tokens += 1
            if generation.generated == sampling.max_tokens:
                self._end(generation, TokenChunk((token,), "length", prompt))
            else:
                self._outbox.append((generation, TokenChunk((token,), None, prompt)))

    def _fail(self, generation: Generation, error: Exception) -> None:
        if not isinstance(error, EngineError):
            logger.error("request %s failed", generation.request.id, exc_info=error)
            error = EngineError(f"drawing the next token failed: {error}")
        self._end(generation, error)

    def _end(self, generation: Generation, outcome: Outcome) -> None:
        self._scheduler.remove(generation)
        self._outbox.append((generation, outcome))

    def _flush(self) -> None:
        """Hand what became ready to the callers, with one call an event loop."""
        for loop in {generation.loop for generation, _ in self._outbox}:
            ready = [entry for entry in self._outbox if entry[0].loop is loop]
            with suppress(RuntimeError):  # the loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(_deliver, ready)
        self._outbox.clear()

    def _end_all(self, error: EngineStopped) -> None:
        for generation in [*self._scheduler.running, *self._scheduler.waiting]:
            self._end(generation, error)
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, Generation):
                self._outbox.append((message, error))
        self._flush()


def _deliver(ready: list[tuple[Generation, Outcome]]) -> None:
    for generation, outcome in ready:
        generation.outcomes.put_nowait(outcome)


def _eos_tokens(model: nn.Module) -> frozenset[int]:
    """The tokens that end a completion, by the model's generation settings."""
    config: Any = model.generation_config
    tokens = config.eos_token_id
    if tokens is None:
        return frozenset()
    return frozenset([tokens] if isinstance(tokens, int) else tokens)
