"""`make bench`: what adapters cost, and what many tasks cost. The last line is one JSON document.

Two parts. In this process, the embedded engine alone: 32 requests at once of 17 prompt tokens and
32 new ones, without adapters, all of one task, and of 32 tasks; then one task and 32 on the shared
path alone; then transformers' own continuous batching of the base model. Each is measured twice a
round; ratios are of neighbours, and their median is reported. Against a server process, over HTTP:
how long a task just registered takes for its first token and for its tenth, how much the process
grows by 10,000 registered tasks, and its throughput beside a server with 32.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from polyrex.adapters.files.inventory import Inventory, load_experts, read_inventory
from polyrex.adapters.files.registry import TaskInfo, TaskVersion
from polyrex.adapters.files.router import Router, RouterMetadata, router_bytes
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, load_tokenizer, resolve_base
from polyrex.server.config import Dtype, EngineConfig, Launch
from polyrex.server.engines.base import GenerationRequest, SamplingParams
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from polyrex.server.engines.threads import in_passing_thread
from polyrex.server.launch.loading import shipped_inventory

REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 32, 17, 32
PROMPT = "The capital of France is a very nice city and I would like to visit it because"


def random_logits(inventory: Inventory, seed: int) -> torch.Tensor:
    """A router's logits [groups, R], far enough from 0 that tasks differ."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(inventory.routing_shape, generator=generator)


def random_task(inventory: Inventory, seed: int) -> TaskVersion:
    """A task that is in no registry."""
    name = f"random-{seed}"
    router = Router(random_logits(inventory, seed), RouterMetadata(inventory.sha256, name), name)
    return TaskVersion(TaskInfo(name, 1, name, 0, 0.0, "", {}, {}), router)


def throughput(inventory: Inventory, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Tokens a second without adapters, with one task and with 32, and the ratios of the rounds."""
    path = resolve_base(DEFAULT_BASE)
    prompt = tuple(load_tokenizer(path).encode(PROMPT))[:PROMPT_TOKENS]
    assert len(prompt) == PROMPT_TOKENS
    plain, adapted = in_passing_thread(
        lambda: (load_base(path, dtype), load_experts(inventory, load_base(path, dtype)))
    )
    tasks = [random_task(inventory, seed) for seed in range(REQUESTS)]
    default, shared = EngineConfig(), EngineConfig(state_bytes=0)
    mixes: tuple[tuple[str, EngineConfig, list[TaskVersion | None]], ...] = (
        ("base", default, [None] * REQUESTS),
        ("one_task", default, [tasks[0]] * REQUESTS),
        ("distinct32", default, list(tasks)),
        ("one_task_shared", shared, [tasks[0]] * REQUESTS),
        ("distinct32_shared", shared, list(tasks)),
    )

    async def measure() -> dict[str, list[float]]:
        rates: dict[str, list[float]] = {
            name: [] for name in (*(m[0] for m in mixes), "transformers")
        }
        # One engine at a time: their threads would be in each other's way.
        for _ in range(rounds):
            for config, of_config in itertools.groupby(mixes, lambda mix: mix[1]):
                async with running(adapted, inventory, config) as engine:
                    await _tokens_per_second(engine, prompt, list(tasks))  # warms up
                    for name, _, mix in list(of_config) * 2:
                        rates[name].append(await _tokens_per_second(engine, prompt, mix))
            with transformers_batching(plain) as transformers_rate:
                await asyncio.to_thread(transformers_rate, prompt)
                for _ in range(2):
                    rates["transformers"].append(await asyncio.to_thread(transformers_rate, prompt))
        return rates

    rates = asyncio.run(measure())
    return {
        "tokens_per_second": {name: round(statistics.median(r), 1) for name, r in rates.items()},
        "adapted_vs_base_distinct32": _median_ratio(rates["distinct32"], rates["base"]),
        "adapted_vs_base_one_task": _median_ratio(rates["one_task"], rates["base"]),
        "distinct32_vs_one_task": _median_ratio(
            rates["distinct32_shared"], rates["one_task_shared"]
        ),
        "base_vs_transformers": _median_ratio(rates["base"], rates["transformers"]),
    }


@asynccontextmanager
async def running(
    adapted: AdaptedModel, inventory: Inventory, config: EngineConfig
) -> AsyncIterator[EmbeddedEngine]:
    """An embedded engine, started, and stopped at the end."""
    engine = in_passing_thread(lambda: EmbeddedEngine(adapted, adapted.model, inventory, config))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@contextmanager
def transformers_batching(model: Any) -> Iterator[Callable[[tuple[int, ...]], float]]:
    """A function that measures transformers' continuous batching, with as much cache as ours."""
    page = 256
    batching = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=EngineConfig.kv_cache_tokens // page,
        max_batch_tokens=EngineConfig.max_batch_tokens,
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


def _median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(over, under, strict=True)), 3)


