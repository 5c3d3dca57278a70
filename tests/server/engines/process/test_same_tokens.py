"""The embedded engine gives the same tokens in a process of its own as in this one."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass

import pytest
import torch

from polyrex.adapters.files.inventory import Inventory, load_experts
from polyrex.adapters.model.base_model import load_base
from polyrex.server.config import Device, Dtype, EmbeddedConfig, EngineName, VllmEngineConfig
from polyrex.server.engines.base import Engine, SamplingParams
from polyrex.server.engines.building import BUILDERS, EngineSettings
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from polyrex.server.engines.process.client import EngineClient
from support.engine_calls import Answer, MakeTask, complete
from support.engine_process.hosted import QUICK, SECONDS
from support.reliability.small_base import SmallBase

CONFIG = EmbeddedConfig(kv_cache_tokens=2048, slots=8)
SAMPLINGS = (
    SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=0.9, top_p=0.8, seed=7, logprobs=4),
    SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, prompt_logprobs=3),
    SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=1),
)


@dataclass(frozen=True)
class Answers:
    """Those of the engine in this process, and of the other one before and after it was killed."""

    here: list[Answer]
    before: list[Answer]
    after: list[Answer]


async def ask(engine: Engine, make_task: MakeTask) -> list[Answer]:
    """Every sampling, with each of two tasks and without one.

    One after another: which of them share a step, and so how sums are rounded, is not left to time.
    """
    tasks = (make_task(1), make_task(2), None)
    return [
        await complete(engine, tuple(range(3 + i, 30 + 3 * i)), task, sampling)
        for i, sampling in enumerate(SAMPLINGS)
        for task in tasks
    ]


async def killed(client: EngineClient) -> None:
    """Kill the engine's process, and wait until another one serves."""
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    while not client.stats().restarts or client._down is not None:
        await asyncio.sleep(0.05)


async def all_answers(small: SmallBase, inventory: Inventory, make_task: MakeTask) -> Answers:
    model = load_experts(inventory, load_base(str(small.base), torch.float32))
    here = EmbeddedEngine(model, inventory, CONFIG)
    settings = EngineSettings(
        base=str(small.base),
        inventory=str(small.inventory),
        inventory_sha256=inventory.sha256,
        dtype=Dtype.float32,
        device=Device.cpu,
        embedded=CONFIG,
        vllm=VllmEngineConfig(),
    )
    client = EngineClient(BUILDERS[EngineName.embedded], settings.packed(), 8, QUICK)
    await here.start()
    await client.start()
    try:
        assert client.context_length == here.context_length
        found = Answers(await ask(here, make_task), await ask(client, make_task), [])
        await killed(client)
        found.after.extend(await ask(client, make_task))
        return found
    finally:
        await client.stop()
        await here.stop()


@pytest.fixture(scope="module")
def answers(small: SmallBase, inventory: Inventory, make_task: MakeTask) -> Answers:
    async def limited() -> Answers:
        async with asyncio.timeout(2 * SECONDS):
            return await all_answers(small, inventory, make_task)

    return asyncio.run(limited())


def test_the_other_process_gives_the_same_tokens_and_log_probabilities(answers: Answers) -> None:
    assert answers.before == answers.here
    assert len({answer.ids for answer in answers.here[:3]}) == 3  # tasks differ


def test_so_does_the_one_that_takes_its_place(answers: Answers) -> None:
    assert answers.after == answers.here
