"""The embedded engine on the real base model, in float32, and the same model without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from polyrex.adapters.attach import AdaptedModel
from polyrex.adapters.base_model import load_base
from polyrex.adapters.inventory import Inventory, load_experts
from polyrex.adapters.registry import TaskInfo, TaskVersion
from polyrex.adapters.router_file import read_router
from polyrex.kernels.routing import RoutingTable
from polyrex.server.config import EngineConfig
from polyrex.server.engines.base import Engine, GenerationRequest, SamplingParams, Token
from polyrex.server.engines.embedded import EmbeddedEngine

from .small_model import write_small_model

if TYPE_CHECKING:
    from tests.conftest import MakeRouter

MakeTask = Callable[[int], TaskVersion]
MakeEngine = Callable[..., EmbeddedEngine]
Asked = tuple[tuple[int, ...], TaskVersion | None]

GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
SMALL = EngineConfig(kv_cache_tokens=2048, slots=64)


@dataclass(frozen=True)
class Answer:
    """A whole completion."""

    tokens: tuple[Token, ...]
    finish_reason: str | None
    prompt: tuple[Token, ...] | None

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token.id for token in self.tokens)


@dataclass(frozen=True)
class PlainModel:
    """The same adapted model, run by transformers alone on whole sequences."""

    adapted: AdaptedModel
    inventory: Inventory

    def logprobs(self, tokens: tuple[int, ...], task: TaskVersion | None = None) -> Tensor:
        """Log-probabilities [tokens, vocabulary] of what follows each token."""
        table = RoutingTable(2, *self.inventory.table_shape, torch.device("cpu"))
        if task is not None:
            table.write(1, self.inventory.route(task.router.logits))
        slots = [0 if task is None else 1] * len(tokens)
        self.adapted.context.step = table.step(slots, torch.float32)
        with torch.inference_mode():
            logits: Tensor = self.adapted.model(torch.tensor([tokens])).logits[0]
        return logits.log_softmax(-1)

    def greedy(self, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
        tokens = prompt
        for _ in range(count):
            tokens += (int(self.logprobs(tokens)[-1].argmax()),)
        return tokens[len(prompt) :]


def prompt(seed: int, length: int = 14) -> tuple[int, ...]:
    """Random tokens; at this length the third token of a completion opens a new cache block."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(100, 40000, (length,), generator=generator).tolist())


async def complete(
    engine: Engine,
    tokens: tuple[int, ...],
    task: TaskVersion | None = None,
    sampling: SamplingParams = GREEDY,
) -> Answer:
    """Run one request to its end."""
    answer = Answer((), None, None)
    request = GenerationRequest("test", tokens, sampling, task)
    async with aclosing(engine.generate(request)) as chunks:
        async for chunk in chunks:
            answer = Answer(
                answer.tokens + chunk.tokens, chunk.finish_reason, answer.prompt or chunk.prompt
            )
    return answer


async def at_once(
    engine: Engine, requests: Sequence[Asked], sampling: SamplingParams = GREEDY
) -> list[Answer]:
    """Run many requests to their ends, in the same batches."""
    return await asyncio.gather(
        *(complete(engine, tokens, task, sampling) for tokens, task in requests)
    )


@asynccontextmanager
async def started(engine: EmbeddedEngine) -> AsyncIterator[EmbeddedEngine]:
    """A running engine, stopped at the end."""
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small random model."""
    folder: Path = tmp_path_factory.mktemp("small")
    write_small_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def adapted(base_path: str, random_inventory: Inventory) -> AdaptedModel:
    """The model that the engines of these tests run, one after the other."""
    return load_experts(random_inventory, load_base(base_path, torch.float32))


@pytest.fixture(scope="session")
def plain(base_path: str, random_inventory: Inventory) -> PlainModel:
    model = load_experts(random_inventory, load_base(base_path, torch.float32))
    return PlainModel(model, random_inventory)


@pytest.fixture(scope="session")
def make_engine(adapted: AdaptedModel, random_inventory: Inventory) -> MakeEngine:
    """Makes an engine, not started: `make_engine(slots=2)` changes a size."""

    def make(**sizes: int) -> EmbeddedEngine:
        config = replace(SMALL, **sizes)
        return EmbeddedEngine(adapted, adapted.model, random_inventory, config)

    return make


@pytest.fixture(scope="session")
def engine(make_engine: MakeEngine) -> Iterator[EmbeddedEngine]:
    """One engine for all tests that leave it as it was."""
    engine = make_engine()
    asyncio.run(engine.start())
    yield engine
    asyncio.run(engine.stop())


@pytest.fixture(scope="session")
def make_task(make_router: MakeRouter, random_inventory: Inventory) -> MakeTask:
    """Makes a task version with a random router: `make_task(seed)`."""

    def make(seed: int) -> TaskVersion:
        data = make_router(seed)
        router = read_router(data, "test", random_inventory)
        info = TaskInfo(f"task-{seed}", 1, router.sha256, len(data), 0.0, "", {}, {})
        return TaskVersion(info, router)

    return make
