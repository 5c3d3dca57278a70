"""Part 3: the embedded engine with many tasks, on a random model of Llama-3.1-8B's shape.

Requests of 17 prompt tokens generate 47 tokens each, all at once: without adapters, of one task, of
32, of 256 and of 1,024 distinct tasks, in turns. All prompts are one step, so that what is measured
is that step and 46 decode steps of all requests. A ratio is that of one turn over the mean of the
nearest turns without adapters. A baseline serves LoRAs of 256 tasks in plain PyTorch.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from bench.cases import MAIN, PROMPT_TOKENS
from bench.engine_requests import answer, tokens_per_second
from bench.gpu.part import Part, run_as_part
from bench.gpu.profiling import watched
from bench.gpu.subjects.lora_baselines import GatheredLoraLayer
from bench.gpu.subjects.random_model import SHAPE_8B, TINY, attach_random, detach, random_llama
from bench.harness import Turns
from polyrex.adapters.files.inventory import Inventory, read_inventory, write_inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.serving.builder import LayerBuilder
from polyrex.adapters.serving.layers import Slice
from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels.roofline.roofline import BYTES
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.embedded.engine import EmbeddedEngine

PROMPT = tuple(range(PROMPT_TOKENS))
NEW_TOKENS = 47
"""With the prompt, four whole blocks of the cache."""
WARM_UP_TOKENS = 3
LEVELS = {32: (1, 32), 256: (256,), 1024: (1024,)}
"""Numbers of requests at once, and of the distinct tasks among them."""
LORA_TASKS = 256
ROUNDS = 2
SHORT_RUN, WATCHED_STEPS = 2, 2
"""New tokens of a run that is watched, and how many more another has."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    levels: dict[int, tuple[int, ...]]
    few: dict[int, tuple[int, ...]]
    """What is measured also without graphs."""
    lora: int
    new_tokens: int
    rounds: int
    watched_steps: int
    seconds: float
    """Time that one engine may need for its levels."""

    @classmethod
    def of(cls, part: Part) -> Sizes:
        if part.dry:
            return cls({4: (1, 4)}, {4: (4,)}, 4, 3, 1, 2, 0)
        return cls(LEVELS, {32: (32,)}, LORA_TASKS, NEW_TOKENS, ROUNDS, WATCHED_STEPS, 12)

    @property
    def requests(self) -> int:
        """The most requests at once."""
        return max(*self.levels, self.lora)


@dataclass(frozen=True)
class Served:
    """An adapted model with its inventory and tasks, to make engines of."""

    part: Part
    sizes: Sizes
    adapted: AdaptedModel
    inventory: Inventory
    tasks: Sequence[TaskVersion]

    @classmethod
    @contextmanager
    def of(
        cls, part: Part, sizes: Sizes, model: torch.nn.Module, spec: AdapterSpec
    ) -> Iterator[Served]:
        """Within this context, the model has random adapters of a spec."""
        adapted = attach_random(model, spec)
        try:
            with TemporaryDirectory() as folder:
                path = Path(folder) / "inventory.safetensors"
                write_inventory(path, adapted)
                inventory = read_inventory(path)
                tasks = [_task(inventory, number) for number in range(sizes.requests)]
                yield cls(part, sizes, adapted, inventory, tasks)
        finally:
            detach(adapted)

    @asynccontextmanager
    async def engine(self, graphs: bool) -> AsyncIterator[EmbeddedEngine]:
        """A started engine; it is stopped at the end."""
        requests = self.sizes.requests
        config = EmbeddedConfig(
            max_batch_tokens=requests * PROMPT_TOKENS,
            max_running=requests,
            slots=requests + 2,
            kv_cache_tokens=requests * 64,
        )
        engine = EmbeddedEngine(self.adapted, self.inventory, config, gpu_graphs=graphs)
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop()
            del engine
            gc.collect()  # its cache and its graphs, before the next one allocates its own
            if self.part.device.type == "cuda":
                torch.cuda.empty_cache()

    async def levels(
        self, engine: EmbeddedEngine, levels: dict[int, tuple[int, ...]]
    ) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """For each number of requests, the tokens a second by number of tasks, and ratios."""
        for requests, distinct in levels.items():
            if self.part.left < self.sizes.seconds:
                self.part.leave_out(f"{requests} requests, and more", "no time left")
                return
            turns, each = Turns(), (0, *distinct)
            rounds = self.sizes.rounds if levels is self.sizes.levels else 1
            for tasks in each:  # kernels are compiled, and graphs recorded
                await self._all(engine, requests, tasks, WARM_UP_TOKENS)
            for tasks in (*each * rounds, 0):
                turns.add(
                    str(tasks), await self._all(engine, requests, tasks, self.sizes.new_tokens)
                )
            ratios = {f"{d} of base": turns.compare(str(d), "0").ratio for d in distinct}
            yield requests, {"tokens_per_second": turns.medians(), **ratios}

    async def step(self, engine: EmbeddedEngine, distinct: int) -> dict[str, Any]:
        """What the device does in a decode step of as many requests as tasks, or without tasks."""
        requests, more = min(self.sizes.levels), self.sizes.watched_steps
        works = []
        for new in (SHORT_RUN, SHORT_RUN + more):
            await self._all(engine, requests, distinct, new)  # graphs may be recorded
            with watched(self.part.device) as work:
                await self._all(engine, requests, distinct, new)
            works.append(work)
        return works[1].a_step(works[0], more)

    async def _all(self, engine: EmbeddedEngine, requests: int, distinct: int, new: int) -> float:
        """Have all requests generate `new` tokens at once; the tokens a second."""
        mix = [self.tasks[n % distinct] if distinct else None for n in range(requests)]
        return await tokens_per_second([answer(engine, PROMPT, new, task) for task in mix], new)


