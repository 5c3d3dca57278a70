"""The engines that `make bench-vllm` compares, behind one protocol."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

from vllm import SamplingParams as VllmSamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from bench.cases import RANK, REQUESTS
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.server.config import VllmEngineConfig
from polyrex.server.engines.base import GenerationRequest, SamplingParams
from polyrex.server.engines.vllm.engine import VllmEngine
from support.random_inventory import make_task

CONTEXT = 1024
LORA_LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The layers of vLLM's model that carry the seven projections."""
SIZES = VllmEngineConfig(max_context=CONTEXT, kv_cache_bytes=1 << 30)  # five engines at once


class Contender(Protocol):
    """An engine that answers requests for numbered tasks; None is the base model."""

    def answer(self, prompt: list[int], new: int, task: int | None) -> AsyncGenerator[int, None]:
        """Generate `new` tokens; yields the size of each chunk."""

    async def stop(self) -> None: ...


class Plain:
    """vLLM alone, with LoRA off or with its own multi-LoRA."""

    def __init__(self, engine: AsyncLLM, loras: Path | None) -> None:
        self._engine = engine
        self._loras = loras
        self._numbers = itertools.count()

    @classmethod
    async def start(
        cls, model: str, eager: bool, loras: Path | None = None, rank: int = RANK
    ) -> Plain:
        """Start with LoRA off, or with the LoRAs in the folders `loras/t0`, `loras/t1`, ..."""
        lora: dict[str, Any] = {}
        if loras is not None:
            # Without lora_target_modules, it would be a third slower.
            lora = {
                "enable_lora": True,
                "max_loras": REQUESTS,
                "max_cpu_loras": REQUESTS,
                "max_lora_rank": rank,
                "lora_target_modules": list(LORA_LAYERS),
            }
        arguments = AsyncEngineArgs(
            model=model,
            dtype="bfloat16",
            enforce_eager=eager,
            max_num_seqs=SIZES.max_running,
            max_num_batched_tokens=SIZES.max_batch_tokens,
            max_model_len=CONTEXT,
            kv_cache_memory_bytes=SIZES.kv_cache_bytes,
            **lora,
        )
        return cls(await asyncio.to_thread(AsyncLLM.from_engine_args, arguments), loras)

    def _lora(self, task: int) -> LoRARequest:
        return LoRARequest(f"t{task}", task + 1, str(self._loras / f"t{task}"))  # type: ignore[operator]

    async def add(self, task: int) -> float:
        """Load a task's LoRA; returns the seconds that it took."""
        started = time.perf_counter()
        await self._engine.add_lora(self._lora(task))
        return time.perf_counter() - started

    async def answer(
        self, prompt: list[int], new: int, task: int | None
    ) -> AsyncGenerator[int, None]:
        sampling = VllmSamplingParams(
            max_tokens=new,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        lora = None if task is None else self._lora(task)
        number = f"bench-{next(self._numbers)}"
        tokens = TokensPrompt(prompt_token_ids=prompt)
        async for output in self._engine.generate(tokens, sampling, number, lora_request=lora):
            yield len(output.outputs[0].token_ids)

    async def stop(self) -> None:
        await asyncio.to_thread(self._engine.shutdown)


class Polyrex:
    """polyrex on vLLM; `version` returns a numbered task's version."""

    def __init__(self, engine: VllmEngine, version: Callable[[int], TaskVersion]) -> None:
        self._engine = engine
        self._version = version

    @classmethod
    async def start(
        cls,
        model: str,
        eager: bool,
        inventory: Inventory,
        version: Callable[[int], TaskVersion] | None = None,
    ) -> Polyrex:
        """Start with random tasks, unless `version` names others."""
        config = replace(SIZES, eager=eager)
        engine = VllmEngine(model, inventory, config, "bfloat16")
        await engine.start()
        return cls(engine, version or cache(partial(make_task, inventory)))

    async def answer(
        self, prompt: list[int], new: int, task: int | None
    ) -> AsyncGenerator[int, None]:
        version = None if task is None else self._version(task)
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        request = GenerationRequest("bench", tuple(prompt), sampling, version)
        async with aclosing(self._engine.generate(request)) as chunks:
            async for chunk in chunks:
                yield len(chunk.tokens)

    async def stop(self) -> None:
        await self._engine.stop()


Starter = Callable[[], Awaitable[Any]]


@asynccontextmanager
async def started(engines: dict[str, Starter]) -> AsyncGenerator[dict[str, Any], None]:
    """Start engines by name; they are stopped at the end, whatever happens."""
    running: dict[str, Any] = {}
    try:
        for name, start in engines.items():
            print(f"starting {name}", flush=True)
            running[name] = await start()
        yield running
    finally:
        for engine in running.values():
            await engine.stop()
        gc.collect()
