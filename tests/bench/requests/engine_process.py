"""`make bench-engine-process`: what it costs that the engine is a process of its own.

One embedded engine runs in this process and one in an engine's process, with the base model and the
shipped inventory in float32. They get the same requests in turns:

- batch: 32 requests of its tasks at once, 32 tokens each. Tokens a second.
- batch beside HTTP: the same, while whoever reads a token works 0.3 ms in Python for it, as the
  server does to make text and events of tokens. Tokens a second.
- stream: one request. Milliseconds a token, and to the first one.

Then a stub engine whose steps take no time sends 64 streams through, here and there: the processor
time of a token, of both processes, without any model. The last line is one JSON document.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from bench.cases import NEW_TOKENS, PROMPT_TOKENS, REQUESTS
from bench.engine_requests import first_token
from bench.harness import Turns, command_line, machine, report
from polyrex.adapters.files.bundle import Bundle
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.base_model import DEFAULT_BASE, resolve_base
from polyrex.server.config import Device, Dtype, EmbeddedConfig, EngineName, VllmEngineConfig
from polyrex.server.engines.base import Engine, GenerationRequest, SamplingParams
from polyrex.server.engines.building import BUILDERS, EngineSettings, build_embedded
from polyrex.server.engines.process.client import EngineClient
from polyrex.server.engines.threads import in_passing_thread
from polyrex.server.launch.loading import shipped_inventory
from support.engine_process.hosted import build_stub, stub_client

WORK_SECONDS = 0.0003
STREAM_TOKENS = 64
STUB_STREAMS, STUB_TOKENS = 64, 200
CONFIG = EmbeddedConfig(prefix_cache=False)  # the same prompts come again and again
HERE, THERE = "in_process", "own_process"


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[Engine]:
    """Start an engine, and stop it at the end."""
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def work(seconds: float) -> None:
    """Keep the interpreter busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


async def read(
    engine: Engine, number: int, task: TaskVersion | None, new: int, seconds: float
) -> int:
    """Generate `new` tokens, and work so long for each."""
    sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    prompt = tuple(range(number + 1, number + 1 + PROMPT_TOKENS))
    request, tokens = GenerationRequest(f"bench-{number}", prompt, sampling, task), 0
    async with aclosing(engine.generate(request)) as chunks:
        async for chunk in chunks:
            tokens += len(chunk.tokens)
            if seconds:
                work(seconds)
    return tokens


async def batch(engine: Engine, tasks: list[TaskVersion], seconds: float = 0.0) -> float:
    """Tokens a second of 32 requests at once."""
    asked = (
        read(engine, number, tasks[number % len(tasks)], NEW_TOKENS, seconds)
        for number in range(REQUESTS)
    )
    began = time.perf_counter()
    tokens = sum(await asyncio.gather(*asked))
    return tokens / (time.perf_counter() - began)


async def stream(engine: Engine, task: TaskVersion) -> tuple[float, float]:
    """Milliseconds to the first token of one request, and of each further one."""
    prompt = tuple(range(100, 100 + PROMPT_TOKENS))
    began = time.perf_counter()
    found = await first_token(engine, prompt, STREAM_TOKENS, task)
    rest = time.perf_counter() - began - found.seconds
    return 1e3 * found.seconds, 1e3 * rest / (STREAM_TOKENS - 1)


async def compare(rounds: int) -> dict[str, Any]:
    """Both engines in turns, with a model."""
    bundle = Bundle.read(shipped_inventory(DEFAULT_BASE))
    tasks = [bundle.task(name) for name in bundle.tasks]
    settings = EngineSettings(
        base=resolve_base(DEFAULT_BASE),
        inventory=str(bundle.inventory.path),
        inventory_sha256=bundle.inventory.sha256,
        dtype=Dtype.float32,
        device=Device.cpu,
        embedded=CONFIG,
        vllm=VllmEngineConfig(),
    ).packed()
    here = in_passing_thread(lambda: build_embedded(settings))
    there = EngineClient(BUILDERS[EngineName.embedded], settings, CONFIG.max_running)
    kinds = ("tokens_per_second", "tokens_per_second_beside_http", "first_token_ms", "token_ms")
    turns = {kind: Turns() for kind in kinds}
    async with running(here), running(there):
        for number in range(rounds + 1):
            order = [(HERE, here), (THERE, there)]
            for name, engine in order if number % 2 else reversed(order):
                first, each = await stream(engine, tasks[0])
                rate, beside = await batch(engine, tasks), await batch(engine, tasks, WORK_SECONDS)
                if number:  # the first round is the warm-up
                    for kind, figure in zip(kinds, (rate, beside, first, each), strict=True):
                        turns[kind].add(name, figure)
    return {
        kind: {
            **found.medians(2),
            "own_over_in_process": found.compare(THERE, HERE).ratio,
            "quartiles": found.compare(THERE, HERE).quartiles,
        }
        for kind, found in turns.items()
    }


def processor_seconds(pid: int | None) -> float:
    """Of this process, and of another one."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    other = psutil.Process(pid).cpu_times() if pid else None
    return own.ru_utime + own.ru_stime + (other.user + other.system if other else 0.0)


async def stub_costs(engine: Engine, pid: int | None) -> float:
    """Microseconds of processor time for each token that passes."""
    before = processor_seconds(pid)
    asked = (read(engine, number, None, STUB_TOKENS, 0.0) for number in range(STUB_STREAMS))
    tokens = sum(await asyncio.gather(*asked))
    return 1e6 * (processor_seconds(pid) - before) / tokens


async def passing(rounds: int) -> dict[str, Any]:
    """What a token costs without a model, here and there."""
    turns = Turns()
    with TemporaryDirectory() as folder:
        stub: dict[str, Any] = {"step_seconds": 0.0, "most_running": STUB_STREAMS}
        settings = {"folder": folder, "bad_starts": (), "error": "", "stub": stub}
        here, there = build_stub(settings), stub_client(Path(folder), **stub)
        async with running(here), running(there):
            for number in range(rounds + 1):
                own, other = await stub_costs(here, None), await stub_costs(there, there.pid)
                if number:
                    turns.add(HERE, own)
                    turns.add(THERE, other)
    return turns.medians(1)


def main() -> None:
    """The command behind `make bench-engine-process`."""
    options = command_line(__doc__, rounds=7).parse_args()
    before = os.getloadavg()[0]
    found = asyncio.run(compare(options.rounds))
    document = {
        **found,
        "processor_us_per_token": asyncio.run(passing(options.rounds)),
        "rounds": options.rounds,
        "load_before": round(before, 2),
        "machine": machine(),
    }
    report(document, options.out)


if __name__ == "__main__":
    main()
