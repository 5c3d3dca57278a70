"""Requests wait in turn for a slot of the vLLM engine; a stand-in takes the place of vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.server.config import VllmEngineConfig
from polyrex.server.engines.base import SamplingParams
from polyrex.server.engines.vllm.engine import VllmEngine
from polyrex.server.errors import EngineError, EngineStopped
from support.engine_calls import Answer, MakeTask, complete

ONE = SamplingParams(max_tokens=1, temperature=0.0)
OUTPUT = SimpleNamespace(
    outputs=[SimpleNamespace(token_ids=[7], finish_reason="length", logprobs=None)],
    prompt_logprobs=None,
    num_cached_tokens=0,
)


@dataclass
class StandIn:
    """Takes messages as vLLM does; the test decides when a request ends."""

    messages: list[tuple[str, int]] = field(default_factory=list)
    asked: list[str | None] = field(default_factory=list)
    ends: list[asyncio.Event] = field(default_factory=list)
    errored: bool = False
    failing: bool = False

    @property
    def model_config(self) -> Any:
        return SimpleNamespace(max_model_len=64, get_vocab_size=lambda: 500)

    async def collective_rpc(self, _method: str, args: tuple[int, bytes]) -> None:
        self.messages.append(("write", args[0]))
        await asyncio.sleep(0)
        if self.failing:
            raise RuntimeError("no room")

    async def generate(
        self, _prompt: object, _sampling: object, _id: str, lora_request: Any
    ) -> AsyncGenerator[Any, None]:
        self.messages.append(("request", lora_request.lora_int_id if lora_request else 0))
        self.asked.append(lora_request.lora_name if lora_request else None)
        self.ends.append(asyncio.Event())
        if not self.errored:
            await self.ends[-1].wait()
        if self.errored:
            raise EngineDeadError
        yield OUTPUT


@dataclass
class Waiting:
    """An engine with one slot, besides the base model's."""

    engine: VllmEngine
    vllm: StandIn

    async def ask(self, task: TaskVersion | None) -> asyncio.Task[Answer]:
        """Start a request, and let it run as far as it can."""
        asked = asyncio.create_task(complete(self.engine, (1, 2, 3), task, ONE))
        await settle()
        return asked

    async def end(self, number: int) -> None:
        """End a request that has reached vLLM, and let others follow."""
        self.vllm.ends[number].set()
        await settle()


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.fixture
def waiting(base_path: str, random_inventory: Inventory) -> Waiting:
    engine = VllmEngine(base_path, random_inventory, VllmEngineConfig(slots=2), "float32")
    stand_in: Any = StandIn()
    engine._engine, engine._down = stand_in, None
    return Waiting(engine, stand_in)


def sha256(task: TaskVersion) -> str:
    return task.info.router_sha256


def test_requests_for_a_task_that_has_a_slot_do_not_starve_one_that_waits(
    waiting: Waiting, make_task: MakeTask
) -> None:
    popular, rare = make_task(1), make_task(2)

    async def run() -> None:
        requests = [await waiting.ask(task) for task in (popular, popular, rare, popular, popular)]
        assert waiting.vllm.asked == [sha256(popular)] * 2
        assert waiting.engine.stats().waiting == 3
        await waiting.end(0)
        await waiting.end(1)
        assert waiting.vllm.asked[2:] == [sha256(rare)]
        await waiting.end(2)
        assert waiting.vllm.asked[3:] == [sha256(popular)] * 2
        await waiting.end(3)
        await waiting.end(4)
        assert all(answer.ids == (7,) for answer in await asyncio.gather(*requests))
        assert waiting.engine.stats().slots_used == 0

    asyncio.run(run())


def test_many_more_tasks_than_slots_are_served_in_order_of_arrival(
    waiting: Waiting, make_task: MakeTask
) -> None:
    tasks = [make_task(seed) for seed in range(12)]

    async def run() -> None:
        requests = [await waiting.ask(task) for task in tasks]
        for number in range(len(tasks)):
            await waiting.end(number)
        await asyncio.gather(*requests)

    asyncio.run(run())
    assert waiting.vllm.asked == [sha256(task) for task in tasks]


def test_requests_for_the_base_model_wait_for_no_slot(
    waiting: Waiting, make_task: MakeTask
) -> None:
    async def run() -> None:
        for task in (make_task(1), make_task(2), None):
            await waiting.ask(task)

    asyncio.run(run())
    assert waiting.vllm.asked == [sha256(make_task(1)), None]


def test_whoever_gives_up_leaves_the_queue(waiting: Waiting, make_task: MakeTask) -> None:
    async def run() -> None:
        requests = [await waiting.ask(make_task(seed)) for seed in range(4)]
        requests[1].cancel()  # the head of the queue
        requests[2].cancel()
        await waiting.end(0)
        await waiting.end(1)
        assert (await requests[3]).ids == (7,)

    asyncio.run(run())
    assert waiting.vllm.asked == [sha256(make_task(0)), sha256(make_task(3))]
    assert waiting.engine.stats().waiting == 0


def test_a_slot_is_written_before_the_first_request_that_reads_it(
    waiting: Waiting, make_task: MakeTask
) -> None:
    async def run() -> None:
        requests = [complete(waiting.engine, (1, 2, 3), make_task(1), ONE) for _ in range(3)]
        together = asyncio.gather(*requests)
        await settle()
        for number in range(3):
            await waiting.end(number)
        await together

    asyncio.run(run())
    assert waiting.vllm.messages == [("write", 1)] + [("request", 1)] * 3


def test_a_write_that_failed_is_no_silent_answer(waiting: Waiting, make_task: MakeTask) -> None:
    async def run() -> None:
        waiting.vllm.failing = True
        request = await waiting.ask(make_task(1))
        await waiting.end(0)
        with pytest.raises(RuntimeError, match="no room"):
            await request

    asyncio.run(run())


def test_a_dead_engine_ends_those_who_wait_too(waiting: Waiting, make_task: MakeTask) -> None:
    async def run() -> list[Any]:
        requests = [await waiting.ask(make_task(seed)) for seed in range(4)]
        waiting.vllm.errored = True
        await waiting.end(0)
        return await asyncio.gather(*requests, return_exceptions=True)

    ends: list[Coroutine[Any, Any, Answer] | BaseException] = asyncio.run(run())
    assert [type(end) for end in ends] == [EngineStopped] * 4
    with pytest.raises(EngineStopped, match="died"):
        waiting.engine.check()


@pytest.mark.parametrize(
    ("tokens", "wanted", "message"),
    [
        ((), 1, "no tokens"),
        ((1, 500), 1, "from 0 to 499"),
        ((-1,), 1, "from 0 to 499"),
        ((1, 2), 63, r"2 \+ 63 tokens, the engine holds 64"),
        ((1,) * 64, 0, r"64 \+ 1 tokens"),
    ],
)
def test_what_cannot_run_never_reaches_vllm(
    waiting: Waiting, tokens: tuple[int, ...], wanted: int, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        asyncio.run(complete(waiting.engine, tokens, None, SamplingParams(max_tokens=wanted)))
    assert not waiting.vllm.asked
