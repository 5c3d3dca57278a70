"""The engines that `make bench-vllm` compares, behind one protocol."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from vllm import SamplingParams as VllmSamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from bench.cases import RANK, REQUESTS
from bench.engine_requests import answer
from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.methods.composed import LowRank
from polyrex.adapters.model.attach import find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.peft.lora_checkpoint import write_lora
from polyrex.server.config import VllmEngineConfig
from polyrex.server.engines.vllm.engine import VllmEngine
from support.random_inventory import make_task

CONTEXT = 1024
LORA_LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The layers of vLLM's model that carry the seven projections."""
SIZES = VllmEngineConfig(max_context=CONTEXT, kv_cache_bytes=1 << 30)  # five engines at once


class Contender(Protocol):
    """An engine that answers requests for numbered tasks; None is the base model."""

    async def answer(self, prompt: list[int], task: int | None, new: int) -> int:
        """Generate `new` tokens greedily; returns their number."""

    async def stop(self) -> None: ...


def write_loras(model: str, folder: Path, count: int) -> None:
    """Write random LoRAs for every projection of `model` to the folders t0, t1, ... ."""
    targets = find_targets(load_base(model, torch.float32))
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        modules = {
            target.name: LowRank(
                0.01 * torch.randn(1, RANK, target.d_in, generator=generator),
                0.01 * torch.randn(1, RANK, target.d_out, generator=generator),
            )
            for target in targets
        }
        write_lora(folder / f"t{number}", modules, model)


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

    async def answer(self, prompt: list[int], task: int | None, new: int) -> int:
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
        outputs = self._engine.generate(tokens, sampling, number, lora_request=lora)
        return sum([len(output.outputs[0].token_ids) async for output in outputs])

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

    async def answer(self, prompt: list[int], task: int | None, new: int) -> int:
        version = None if task is None else self._version(task)
        return await answer(self._engine, tuple(prompt), new, version)

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
