"""The vLLM engine: requests of any mix of tasks in vLLM's own continuous batching.

How a request travels: `generate` gives its task version a slot -> its routing weights, kilobytes,
are sent to every worker ahead of the request -> the request is sent to vLLM with a LoRA whose id is
the slot and whose name is the router's sha256, which keeps tasks apart in vLLM's prefix cache, as
the request's cache salt does tenants -> in the workers, plugin.py turns the ids of a step's tokens
into routing weights.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from vllm import SamplingParams as VllmSamplingParams
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.fingerprint import fingerprint
from polyrex.server.config import VllmEngineConfig
from polyrex.server.engines.base import (
    EngineStats,
    GenerationRequest,
    SamplingParams,
    Token,
    TokenChunk,
)
from polyrex.server.engines.slots import SlotCache
from polyrex.server.engines.warm_up import warm_up
from polyrex.server.errors import EngineError, EngineStopped, StartError

from .layers import OPERATOR
from .plugin import CONFIG_KEY, WorkerExtension

_CACHE_UPDATES = ("vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update")


class VllmEngine:
    """Implements `base.Engine` on vLLM's AsyncLLM, which runs in separate processes.

    Slots are given first come, first served: while one request waits for a slot, all later ones
    wait too, even if their task has one. Otherwise they could keep the slots in use for ever, and
    the waiting request would starve.
    """

    def __init__(
        self,
        model: str,
        inventory: Inventory,
        config: VllmEngineConfig,
        dtype: str,
    ) -> None:
        """`model` is a folder or hub id. `check_build` says whether this vLLM will do.

        Raises BaseModelMismatch where its weights are not those that the inventory was made for;
        workers check the rest of its identity as they start.
        """
        self._weights = fingerprint(model)
        if self._weights is not None:
            inventory.base.check_weights(self._weights, str(inventory.path))
        self._inventory = inventory
        self._most_running = config.max_running
        self._arguments = _arguments(model, inventory, config, dtype)
        self._slots = SlotCache(config.slots, self._write)
        self._writes: dict[int, asyncio.Future[Any]] = {}  # by slot
        self._vacancy = asyncio.Event()
        self._queue = asyncio.Lock()  # held while waiting for a slot; asyncio's locks are fair
        self._queued = 0
        self._numbers = itertools.count()
        self._stats = _Stats()
        self._down: str | None = "the engine has not been started"
        self._engine: AsyncLLM | None = None

    @property
    def context_length(self) -> int:
        """Raises EngineStopped until the engine has been started."""
        length: int = self._started().model_config.max_model_len
        return length

    @property
    def most_running(self) -> int:
        return self._most_running

    async def start(self) -> None:
        def make() -> AsyncLLM:
            return AsyncLLM.from_engine_args(self._arguments, stat_loggers=[lambda *_: self._stats])

        try:
            self._engine = engine = await asyncio.to_thread(make)
        except Exception as error:
            raise StartError(f"vLLM did not start: {error}") from error
        cache = engine.vllm_config.cache_config
        self._stats.kv_block_size = cache.block_size or 0
        self._stats.kv_blocks = cache.num_gpu_blocks or 0
        if self._weights is None:  # but vLLM may have downloaded them by now
            found = await asyncio.to_thread(fingerprint, self._arguments.model)
            self._inventory.base.check_weights(found, str(self._inventory.path))
        self._down = None
        await warm_up(self, self._inventory)

    async def stop(self) -> None:
        self._down = self._down or "the engine is shutting down"
        engine, self._engine = self._engine, None
        if engine is None:
            return
        # Because vLLM's own shutdown may leave callers waiting for ever.
        engine.output_processor.propagate_error(EngineDeadError())
        self._vacancy.set()
        await asyncio.to_thread(engine.shutdown)

    def check(self) -> None:
        if self._down is None and self._engine is not None and self._engine.errored:
            self._down = "vLLM's engine died"
        if self._down is not None:
            raise EngineStopped(self._down)

    def stats(self) -> EngineStats:
        return self._stats.snapshot(self._slots.used, self._queued)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        self.check()
        engine, task = self._started(), request.task
        request.check(engine.model_config.get_vocab_size(), self.context_length)
        lora = None if task is None else await self._acquire(task)
        try:
            # In one turn of the event loop the slot's write is sent. vLLM handles messages in the
            # order of sending, so the request can follow without waiting for an answer.
            await asyncio.sleep(0)
            outputs = engine.generate(
                tokens_input(list(request.prompt), cache_salt=request.cache_salt or None),
                _sampling(request.sampling),
                f"{request.id}-{next(self._numbers)}",
                lora_request=lora,
            )
            async with aclosing(outputs):
                async for output in outputs:
                    if lora is not None:  # the write is done by now, but it may have failed
                        await asyncio.shield(self._writes[lora.lora_int_id])
                    yield _chunk(output, request.sampling)
        except EngineDeadError as error:
            self._down = self._down or "vLLM's engine died"
            raise EngineStopped(self._down) from error
        finally:
            if task is not None:
                self._slots.release(task)
                self._vacancy.set()

    def _started(self) -> AsyncLLM:
        if self._engine is None:
            raise EngineStopped(self._down or "the engine is down")
        return self._engine

    async def _acquire(self, task: TaskVersion) -> LoRARequest:
        """Wait in turn for a slot, and begin to write the task version to it.

        Returns the task version as vLLM knows it; name and path are keys of its prefix cache.
        """
        self._queued += 1
        try:
            async with self._queue:
                self.check()
                while (slot := self._slots.acquire(task)) is None:
                    self._vacancy.clear()
                    await self._vacancy.wait()
                    self.check()
        finally:
            self._queued -= 1
        sha256 = task.info.router_sha256
        return LoRARequest(sha256, slot, f"polyrex:{sha256}")

    def _write(self, slot: int, task: TaskVersion) -> None:
        """Begin to write a task's routing weights to a slot in every worker."""
        method, row = WorkerExtension.polyrex_write.__name__, task.router.weights.numpy().tobytes()
        call = self._started().collective_rpc(method, args=(slot, row))
        self._writes[slot] = asyncio.ensure_future(call)


