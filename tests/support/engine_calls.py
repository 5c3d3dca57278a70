"""Requests to an engine, and the same adapted model without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.kernels.routing import RoutingTable
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.base import Engine, GenerationRequest, SamplingParams, Token
from polyrex.server.engines.embedded.engine import EmbeddedEngine

MakeTask = Callable[[int], TaskVersion]
MakeEngine = Callable[..., EmbeddedEngine]
Asked = tuple[tuple[int, ...], TaskVersion | None]

GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
SMALL = EmbeddedConfig(kv_cache_tokens=2048, slots=64)


@dataclass(frozen=True)
class Answer:
    """A whole completion."""

    tokens: tuple[Token, ...]
    finish_reason: str | None
    prompt: tuple[Token, ...] | None
    cached: int = field(default=0, compare=False)
    """Tokens of the prompt that were not computed again: no part of what is answered."""

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token.id for token in self.tokens)


@dataclass(frozen=True)
class PlainModel:
    """The adapted model, run by transformers alone on whole sequences."""

    adapted: AdaptedModel
    inventory: Inventory

    def logprobs(self, tokens: tuple[int, ...], task: TaskVersion | None = None) -> Tensor:
        """Log-probabilities [tokens, vocabulary] of the token that follows each token."""
        table = RoutingTable(2, *self.inventory.table_shape, torch.device("cpu"))
        if task is not None:
            table.write(1, self.inventory.route(task.router.logits))
        slots = [0 if task is None else 1] * len(tokens)
        self.adapted.add_by_step(table.step(slots, torch.float32))
        with torch.inference_mode():
            logits: Tensor = self.adapted.model(torch.tensor([tokens])).logits[0]
        return logits.log_softmax(-1)

    def greedy(self, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
        tokens = prompt
        for _ in range(count):
            tokens += (int(self.logprobs(tokens)[-1].argmax()),)
        return tokens[len(prompt) :]


def prompt(seed: int, length: int = 14) -> tuple[int, ...]:
    """Random tokens; by default, the third token of the completion opens a new cache block."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(100, 40000, (length,), generator=generator).tolist())


async def complete(
    engine: Engine,
    tokens: tuple[int, ...],
    task: TaskVersion | None = None,
    sampling: SamplingParams = GREEDY,
    salt: str = "",
) -> Answer:
    """Run one request to its end."""
    answer = Answer((), None, None)
    request = GenerationRequest("test", tokens, sampling, task, salt)
    async with aclosing(engine.generate(request)) as chunks:
        async for chunk in chunks:
            answer = Answer(
                answer.tokens + chunk.tokens,
                chunk.finish_reason,
                answer.prompt or chunk.prompt,
                chunk.cached,
            )
    return answer


async def at_once(
    engine: Engine, requests: Sequence[Asked], sampling: SamplingParams = GREEDY
) -> list[Answer]:
    """Run many requests to their end, in the same batches."""
    return await asyncio.gather(
        *(complete(engine, tokens, task, sampling) for tokens, task in requests)
    )


@asynccontextmanager
async def started(engine: EmbeddedEngine) -> AsyncIterator[EmbeddedEngine]:
    """Start an engine, and stop it at the end."""
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
