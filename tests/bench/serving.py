"""`make bench`: the cost of adapters, and the cost of many tasks.

The first part measures the embedded engine in this process. 32 requests at once, of 17 prompt
tokens and 32 new ones, run without adapters, with one task for all, and with 32 tasks; then with
one task and with 32 on the shared path alone; then on transformers' own continuous batching of the
base model. Each runs twice a round.

The second part measures a server process over HTTP: how long a new task's first request takes and
how long its tenth, how much the process grows by 10,000 registered tasks, and its throughput
compared with that of a server with 32 tasks.

A ratio is the median over neighbouring turns. The last line is one JSON document.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from polyrex.adapters.files.inventory import Inventory, load_experts, read_inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, load_tokenizer, resolve_base
from polyrex.server.config import Dtype, EmbeddedConfig, Launch
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from polyrex.server.engines.threads import in_passing_thread
from polyrex.server.launch.loading import shipped_inventory
from support.random_inventory import make_task

from .cases import NEW_TOKENS, PROMPT, PROMPT_TOKENS, REQUESTS
from .engine_requests import answer
from .engine_requests import tokens_per_second as at_once
from .harness import Turns, command_line, machine, report, seconds_of
from .server_process import complete, many, register, server_process, tokens_per_second


def engine_throughput(inventory: Inventory, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Tokens a second without adapters, with one task and with 32; and their ratios."""
    path = resolve_base(DEFAULT_BASE)
    prompt = tuple(load_tokenizer(path).encode(PROMPT))[:PROMPT_TOKENS]
    assert len(prompt) == PROMPT_TOKENS
    plain, adapted = in_passing_thread(
        lambda: (load_base(path, dtype), load_experts(inventory, load_base(path, dtype)))
    )
    tasks = [make_task(inventory, seed) for seed in range(REQUESTS)]
    base, one_task = [None] * REQUESTS, [tasks[0]] * REQUESTS
    # All send one prompt, and each computes it.
    both = EmbeddedConfig(prefix_cache=False)
    shared_path = replace(both, state_bytes=0)
    mixes: dict[EmbeddedConfig, dict[str, Sequence[TaskVersion | None]]] = {
        both: {"base": base, "one_task": one_task, "distinct32": tasks},
        shared_path: {"one_task_shared": one_task, "distinct32_shared": tasks},
    }
    turns = Turns()

    async def rate(engine: EmbeddedEngine, mix: Sequence[TaskVersion | None]) -> float:
        return await at_once((answer(engine, prompt, NEW_TOKENS, t) for t in mix), NEW_TOKENS)

    async def take_turns() -> None:
        # One engine at a time: their threads would be in each other's way.
        for _ in range(rounds):
            for config, of_config in mixes.items():
                async with running(adapted, inventory, config) as engine:
                    await rate(engine, tasks)  # warms up
                    for name, mix in list(of_config.items()) * 2:
                        turns.add(name, await rate(engine, mix))
            with transformers_batching(plain) as transformers_rate:
                await asyncio.to_thread(transformers_rate, prompt)
                for _ in range(2):
                    turns.add("transformers", await asyncio.to_thread(transformers_rate, prompt))

    asyncio.run(take_turns())
    return {
        "tokens_per_second": turns.medians(),
        "adapted_vs_base_distinct32": turns.compare("distinct32", "base").ratio,
        "adapted_vs_base_one_task": turns.compare("one_task", "base").ratio,
        "distinct32_vs_one_task": turns.compare("distinct32_shared", "one_task_shared").ratio,
        "base_vs_transformers": turns.compare("base", "transformers").ratio,
    }


@asynccontextmanager
async def running(
    adapted: AdaptedModel, inventory: Inventory, config: EmbeddedConfig
) -> AsyncIterator[EmbeddedEngine]:
    """A started embedded engine; it is stopped at the end."""
    engine = in_passing_thread(lambda: EmbeddedEngine(adapted, inventory, config))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@contextmanager
def transformers_batching(model: Any) -> Iterator[Callable[[tuple[int, ...]], float]]:
    """A function that measures transformers' continuous batching with a cache as large as ours."""
    page = 256
    batching = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=EmbeddedConfig.kv_cache_tokens // page,
        max_batch_tokens=EmbeddedConfig.max_batch_tokens,
        allow_block_sharing=False,
    )
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    model.set_attn_implementation("sdpa")
    with model.continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=batching
    ) as manager:

        def rate(prompt: tuple[int, ...]) -> float:
            started = time.perf_counter()
            manager.add_requests([list(prompt)] * REQUESTS, max_new_tokens=NEW_TOKENS)
            done: list[int] = []
            while len(done) < REQUESTS:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    done.append(len(result.generated_tokens))
            assert sum(done) == REQUESTS * NEW_TOKENS
            return sum(done) / (time.perf_counter() - started)

        yield rate