def _arguments(
    model: str, inventory: Inventory, config: VllmEngineConfig, dtype: str
) -> AsyncEngineArgs:
    ours = {
        "inventory": str(inventory.path.resolve()),
        "sha256": inventory.sha256,
        "state_bytes": config.state_bytes,
    }
    return AsyncEngineArgs(
        model=model,
        skip_tokenizer_init=True,  # because engines work on token ids
        dtype=dtype,
        enforce_eager=config.eager,
        tensor_parallel_size=config.tensor_parallel,
        max_num_seqs=config.max_running,
        max_num_batched_tokens=config.max_batch_tokens,
        max_model_len=config.max_context,
        kv_cache_memory_bytes=config.kv_cache_bytes,
        enable_lora=True,
        max_loras=config.slots - 1,
        max_lora_rank=1,  # allocates nothing: RouterManager (plugin.py) holds the weights
        worker_cls=_worker_class(config.eager),
        worker_extension_cls=_dotted_name(WorkerExtension),
        additional_config={CONFIG_KEY: ours},
        **_graphs(config.eager, config.experimental_graphs),
    )


def _worker_class(eager: bool) -> str:
    """The worker's class by name, as vLLM's processes import it; "auto" is vLLM's choice."""
    if eager or not current_platform.is_cpu():
        return "auto"
    from .cpu_worker import CompilingCpuWorker  # imports parts of vLLM that run on CPUs only

    return _dotted_name(CompilingCpuWorker)


