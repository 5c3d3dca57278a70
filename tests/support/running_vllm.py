"""A vLLM engine that is started once and answers whole batches of requests."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cloudpickle import register_pickle_by_value  # type: ignore[import-untyped]

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.server.config import VllmEngineConfig
from polyrex.server.engines.base import GenerationRequest, SamplingParams
from polyrex.server.engines.vllm import engine as vllm_engine
from polyrex.server.engines.vllm.engine import VllmEngine
from polyrex.server.errors import EngineStopped

from .engine_calls import Answer, Asked, at_once

Result = TypeVar("Result")

LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
SMALL = VllmEngineConfig(
    eager=True,
    max_batch_tokens=64,  # so that prompts come in chunks
    max_running=64,
    max_context=448,
    slots=6,  # so few that they change hands; one is the base model's
    kv_cache_bytes=1 << 25,
)


class Running:
    """A started engine with its event loop."""

    def __init__(self, engine: VllmEngine, runner: asyncio.Runner) -> None:
        self.engine = engine
        self._runner = runner

    def run(self, work: Awaitable[Result]) -> Result:
        async def wait() -> Result:
            return await work

        return self._runner.run(wait())

    def answers(self, requests: Sequence[Asked], sampling: SamplingParams) -> list[Answer]:
        """Run all requests at once."""
        return self.run(at_once(self.engine, requests, sampling))

    def abandon(self, tokens: tuple[int, ...], task: TaskVersion) -> None:
        """Leave after the first token of a long completion."""

        async def run() -> None:
            request = GenerationRequest("abandoned", tokens, LONG, task)
            async with aclosing(self.engine.generate(request)) as chunks:
                async for _ in chunks:
                    return

        self.run(run())

    def in_workers(self, function: Any, *args: object) -> list[Any]:
        """Call a function of a worker in each of them, and return the results."""
        assert self.engine._engine is not None
        return self.run(self.engine._engine.collective_rpc(function, args=args))

    def adapt(self, inventory: Inventory) -> None:
        """Serve another inventory from now on, so that tests of many need only one engine."""
        self.in_workers(_adapt, str(inventory.path))
        self.engine._inventory = inventory


def _adapt(worker: Any, path: str) -> None:
    from polyrex.adapters.files.inventory import read_inventory
    from polyrex.server.engines.vllm.layers import RoutedLinearMethod
    from polyrex.server.engines.vllm.plugin import RouterManager

    runner = worker.model_runner
    for layer in runner.model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, RoutedLinearMethod):
            layer.quant_method = method._base
    runner.lora_manager = RouterManager(
        read_inventory(Path(path)), runner.vllm_config, runner.device
    )
    runner.lora_manager.create_lora_manager(runner.model, runner.vllm_config)


@contextmanager
def running_vllm(
    base_path: str, inventory: Inventory, dtype: str = "float32", **sizes: Any
) -> Iterator[Running]:
    """Start an engine, and stop it at the end; `sizes` are fields of VllmEngineConfig."""
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        # Tests send functions to the workers, which cannot import the tests.
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        if sizes.get("tensor_parallel") == 2:
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        engine = VllmEngine(base_path, inventory, replace(SMALL, **sizes), dtype)
        runner.run(engine.start())
        try:
            yield Running(engine, runner)
        finally:
            runner.run(engine.stop())
    with pytest.raises(EngineStopped):
        engine.check()


@contextmanager
def cached_tokens() -> Iterator[list[int]]:
    """Collect, for every output of vLLM, how many tokens of its prompt were in the prefix cache."""
    found: list[int] = []
    right = vllm_engine._chunk

    def spy(output: Any, sampling: SamplingParams) -> Any:
        found.append(output.num_cached_tokens)
        return right(output, sampling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "_chunk", spy)
        yield found


# vLLM pickles the functions that it runs in workers, which cannot import tests.
register_pickle_by_value(sys.modules[__name__])
