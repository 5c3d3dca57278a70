"""How requests end: limits, end of sequence, aborts, failures, a full cache, a stopped engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
import torch

from polyrex.adapters.files.task import TaskVersion
from polyrex.server.engines.base import GenerationRequest, SamplingParams
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from polyrex.server.engines.embedded.paged_cache import PagedCache
from polyrex.server.engines.embedded.scheduler import Scheduler
from polyrex.server.errors import EngineError, EngineOutOfMemory, EngineStopped, StartError
from support.engine_calls import GREEDY, Answer, MakeEngine, MakeTask, complete, prompt, started

LONG = replace(GREEDY, max_tokens=500)


async def idle(engine: EmbeddedEngine) -> None:
    """Wait until no request is left in the engine, or the test's time is up."""
    while engine.stats().running or engine.stats().waiting:
        await asyncio.sleep(0.01)


def diverging(task: TaskVersion) -> TaskVersion:
    """A task whose outputs are all NaN."""
    info = replace(task.info, router_sha256="nan")
    nan = torch.full_like(task.router.weights, float("nan"))
    return TaskVersion(info, replace(task.router, weights=nan))


def test_a_completion_ends_at_max_tokens(engine: EmbeddedEngine) -> None:
    answer = asyncio.run(complete(engine, prompt(1)))
    assert (len(answer.tokens), answer.finish_reason) == (5, "length")


