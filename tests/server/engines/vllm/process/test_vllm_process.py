"""vLLM in the engine's process: whatever of its processes fails, it ends, and comes back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from polyrex.adapters.files.task import TaskVersion
from polyrex.server.config import Device, Dtype, EmbeddedConfig, EngineName
from polyrex.server.engines.base import GenerationRequest
from polyrex.server.engines.building import BUILDERS, EngineSettings
from polyrex.server.engines.process.client import EngineClient, Supervision
from polyrex.server.errors import EngineRestarting
from support.engine_calls import complete
from support.engine_process.hosted import runs, wait_until
from support.random_inventory import make_inventory, make_task
from support.running_vllm import LONG, SMALL
from support.small_model import SPECS

ROUTED = next(spec for spec in SPECS if spec.method == "tensorpoly-1")
SECONDS = 300  # far more than it takes, so that a test fails instead of hanging


@dataclass(frozen=True)
class Hosted:
    """A vLLM engine in processes of its own, with the loop of its client."""

    client: EngineClient
    runner: asyncio.Runner
    task: TaskVersion

    def host(self) -> psutil.Process:
        return psutil.Process(self.client.pid)

    def core(self) -> psutil.Process:
        """The process that runs the model."""
        children = self.host().children(recursive=True)
        return next(each for each in children if "EngineCore" in name(each))

    def lose(self, victim: psutil.Process, number: signal.Signals) -> list[Any]:
        """How requests end when a process gets a signal; the engine serves again afterwards."""
        return self.runner.run(self._lose(victim, number))

    async def _lose(self, victim: psutil.Process, number: signal.Signals) -> list[Any]:
        begun = asyncio.Semaphore(0)

        async def stream(task: TaskVersion | None) -> None:
            request, made = GenerationRequest("doomed", tuple(range(20)), LONG, task), None
            while made in (None, LONG.max_tokens):  # what is whole before the signal, comes again
                made = 0
                async for chunk in self.client.generate(request):
                    made += len(chunk.tokens)
                    begun.release()

        restarts = self.client.stats().restarts
        requests = [asyncio.create_task(stream(task)) for task in (self.task, None)]
        async with asyncio.timeout(SECONDS):
            for _ in requests:
                await begun.acquire()
            os.kill(victim.pid, number)
            ends = await asyncio.gather(*requests, return_exceptions=True)
            while self.client.stats().restarts == restarts or self.client._down is not None:
                await asyncio.sleep(0.05)
        return ends

    def answer(self) -> tuple[int, ...]:
        return self.runner.run(complete(self.client, (5, 6, 7), self.task)).ids


def name(process: psutil.Process) -> str:
    """What a process calls itself; vLLM sets it."""
    return " ".join([process.name(), *process.cmdline()])


@pytest.fixture(scope="module")
def hosted(small_base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    path: Path = tmp_path_factory.mktemp("inventory") / "inventory.safetensors"
    inventory = make_inventory(path, small_base, ROUTED)
    settings = EngineSettings(
        base=small_base,
        inventory=str(path),
        inventory_sha256=inventory.sha256,
        dtype=Dtype.float32,
        device=Device.cpu,
        embedded=EmbeddedConfig(),
        vllm=SMALL,
    )
    supervision = Supervision(pauses=(0.0, 0.0, 0.0), healthy_seconds=0.0)
    builder = BUILDERS[EngineName.vllm]
    client = EngineClient(builder, settings.packed(), SMALL.max_running, supervision)
    with asyncio.Runner() as runner:
        runner.run(client.start())
        pids = [each.pid for each in psutil.Process(client.pid).children(recursive=True)]
        try:
            yield Hosted(client, runner, make_task(inventory, 1))
        finally:
            pids += [each.pid for each in psutil.Process(client.pid).children(recursive=True)]
            runner.run(client.stop())
    assert wait_until(lambda: not any(runs(pid) for pid in pids))


def test_its_processes_listen_on_this_machine_alone(hosted: Hosted) -> None:
    processes = [hosted.host(), *hosted.host().children(recursive=True)]
    listening = {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda n: n.name)
def test_the_process_of_the_model_fails_and_the_engine_comes_back(
    hosted: Hosted, number: signal.Signals
) -> None:
    before, victim = hosted.answer(), hosted.core()
    ends = hosted.lose(victim, number)
    assert [type(end) for end in ends] == [EngineRestarting] * 2
    assert hosted.answer() == before
    assert wait_until(lambda: not runs(victim.pid))


def test_a_killed_engine_leaves_no_process_of_the_model_behind(hosted: Hosted) -> None:
    before, victim, core = hosted.answer(), hosted.host(), hosted.core()
    ends = hosted.lose(victim, signal.SIGKILL)
    assert [type(end) for end in ends] == [EngineRestarting] * 2
    assert hosted.answer() == before
    assert wait_until(lambda: not runs(core.pid))