def _task(inventory: Inventory, number: int) -> TaskVersion:
    logits = torch.randn(inventory.routing_shape, generator=torch.Generator().manual_seed(number))
    return TaskVersion.unregistered(inventory, f"task-{number}", logits)


async def measure_method(served: Served, name: str, graphs: bool) -> None:
    """All levels of a method, and a step of 32 tasks; few of them where graphs are off."""
    part, sizes = served.part, served.sizes
    title = f"{name}, graphs {'on' if graphs else 'off'}"
    async with served.engine(graphs) as engine:
        for distinct in (0, min(sizes.levels)):
            found = await served.step(engine, distinct)
            part.add(f"{title}, a step of {distinct} tasks", found)
        async for requests, figures in served.levels(engine, sizes.levels if graphs else sizes.few):
            part.add(f"{title}, {requests} requests", figures)
    if part.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
        part.add(f"{title}, memory", {"peak_gb": round(peak, 2)})


async def measure_loras(served: Served, graphs: bool) -> None:
    """LoRAs of many tasks in plain PyTorch, in the same engine."""
    part, tasks = served.part, served.sizes.lora
    async with served.engine(graphs) as engine:
        async for requests, figures in served.levels(engine, {tasks: (tasks,)}):
            part.add(f"lora in PyTorch, {requests} requests", figures)


def _lora_layers(part: Part, tasks: int) -> Callable[..., GatheredLoraLayer]:
    """What builds a layer of LoRAs in place of `LayerBuilder.build`."""

    def build(_: LayerBuilder, slices: Sequence[Slice]) -> GatheredLoraLayer:
        return GatheredLoraLayer(slices, tasks, dtype_of(part), part.device)

    return build


def dtype_of(part: Part) -> torch.dtype:
    """The dtype of the model."""
    return torch.float32 if part.dry else torch.bfloat16


def measure(part: Part) -> None:
    """The part."""
    logging.basicConfig(level=logging.WARNING)
    sizes, shape = Sizes.of(part), TINY if part.dry else SHAPE_8B
    model = random_llama(shape, part.device, dtype_of(part))
    gc.freeze()  # or the collector goes through all modules while the clock runs
    part.add("model", {"layers": shape.layers, "gigabytes": BYTES * shape.parameters / 1e9})
    for name, spec in MAIN.items():
        _with_graphs(part, sizes, model, name, spec, True)
    part.try_to("lora in PyTorch", partial(_loras, part, sizes, model), sizes.seconds)
    for name, spec in MAIN.items():
        _with_graphs(part, sizes, model, name, spec, False)


def _with_graphs(
    part: Part, sizes: Sizes, model: torch.nn.Module, name: str, spec: AdapterSpec, graphs: bool
) -> None:
    """A method with graphs on or off."""

    def run() -> None:
        with Served.of(part, sizes, model, spec) as served:
            _run(part, measure_method(served, name, graphs))

    part.try_to(f"{name}, graphs {'on' if graphs else 'off'}", run, sizes.seconds)


def _loras(part: Part, sizes: Sizes, model: torch.nn.Module) -> None:
    layers = patch.object(LayerBuilder, "build", _lora_layers(part, sizes.lora))
    with Served.of(part, sizes, model, MAIN["trex-static"]) as served, layers:
        _run(part, measure_loras(served, True))


def _run(part: Part, work: Coroutine[Any, Any, None]) -> None:
    """Run to the end, or for as long as there is time."""
    asyncio.run(asyncio.wait_for(work, part.left))


if __name__ == "__main__":
    run_as_part("engine", __doc__, measure)