def _dotted_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _graphs(eager: bool, whole: bool) -> dict[str, Any]:
    """Settings with which CUDA graphs are captured between our operators.

    If `whole`, a graph of a decode step reaches across them: it is replayed with the addresses of
    its capture, where the routing of every step is found (plugin.py). Steps with prompts in them
    keep to the pieces in between, whose compiled code layers share: our operator's name of its
    layer would make each a piece of its own.
    """
    if eager or not current_platform.is_cuda():
        return {}
    between = [*CompilationConfig._attention_ops, *_CACHE_UPDATES, f"vllm::{OPERATOR}"]
    mode = CUDAGraphMode.FULL_AND_PIECEWISE if whole else CUDAGraphMode.PIECEWISE
    return {"compilation_config": CompilationConfig(cudagraph_mode=mode, splitting_ops=between)}


def _sampling(sampling: SamplingParams) -> VllmSamplingParams:
    return VllmSamplingParams(
        max_tokens=max(1, sampling.max_tokens),  # if 0, _chunk drops the one token
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        # The generator is the same modulo 2**64; vLLM would take -1 for no seed.
        seed=None if sampling.seed is None else sampling.seed % 2**64,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        ignore_eos=sampling.ignore_eos,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _chunk(output: RequestOutput, sampling: SamplingParams) -> TokenChunk:
    (completion,) = output.outputs
    reason = completion.finish_reason
    if reason not in (None, "stop", "length"):
        raise EngineError(f"vLLM ended the request: {reason}")
    prompt, cached = None, output.num_cached_tokens or 0
    # Only the first output has them; later ones have an empty list.
    if sampling.prompt_logprobs is not None and output.prompt_logprobs:
        ids = output.prompt_token_ids or []
        prompt = _tokens(ids, output.prompt_logprobs, sampling.prompt_logprobs)
    if sampling.max_tokens == 0:
        return TokenChunk((), "length", prompt, cached)
    tokens = _tokens(completion.token_ids, completion.logprobs, sampling.logprobs)
    if reason == "stop":  # its last token is the end-of-sequence token
        tokens = tokens[:-1]
    return TokenChunk(tokens, reason, prompt, cached)


def _tokens(
    ids: Sequence[int],
    logprobs: Sequence[Mapping[int, Logprob] | None] | None,
    alternatives: int | None,
) -> tuple[Token, ...]:
    if logprobs is None or alternatives is None:
        return tuple(Token(id) for id in ids)
    return tuple(_token(id, found, alternatives) for id, found in zip(ids, logprobs, strict=True))


def _token(id: int, found: Mapping[int, Logprob] | None, alternatives: int) -> Token:
    if found is None:  # the first token of a prompt
        return Token(id)
    ranked = sorted(found.items(), key=lambda item: item[1].rank or 0)[:alternatives]
    return Token(id, found[id].logprob, tuple((other, p.logprob) for other, p in ranked))


class _Stats(StatLoggerBase):  # type: ignore[misc]
    """The state that vLLM's scheduler reported last, and running totals."""

    def __init__(self) -> None:
        self._running = self._waiting = 0
        self._usage = 0.0
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._prefix_queries = self._prefix_hits = 0
        self._preemptions = 0
        self.kv_block_size = self.kv_blocks = 0  # known once vLLM has started

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: object, **__: object) -> None:
        if scheduler_stats is not None:
            self._steps += 1
            self._running = scheduler_stats.num_running_reqs
            self._waiting = scheduler_stats.num_waiting_reqs
            self._usage = scheduler_stats.kv_cache_usage
            self._prefix_queries += scheduler_stats.prefix_cache_stats.queries
            self._prefix_hits += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self._prompt_tokens += iteration_stats.num_prompt_tokens
            self._generated_tokens += iteration_stats.num_generation_tokens
            self._preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        pass

    def snapshot(self, slots_used: int, queued: int) -> EngineStats:
        """A snapshot; vLLM does not know of the `queued` requests, which wait for a slot."""
        return EngineStats(
            running=self._running,
            waiting=self._waiting + queued,
            kv_cache_usage=self._usage,
            slots_used=slots_used,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            kv_block_size=self.kv_block_size,
            kv_blocks=self.kv_blocks,
            preemptions=self._preemptions,
        )