def test_end_of_sequence_stops_and_is_not_returned(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = asyncio.run(complete(engine, prompt(1)))
    end = whole.ids[3]
    monkeypatch.setattr(engine._runner, "_eos", frozenset([end]))
    answer = asyncio.run(complete(engine, prompt(1), None, replace(GREEDY, ignore_eos=False)))
    assert (answer.ids, answer.finish_reason) == (whole.ids[: whole.ids.index(end)], "stop")


def test_an_abort_frees_the_request_and_its_blocks(
    engine: EmbeddedEngine, make_task: MakeTask
) -> None:
    async def run() -> float:
        request = GenerationRequest("test", prompt(1), LONG, make_task(1))
        async with aclosing(engine.generate(request)) as chunks:
            await anext(chunks)
            used = engine.stats().kv_cache_usage
            assert engine.stats().slots_used == 1
        await idle(engine)
        return used

    assert asyncio.run(run()) > 0
    stats = engine.stats()
    assert (stats.running, stats.kv_cache_usage, stats.slots_used) == (0, 0, 0)


def test_an_aborted_request_leaves_the_queue(make_engine: MakeEngine) -> None:
    async def run() -> Answer:
        async with started(make_engine(max_running=1)) as engine:
            first = asyncio.create_task(complete(engine, prompt(1)))
            second = asyncio.create_task(complete(engine, prompt(2), None, LONG))
            third = asyncio.create_task(complete(engine, prompt(3)))
            while not engine.stats().running:
                await asyncio.sleep(0)
            second.cancel()
            await first
            return await third

    assert asyncio.run(run()).finish_reason == "length"


def test_tasks_wait_for_a_slot_and_are_served(
    engine: EmbeddedEngine, make_engine: MakeEngine, make_task: MakeTask
) -> None:
    async def run(engine: EmbeddedEngine) -> list[Answer]:
        requests = [complete(engine, prompt(i), make_task(i % 3)) for i in range(6)]
        return await asyncio.gather(*requests)

    async def through_one_slot() -> list[Answer]:
        async with started(make_engine(slots=2)) as narrow:
            return await run(narrow)

    assert asyncio.run(through_one_slot()) == asyncio.run(run(engine))


def test_a_full_cache_delays_requests_and_changes_nothing(
    engine: EmbeddedEngine, make_engine: MakeEngine
) -> None:
    sampling = replace(GREEDY, max_tokens=20, logprobs=1, prompt_logprobs=0)

    async def run(engine: EmbeddedEngine) -> list[tuple[int, ...]]:
        requests = [complete(engine, prompt(i), None, sampling) for i in range(5)]
        answers = await asyncio.gather(*requests)
        assert all(answer.prompt and len(answer.prompt) == 14 for answer in answers)
        await idle(engine)
        assert engine.stats().kv_cache_usage == 0
        return [answer.ids for answer in answers]

    async def in_six_blocks() -> list[tuple[int, ...]]:
        async with started(make_engine(kv_cache_tokens=96)) as narrow:
            return await run(narrow)

    assert asyncio.run(in_six_blocks()) == asyncio.run(run(engine))


def test_a_request_that_diverges_fails_alone_and_leaves_nothing_behind(
    engine: EmbeddedEngine, make_task: MakeTask
) -> None:
    async def run(tasks: Sequence[TaskVersion | None]) -> list[Any]:
        requests = [complete(engine, prompt(i), task) for i, task in enumerate(tasks)]
        return await asyncio.gather(*requests, return_exceptions=True)

    good = [make_task(1), None, make_task(2), None]
    before = asyncio.run(run(good))
    mixed = asyncio.run(run([*good[:2], diverging(make_task(3)), *good[3:]]))
    assert isinstance(mixed[2], EngineError)
    assert [mixed[i] for i in (0, 1, 3)] == [before[i] for i in (0, 1, 3)]
    assert asyncio.run(run(good)) == before


def test_a_forward_pass_that_fails_fails_its_batch_only(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.delattr(PagedCache, "plan")
        with pytest.raises(EngineError, match="forward pass failed"):
            asyncio.run(complete(engine, prompt(1)))
    assert asyncio.run(complete(engine, prompt(1))).finish_reason == "length"
    assert engine.stats().kv_cache_usage == 0


@pytest.mark.parametrize(
    ("tokens", "wanted", "message"),
    [
        ((), 1, "no tokens"),
        ((1, 49152), 1, "from 0 to 49151"),
        ((-1,), 1, "from 0 to 49151"),
        (prompt(1), 2040, r"14 \+ 2040 tokens, the engine holds 2048"),
    ],
)
def test_what_cannot_run_is_refused_at_once(
    engine: EmbeddedEngine, tokens: tuple[int, ...], wanted: int, message: str
) -> None:
    sampling = SamplingParams(max_tokens=wanted)
    with pytest.raises(EngineError, match=message):
        asyncio.run(complete(engine, tokens, None, sampling))


def test_the_context_ends_with_the_cache(make_engine: MakeEngine) -> None:
    async def run() -> Answer:
        async with started(make_engine(kv_cache_tokens=40)) as engine:
            assert engine.context_length == 32
            return await complete(engine, prompt(1, length=24))

    assert asyncio.run(run()).finish_reason == "length"


def test_stop_ends_every_request_and_the_thread(make_engine: MakeEngine) -> None:
    async def run() -> None:
        engine = make_engine(max_running=2)
        with pytest.raises(EngineStopped, match="not been started"):
            engine.check()
        await engine.start()
        requests = [asyncio.create_task(complete(engine, prompt(i), None, LONG)) for i in range(4)]
        while not engine.stats().running:
            await asyncio.sleep(0)
        threads = {thread.name for thread in threading.enumerate()}
        await engine.stop()
        for request in requests:
            with pytest.raises(EngineStopped):
                await request
        with pytest.raises(EngineStopped):
            await complete(engine, prompt(1))
        assert "polyrex-engine" in threads
        assert engine.stats().kv_cache_usage == 0

    before = threading.active_count()
    asyncio.run(run())
    assert threading.active_count() == before


def test_a_request_that_cannot_be_placed_fails_alone(engine: EmbeddedEngine) -> None:
    async def run() -> list[Any]:
        good = [complete(engine, prompt(i), None, GREEDY) for i in range(3)]
        bad = complete(engine, prompt(5), None, GREEDY, salt="\ud800")
        return await asyncio.gather(*good, bad, return_exceptions=True)

    *good, bad = asyncio.run(run())
    assert isinstance(bad, EngineError)
    assert [answer.finish_reason for answer in good] == ["length"] * 3
    assert (engine.stats().running, engine.stats().kv_cache_usage) == (0, 0)


def test_a_task_whose_slot_cannot_be_written_fails_alone(
    engine: EmbeddedEngine, make_task: MakeTask
) -> None:
    task = make_task(1)
    odd = replace(task.router, weights=task.router.weights[:, :-1])
    info = replace(task.info, router_sha256="odd")

    async def run() -> list[Any]:
        tasks = [make_task(2), TaskVersion(info, odd), None]
        asked = [complete(engine, prompt(i), task) for i, task in enumerate(tasks)]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, bad, last = asyncio.run(run())
    assert isinstance(bad, EngineError)
    assert (first.finish_reason, last.finish_reason) == ("length", "length")
    assert engine.stats().slots_used == 0


def test_a_step_without_enough_memory_fails_its_batch_and_frees_it(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: object) -> None:
        torch.empty(1 << 60)

    with monkeypatch.context() as full:
        full.setattr(PagedCache, "plan", allocate)
        with pytest.raises(EngineOutOfMemory):
            asyncio.run(complete(engine, prompt(1)))
    assert asyncio.run(complete(engine, prompt(1))).finish_reason == "length"
    assert engine.stats().kv_cache_usage == 0


def test_steps_that_fail_one_after_the_other_end_the_engine(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with started(make_engine()) as engine:
            monkeypatch.delattr(Scheduler, "schedule")
            for _ in range(2):
                with pytest.raises(EngineError, match="schedule"):
                    await complete(engine, prompt(1))
                engine.check()
            with pytest.raises(EngineError, match="schedule"):
                await complete(engine, prompt(1))
            with pytest.raises(EngineStopped, match="died"):
                await complete(engine, prompt(1))
            with pytest.raises(EngineStopped, match="died: 3 steps in a row failed"):
                engine.check()

    asyncio.run(run())


def test_sizes_that_cannot_work_are_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(StartError, match="max_running 64 is more than max_batch_tokens 32"):
        make_engine(max_batch_tokens=32)
