"""Runs the model: one step after another, each with tokens of many requests.

A step: the Scheduler says which requests get how many tokens -> Batch packs them in one row ->
TaskRouting sets their routing, PagedCache plans their attention -> one forward pass -> `score` and
`choose` turn each request's rows of the logits into tokens.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.base import EngineStats, Token, TokenChunk
from polyrex.server.errors import EngineError, EngineOutOfMemory, StartError

from .batch import Batch
from .decode_steps import DecodeSteps, Record, rounded
from .generation import Generation, Outcome
from .paged_cache import PagedCache, Span, attention_kernels, use_paged_attention
from .prefix_cache import BLOCK
from .sampling import choose, score
from .scheduler import Scheduler
from .task_routing import TaskRouting

logger = logging.getLogger(__name__)

Delivery = tuple[Generation, Outcome]

_MOST_FAILED_STEPS = 3  # in a row


class ModelRunner:
    """The model with all that changes while it runs. Only the engine's thread may change it."""

    def __init__(
        self,
        adapted: AdaptedModel,
        inventory: Inventory,
        config: EmbeddedConfig,
        record: Record | None = None,
    ) -> None:
        """Allocate the cache and the routing table; raises StartError if the sizes cannot work.

        With `record`, steps in which all requests decode are recorded and replayed.
        """
        if config.max_running > config.max_batch_tokens:
            raise StartError(
                f"max_running {config.max_running} is more than max_batch_tokens "
                f"{config.max_batch_tokens}: a step must hold a token of every running request"
            )
        model = adapted.model
        use_paged_attention(model)
        weight = next(model.parameters())
        model_config: Any = model.config
        capacity = config.kv_cache_tokens // BLOCK * BLOCK
        self.context_length = min(int(model_config.max_position_embeddings), capacity)
        self.vocabulary = int(model_config.vocab_size)
        self._blocks = capacity // BLOCK
        self._model = model
        self._device = weight.device
        self._eos = _eos_tokens(model)
        self._cache = PagedCache(model_config, capacity, weight.dtype, weight.device)
        most = max(config.max_batch_tokens, rounded(config.max_running))
        self._routing = TaskRouting(adapted, inventory, config, weight.device, most)
        self._scheduler = Scheduler(config, self._cache, self._routing.slots)
        self._decodes: DecodeSteps | None = None
        if record is not None:
            sizes = config.max_running, self.vocabulary
            self._decodes = DecodeSteps(model, self._cache, self._routing, *sizes, record)
        self._deliveries: list[Delivery] = []
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._prefix_queries = self._prefix_hits = 0
        self._failed_steps = 0  # in a row

    @property
    def idle(self) -> bool:
        """Whether there is no request to run."""
        return not (self._scheduler.running or self._scheduler.waiting)

    def stats(self, arriving: int) -> EngineStats:
        """A snapshot, for any thread; `arriving` requests have not been added yet."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting) + arriving,
            kv_cache_usage=self._cache.pool.usage,
            slots_used=self._routing.slots.used,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            adapter_steps=self._routing.steps,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            kv_block_size=BLOCK,
            kv_blocks=self._blocks,
            preemptions=self._scheduler.preemptions,
        )

    def prepare(self) -> None:
        """Do what would otherwise delay the first requests."""
        if self._decodes is not None:
            with attention_kernels(self._device):
                self._decodes.prepare()

    def add(self, generation: Generation) -> None:
        """Put a request at the end of the queue."""
        self._scheduler.waiting.append(generation)

    def abort(self, generation: Generation) -> None:
        """Forget a request that nobody waits for any more, if it has not ended already."""
        self._scheduler.remove(generation)

    def end_all(self, error: Exception) -> None:
        """End every request with an error."""
        for generation in [*self._scheduler.running, *self._scheduler.waiting]:
            self._end(generation, error)

    def take_deliveries(self) -> list[Delivery]:
        """The outcomes since the last call, for the callers that wait for them."""
        ready, self._deliveries = self._deliveries, []
        return ready

    def step(self) -> None:
        """Run one forward pass and draw the next token of every request that is ready for it.

        Whatever fails ends the request that it fails for, or the whole batch where that cannot be
        told. Raises RuntimeError where step after step fails: then the fault is not in a request.
        """
        spans: list[Span[Generation]] = []
        try:
            spans = self._schedule()
            if not spans:
                return
            self._steps += 1
            batch = Batch.pack(spans)
            with attention_kernels(self._device):
                logits = self._forward(batch)
            ready, rows = self._score(batch, logits)
        except Exception as error:
            self._fail_step(spans, error)
            return
        self._failed_steps = 0
        self._draw(ready, rows, logits)

    def _schedule(self) -> list[Span[Generation]]:
        try:
            return self._scheduler.schedule()
        finally:
            failed, self._scheduler.failed = self._scheduler.failed, []
            for generation, error in failed:
                self._fail(generation, error, "placing the request failed")

    def _fail_step(self, spans: Sequence[Span[Generation]], error: Exception) -> None:
        """End the requests of a batch; without one, those that may be why there is none."""
        scheduler = self._scheduler
        doomed = [span.request for span in spans]
        doomed = doomed or [*scheduler.running, *itertools.islice(scheduler.waiting, 1)]
        logger.error("a step failed, and with it its %d requests", len(doomed), exc_info=error)
        for generation in doomed:
            self._end(generation, _told(error, "the forward pass failed"))
        self._failed_steps += 1
        if self._failed_steps >= _MOST_FAILED_STEPS:
            raise RuntimeError(f"{self._failed_steps} steps in a row failed") from error

    def _score(self, batch: Batch, logits: Tensor) -> tuple[list[Generation], list[int]]:
        """Count and score what a batch has computed; who is ready to draw, from which rows."""
        ready, rows = [], []
        for span, own in zip(batch.spans, batch.rows, strict=True):
            generation = span.request
            generation.computed += span.count
            intact = self._score_prompt(generation, own.following, logits[own.scored])
            if own.last is not None and intact:
                ready.append(generation)
                rows.append(own.last)
        return ready, rows

    def _forward(self, batch: Batch) -> Tensor:
        """The logits [n, vocabulary] of a batch."""
        decoded = None if self._decodes is None else self._decodes.run(batch)
        if decoded is not None:
            return decoded
        self._routing.route(batch.slots)
        output = self._model(
            input_ids=torch.tensor([batch.tokens], device=self._device),
            position_ids=torch.tensor([batch.positions], device=self._device),
            use_cache=False,
            logits_to_keep=torch.tensor(batch.kept, device=self._device, dtype=torch.long),
            plan=self._cache.plan(batch.spans),
        )
        logits: Tensor = output.logits[0]
        return logits

    def _score_prompt(self, generation: Generation, tokens: Sequence[int], logits: Tensor) -> bool:
        """Add the log-probabilities of some prompt tokens; False if that failed the request."""
        if tokens:
            try:
                alternatives = generation.request.sampling.prompt_logprobs or 0
                generation.scores += score(logits, tokens, alternatives)
            except Exception as error:
                self._fail(generation, error, "scoring the prompt failed")
                return False
        return True

    def _draw(self, generations: Sequence[Generation], rows: Sequence[int], logits: Tensor) -> None:
        """Draw a token for each request, from its row of logits [n, vocabulary]."""
        if not generations:
            return
        chosen: Sequence[Token | Exception]
        try:
            own = logits if len(rows) == len(logits) else logits[rows]
            chosen = choose(own, [generation.draw for generation in generations])
        except Exception as error:
            chosen = [error] * len(generations)
        for generation, outcome in zip(generations, chosen, strict=True):
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                self._advance(generation, outcome)
            except Exception as error:
                self._fail(generation, error, "drawing the next token failed")

    def _advance(self, generation: Generation, token: Token) -> None:
        """Add a drawn token to its request, and deliver it."""
        sampling, prompt, cached = generation.request.sampling, None, generation.cached
        self._scheduler.share(generation)
        if not generation.generated:
            self._count_prompt(generation)
            prompt = None if sampling.prompt_logprobs is None else tuple(generation.scores)
        if sampling.max_tokens == 0:
            self._end(generation, TokenChunk((), "length", prompt, cached))
        elif token.id in self._eos and not sampling.ignore_eos:
            self._end(generation, TokenChunk((), "stop", prompt, cached))
        else:
            generation.tokens.append(token.id)
            self._generated_tokens += 1
            if generation.generated == sampling.max_tokens:
                self._end(generation, TokenChunk((token,), "length", prompt, cached))
            else:
                self._deliveries.append((generation, TokenChunk((token,), None, prompt, cached)))

    def _count_prompt(self, generation: Generation) -> None:
        self._prompt_tokens += len(generation.tokens)
        if self._scheduler.adopts(generation):
            self._prefix_queries += len(generation.tokens)
            self._prefix_hits += generation.cached

    def _fail(self, generation: Generation, error: Exception, what: str) -> None:
        if not isinstance(error, EngineError):
            logger.error("request %s failed", generation.request.id, exc_info=error)
        self._end(generation, _told(error, what))

    def _end(self, generation: Generation, outcome: Outcome) -> None:
        self._scheduler.remove(generation)
        self._deliveries.append((generation, outcome))


def _eos_tokens(model: nn.Module) -> frozenset[int]:
    """The tokens that end a completion, by the model's generation settings."""
    config: Any = model.generation_config
    tokens = config.eos_token_id
    if tokens is None:
        return frozenset()
    return frozenset([tokens] if isinstance(tokens, int) else tokens)


def _told(error: Exception, what: str) -> EngineError:
    """What a request is told of an error."""
    if isinstance(error, EngineError):
        return error
    if _out_of_memory(error):
        return EngineOutOfMemory("the engine had too little memory for this step")
    return EngineError(f"{what}: {error}")


def _out_of_memory(error: Exception) -> bool:
    # On a CPU, torch's allocator raises a RuntimeError, which its text alone tells apart.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