def first_and_tenth(client: httpx.Client, inventory: Inventory, tasks: int) -> dict[str, Any]:
    """Time to the first token in a new task's first request, and in its tenth."""
    turns = Turns()
    for number, into in enumerate(turns.rounds(tasks, warm_up=2)):
        name = f"fresh-{number}"
        register(client, inventory, [name])
        seconds = [seconds_of(complete, client, task=name, max_tokens=1) for _ in range(10)]
        into.add("first", 1e3 * seconds[0])
        into.add("tenth", 1e3 * seconds[-1])
    milliseconds = turns.medians(2)
    return {
        "first_request_ms": milliseconds["first"],
        "tenth_request_ms": milliseconds["tenth"],
        "first_vs_tenth_request": turns.compare("first", "tenth").ratio,
    }


def growth(
    client: httpx.Client, process: psutil.Process, inventory: Inventory, tasks: int
) -> dict[str, Any]:
    """Memory that registering many tasks takes, and the time of one registration."""
    before = process.memory_info().rss
    seconds = register(client, inventory, many(tasks))
    grown = process.memory_info().rss - before
    return {
        f"rss_growth_mb_{tasks}_tasks": round(grown / 1e6, 1),
        "register_ms_median": round(1e3 * statistics.median(seconds), 2),
    }


def http_throughput(
    few: httpx.Client, many_tasks: httpx.Client, tasks: int, rounds: int
) -> dict[str, Any]:
    """32 requests of 32 tasks at once, to a server with `tasks` tasks and to one with 32."""
    registered, turns = many(tasks), Turns()
    spread = [registered[number * tasks // REQUESTS] for number in range(REQUESTS)]
    for into in turns.rounds(rounds):
        for name, client, names in ("many", many_tasks, spread), ("few", few, many(REQUESTS)):
            into.add(name, tokens_per_second(client, [{"task": task} for task in names]))
    return {
        "tokens_per_second": turns.medians()["many"],
        f"tasks{tasks}_vs_tasks{REQUESTS}": turns.compare("many", "few").ratio,
    }


def ratios(figures: dict[str, Any], tasks: int) -> dict[str, float]:
    """The figures that goals are set for; of the server's default dtype where there are two."""
    default = figures[Launch.dtype]
    grown, flat = f"rss_growth_mb_{tasks}_tasks", f"tasks{tasks}_vs_tasks{REQUESTS}"
    return {
        "adapted_vs_base_distinct32": default["adapted_vs_base_distinct32"],
        "distinct32_vs_one_task": default["distinct32_vs_one_task"],
        "base_vs_transformers": default["base_vs_transformers"],
        "first_vs_tenth_request": figures["latency"]["first_vs_tenth_request"],
        grown: figures["memory"][grown],
        f"http_{flat}": figures["http"][flat],
        "adapted_vs_base_one_task": default["adapted_vs_base_one_task"],
        **{
            f"adapted_vs_base_distinct32_{dtype}": figures[dtype]["adapted_vs_base_distinct32"]
            for dtype in Dtype
        },
    }


def main() -> None:
    """The command behind `make bench`."""
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--inventory", type=Path, help="default: the shipped one")
    parser.add_argument(
        "--tasks", type=int, default=10_000, help="tasks to register, default: %(default)s"
    )
    options = parser.parse_args()
    inventory = read_inventory(options.inventory or shipped_inventory(DEFAULT_BASE))
    figures: dict[str, Any] = {"machine": machine()}

    def note(name: str, found: dict[str, Any]) -> None:
        figures[name] = found
        print(f"{name}: {found}", flush=True)

    for dtype in Dtype:
        note(dtype, engine_throughput(inventory, getattr(torch, dtype), options.rounds))
    with server_process(inventory.path) as (client, process):
        note("latency", first_and_tenth(client, inventory, 50))
        note("memory", growth(client, process, inventory, options.tasks))
        with server_process(inventory.path) as (few, _):
            register(few, inventory, many(REQUESTS))
            note("http", http_throughput(few, client, options.tasks, options.rounds))
    report({"ratios": ratios(figures, options.tasks), "figures": figures}, options.out)


if __name__ == "__main__":
    main()