async def _tokens_per_second(
    engine: EmbeddedEngine, prompt: tuple[int, ...], mix: Sequence[TaskVersion | None]
) -> float:
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)

    async def one(task: TaskVersion | None) -> int:
        request = GenerationRequest("bench", prompt, sampling, task)
        async with aclosing(engine.generate(request)) as chunks:
            return sum([len(chunk.tokens) async for chunk in chunks])

    started = time.perf_counter()
    tokens = sum(await asyncio.gather(*(one(task) for task in mix)))
    assert tokens == REQUESTS * NEW_TOKENS
    return tokens / (time.perf_counter() - started)


@contextmanager
def server_process(
    inventory: Path, folder: Path, *options: str
) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    """`polyrex serve` with its defaults but for `options`, when it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("polyrex")), "serve", "--port", str(port)]
    command += ["--inventory", str(inventory), "--tasks-dir", str(folder), *options]
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client,
        subprocess.Popen(command, stdout=subprocess.DEVNULL) as popen,
    ):
        try:
            while not _ready(client):
                if popen.poll() is not None:
                    raise SystemExit(f"the server ended with status {popen.returncode}")
                time.sleep(0.1)
            yield client, psutil.Process(popen.pid)
        finally:
            popen.terminate()


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def register(client: httpx.Client, inventory: Inventory, tasks: Mapping[str, int]) -> list[float]:
    """Register random tasks, name -> seed, over HTTP; seconds of each, from sending the request to
    the whole answer.

    The standard library sends them where `client` connects to: what httpx does in Python would be
    a good part of the time.
    """
    seconds = []
    url = client.base_url
    with closing(HTTPConnection(url.host, url.port, timeout=client.timeout.read)) as connection:
        connection.connect()
        for name, seed in tasks.items():
            metadata = RouterMetadata(inventory.sha256, name)
            data = router_bytes(random_logits(inventory, seed), inventory.spec, metadata)
            headers = {"content-type": "application/octet-stream"}
            started = time.perf_counter()
            connection.request("POST", f"/v1/tasks?name={name}", data, headers)
            response = connection.getresponse()
            answer = response.read()
            seconds.append(time.perf_counter() - started)
            if response.status != HTTPStatus.CREATED:
                raise RuntimeError(f"task {name}: {response.status} {answer!r:.400}")
    return seconds


def first_and_tenth(client: httpx.Client, inventory: Inventory, tasks: int) -> dict[str, Any]:
    """Seconds to the first token, in the first request after a registration and in the tenth."""
    seconds: list[list[float]] = []
    for number in range(tasks + 2):
        name = f"fresh-{number}"
        register(client, inventory, {name: number})
        body = {"task": name, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
        seconds.append([_timed_post(client, body) for _ in range(10)])
    seconds = seconds[2:]  # the first two tasks warm up
    first, tenth = (statistics.median(s[i] for s in seconds) for i in (0, 9))
    return {
        "first_request_ms": round(1e3 * first, 2),
        "tenth_request_ms": round(1e3 * tenth, 2),
        "first_vs_tenth_request": round(first / tenth, 3),
    }


def _timed_post(client: httpx.Client, body: dict[str, Any]) -> float:
    started = time.perf_counter()
    client.post("/v1/completions", json=body).raise_for_status()
    return time.perf_counter() - started


def growth(
    client: httpx.Client, process: psutil.Process, inventory: Inventory, tasks: int
) -> dict[str, Any]:
    """Memory before and after registering many tasks, and how long a registration took."""
    before = process.memory_info().rss
    seconds = register(client, inventory, {f"many-{n}": 10_000 + n for n in range(tasks)})
    grown = process.memory_info().rss - before
    return {
        f"rss_growth_mb_{tasks}_tasks": round(grown / 1e6, 1),
        "register_ms_median": round(1e3 * statistics.median(seconds), 2),
    }


def mix_over_http(few: httpx.Client, many: httpx.Client, tasks: int, rounds: int) -> dict[str, Any]:
    """32 requests of 32 tasks at once over HTTP, where `tasks` are registered, and where only 32.

    Two servers, in turn.
    """
    spread = [f"many-{n * tasks // REQUESTS}" for n in range(REQUESTS)]
    all_there_are = [f"many-{n}" for n in range(REQUESTS)]

    def rate(client: httpx.Client, names: Sequence[str], pool: ThreadPoolExecutor) -> float:
        fields = {"prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        started = time.perf_counter()
        list(pool.map(lambda name: _timed_post(client, {"task": name, **fields}), names))
        return REQUESTS * NEW_TOKENS / (time.perf_counter() - started)

    with ThreadPoolExecutor(REQUESTS) as pool:
        pairs = [
            (rate(many, spread, pool), rate(few, all_there_are, pool)) for _ in range(rounds + 1)
        ][1:]  # the first round warms up
    return {
        "tokens_per_second": round(statistics.median(of_many for of_many, _ in pairs), 1),
        f"tasks{tasks}_vs_tasks{REQUESTS}": _median_ratio(*zip(*pairs, strict=True)),
    }


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inventory", type=Path, help="default: the shipped one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=10_000, help="how many are registered")
    parser.add_argument("--out", type=Path, help="also write the JSON document here, indented")
    options = parser.parse_args()
    inventory = read_inventory(options.inventory or shipped_inventory(DEFAULT_BASE))
    figures: dict[str, Any] = {"machine": machine()}
    for dtype in Dtype:
        figures[dtype] = throughput(inventory, getattr(torch, dtype), options.rounds)
        print(f"{dtype}: {figures[dtype]}", flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        server_process(inventory.path, Path(folder)) as (client, process),
    ):
        figures["latency"] = first_and_tenth(client, inventory, 50)
        print(f"latency: {figures['latency']}", flush=True)
        figures["memory"] = growth(client, process, inventory, options.tasks)
        print(f"memory: {figures['memory']}", flush=True)
        with (
            tempfile.TemporaryDirectory() as other,
            server_process(inventory.path, Path(other)) as (few, _),
        ):
            register(few, inventory, {f"many-{n}": 10_000 + n for n in range(REQUESTS)})
            figures["http"] = mix_over_http(few, client, options.tasks, options.rounds)
        print(f"http: {figures['http']}", flush=True)
    document = {"ratios": ratios(figures, options.tasks), "figures": figures}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


def ratios(figures: dict[str, Any], tasks: int) -> dict[str, float]:
    """The figures that goals are set for, flat; of the server's default dtype where two are."""
    default = figures[Launch.dtype]
    growth_key, flat_key = f"rss_growth_mb_{tasks}_tasks", f"tasks{tasks}_vs_tasks{REQUESTS}"
    return {
        "adapted_vs_base_distinct32": default["adapted_vs_base_distinct32"],
        "distinct32_vs_one_task": default["distinct32_vs_one_task"],
        "base_vs_transformers": default["base_vs_transformers"],
        "first_vs_tenth_request": figures["latency"]["first_vs_tenth_request"],
        growth_key: figures["memory"][growth_key],
        f"http_{flat_key}": figures["http"][flat_key],
        "adapted_vs_base_one_task": default["adapted_vs_base_one_task"],
        **{
            f"adapted_vs_base_distinct32_{dtype}": figures[dtype]["adapted_vs_base_distinct32"]
            for dtype in Dtype
        },
    }


if __name__ == "__main__":
    main()
