"""When vLLM is killed or stopped, every request ends with an error, and none hangs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from polyrex.adapters.files.task import TaskVersion
from polyrex.server.engines.base import GenerationRequest
from polyrex.server.engines.vllm.engine import VllmEngine
from polyrex.server.errors import EngineStopped
from support.random_inventory import make_inventory, make_task
from support.running_vllm import LONG, Running, running_vllm
from support.small_model import SPECS

ROUTED = next(spec for spec in SPECS if spec.method == "tensorpoly-1")
SECONDS = 60  # far more than it takes, so that a test fails instead of hanging


def core_process(running: Running) -> int:
    assert running.engine._engine is not None
    manager = running.engine._engine.engine_core.resources.engine_manager
    (process,) = manager.processes
    pid: int = process.pid
    return pid


def last_worker(running: Running) -> int:
    pid: int = running.in_workers(lambda _worker: os.getpid())[-1]
    return pid


async def stream(engine: VllmEngine, task: TaskVersion | None, begun: asyncio.Semaphore) -> None:
    request = GenerationRequest("doomed", tuple(range(20)), LONG, task)
    async for _ in engine.generate(request):
        begun.release()


async def end_while_streaming(
    running: Running, tasks: list[TaskVersion | None], victim: int | None, late: TaskVersion
) -> list[Any]:
    """How each request ends: those that run, and one that comes late."""
    begun = asyncio.Semaphore(0)
    requests = [asyncio.create_task(stream(running.engine, task, begun)) for task in tasks]
    for _ in tasks:
        await begun.acquire()
    if victim is not None:
        os.kill(victim, signal.SIGKILL)
    requests.append(asyncio.create_task(stream(running.engine, late, begun)))
    async with asyncio.timeout(SECONDS):
        if victim is None:
            await running.engine.stop()
        return await asyncio.gather(*requests, return_exceptions=True)


def runs(pid: int) -> bool:
    """Whether a process is still running; a zombie is not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def gone(pids: list[int]) -> None:
    async with asyncio.timeout(SECONDS):
        while any(runs(pid) for pid in pids):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("victim", "sizes", "reason"),
    [
        (core_process, {"slots": 4001}, "died"),
        (last_worker, {"tensor_parallel": 2}, "died"),
        (lambda _running: None, {}, "shutting down"),
    ],
    ids=["engine core, 4,000 slots", "one of two workers", "stopped"],
)
def test_the_end_of_vllm_ends_every_request(
    small_base: str,
    tmp_path: Path,
    victim: Callable[[Running], int | None],
    sizes: dict[str, Any],
    reason: str,
) -> None:
    inventory = make_inventory(tmp_path / "inventory.safetensors", small_base, ROUTED)
    *tasks, late = (make_task(inventory, seed) for seed in range(5))
    with running_vllm(small_base, inventory, **sizes) as running:
        # A task takes a row of the routing table on every rank, and nothing else.
        tables = running.in_workers(
            lambda worker: worker.model_runner.lora_manager._table.weights.nbytes
        )
        modules, width = inventory.table_shape
        assert tables == [sizes.get("slots", 6) * modules * width * 4] * len(tables)
        pids = [*running.in_workers(lambda _worker: os.getpid()), core_process(running)]
        ends = running.run(end_while_streaming(running, [*tasks, None], victim(running), late))
        assert [type(end) for end in ends] == [EngineStopped] * 6
        with pytest.raises(EngineStopped, match=reason):
            running.engine.check()
        running.run(running.engine.stop())
        running.run(gone(pids))
