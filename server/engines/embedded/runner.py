"""Runs the model: one step after another, each with tokens of many requests.

A step: the Scheduler says which requests get how many tokens -> Batch packs them in one row ->
TaskRouting sets their routing, PagedCache plans their attention -> one forward pass -> `score` and
`choose` turn each request's rows of the logits into tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.base import EngineStats, Token, TokenChunk
from polyrex.server.errors import EngineError, StartError

from .batch import Batch
from .decode_steps import DecodeSteps, Record, rounded
from .generation import Generation, Outcome
from .paged_cache import PagedCache, attention_kernels, use_paged_attention
from .prefix_cache import BLOCK
from .sampling import choose, score
from .scheduler import Scheduler
from .task_routing import TaskRouting

logger = logging.getLogger(__name__)

Delivery = tuple[Generation, Outcome]


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
        """Run one forward pass and draw the next token of every request that is ready for it."""
        spans = self._scheduler.schedule()
        if not spans:
            return
        self._steps += 1
        try:
            batch = Batch.pack(spans)
            with attention_kernels(self._device):
                logits = self._forward(batch)
        except Exception as error:
            logger.exception("a forward pass failed, and with it its %d requests", len(spans))
            for span in spans:
                self._end(span.request, EngineError(f"the forward pass failed: {error}"))
            return
        ready, rows = [], []
        for span, own in zip(batch.spans, batch.rows, strict=True):
            generation = span.request
            generation.computed += span.count
            intact = self._score_prompt(generation, own.following, logits[own.scored])
            if own.last is not None and intact:
                ready.append(generation)
                rows.append(own.last)
        self._draw(ready, logits if len(rows) == len(logits) else logits[rows])

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
                self._fail(generation, error)
                return False
        return True

    def _draw(self, generations: Sequence[Generation], logits: Tensor) -> None:
        """Draw a token for each request, from its row of logits [n, vocabulary]."""
        if not generations:
            return
        chosen: Sequence[Token | Exception]
        try:
            chosen = choose(logits, [generation.draw for generation in generations])
        except Exception as error:
            chosen = [error] * len(generations)
        for generation, outcome in zip(generations, chosen, strict=True):
            if isinstance(outcome, Exception):
                self._fail(generation, outcome)
            else:
                self._advance(generation, outcome)

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

    def _fail(self, generation: Generation, error: Exception) -> None:
        if not isinstance(error, EngineError):
            logger.error("request %s failed", generation.request.id, exc_info=error)
            error = EngineError(f"drawing the next token failed: {error}")
        self._end(generation, error)

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
