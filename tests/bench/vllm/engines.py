"""The engines that `make bench-vllm` compares, behind one way of asking them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vllm import SamplingParams as VllmSamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from bench.serving import random_task
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.registry import TaskVersion
from polyrex.server.config import VllmConfig
from polyrex.server.engines.base import GenerationRequest, SamplingParams
from polyrex.server.engines.vllm.engine import VllmEngine

from .adapters import RANK, TARGETS

IN_FLIGHT = 32
CONTEXT = 1024
SIZES = VllmConfig(max_context=CONTEXT, kv_cache_bytes=1 << 30)  # five engines at once


class Contender(Protocol):
    """An engine that answers requests of numbered tasks; None is the base model."""

    def answer(self, prompt: list[int], new: int, task: int | None) -> AsyncGenerator[int, None]:
        """Numbers of tokens as they come."""

    async def stop(self) -> None: ...


class Plain:
    """vLLM itself, with LoRA off or with its own multi-LoRA."""

    def __init__(self, engine: AsyncLLM, adapters: Path | None) -> None:
        self._engine = engine
        self._adapters = adapters
        self._numbers = itertools.count()

    @classmethod
    async def start(
        cls, model: str, eager: bool, adapters: Path | None = None, rank: int = RANK
    ) -> Plain:
        lora: dict[str, Any] = {}
        if adapters is not None:  # a third slower where target modules are not named
            lora = {
                "enable_lora": True,
                "max_loras": IN_FLIGHT,
                "max_cpu_loras": IN_FLIGHT,
                "max_lora_rank": rank,
                "lora_target_modules": list(TARGETS),
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
        return cls(await asyncio.to_thread(AsyncLLM.from_engine_args, arguments), adapters)

    def _lora(self, task: int) -> LoRARequest:
        return LoRARequest(f"t{task}", task + 1, str(self._adapters / f"t{task}"))  # type: ignore[operator]

    async def add(self, task: int) -> float:
        """Load an adapter; seconds."""
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
    """polyrex on vLLM; `version` makes a numbered task's version, by default a random one."""

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
        config = replace(SIZES, eager=eager)
        engine = VllmEngine(model, inventory, config, "bfloat16")
        await engine.start()
        return cls(engine, version or partial(random_task, inventory))

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
