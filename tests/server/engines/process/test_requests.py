"""Requests pass through the engine's process and back, as they would in this one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from polyrex.server.engines.base import GenerationRequest, SamplingParams
from polyrex.server.engines.process.client import EngineClient
from polyrex.server.errors import EngineError, EngineStopped
from support.engine_calls import Answer, complete
from support.engine_process.hosted import SECONDS, runs, started, started_client, stub_client
from support.reliability.stress.stub_engine import StubEngine, StubSettings

T = TypeVar("T")

MANY = SamplingParams(max_tokens=30, temperature=0.0, logprobs=3, prompt_logprobs=2)
LONG = SamplingParams(max_tokens=500, temperature=0.0)


def run(work: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(SECONDS):
            return await work

    return asyncio.run(limited())


async def idle(client: EngineClient) -> bool:
    while client.stats().running or client.stats().waiting:
        await asyncio.sleep(0.02)
    return True


def test_two_hundred_streams_are_answered_each_in_order(tmp_path: Path) -> None:
    asked = [(1 + i, 2, 3) for i in range(200)]

    async def hosted() -> list[Answer]:
        async with started_client(stub_client(tmp_path)) as client:
            requests = [complete(client, prompt, None, MANY) for prompt in asked]
            return await asyncio.gather(*requests)

    async def here() -> list[Answer]:
        engine = StubEngine(StubSettings(step_seconds=0.001, most_running=256))
        await engine.start()
        requests = [complete(engine, prompt, None, MANY) for prompt in asked]
        found = await asyncio.gather(*requests)
        await engine.stop()
        return found

    answers = run(hosted())
    assert answers == run(here())
    assert len({answer.ids for answer in answers}) > 100
    assert all(len(answer.prompt or ()) == 3 for answer in answers)


def test_whoever_leaves_frees_the_engine(tmp_path: Path) -> None:
    ended: list[str] = []

    async def leave() -> bool:
        async with started_client(stub_client(tmp_path)) as client:
            request = GenerationRequest("left", (1, 2), LONG, ended=lambda: ended.append("left"))
            async with aclosing(client.generate(request)) as chunks:
                await anext(chunks)
                while not client.stats().running:
                    await asyncio.sleep(0.02)
            return await idle(client)

    assert run(leave())
    assert ended == ["left"]


def test_a_request_says_when_the_engine_is_done_with_it_though_nobody_reads(tmp_path: Path) -> None:
    ended: list[str] = []

    async def read_late() -> int:
        async with started_client(stub_client(tmp_path)) as client:
            request = GenerationRequest("slow", (1, 2), MANY, ended=lambda: ended.append("slow"))
            async with aclosing(client.generate(request)) as chunks:
                await anext(chunks)
                while not ended:
                    await asyncio.sleep(0.01)
                return 1 + len([chunk async for chunk in chunks])

    assert run(read_late()) == 30
    assert ended == ["slow"]


def test_a_prompt_of_a_megabyte_arrives(tmp_path: Path) -> None:
    prompt = tuple(i % 400 for i in range(350_000))

    async def ask() -> Answer:
        client = stub_client(tmp_path, context_length=400_000)
        async with started_client(client):
            return await complete(client, prompt, None, replace(MANY, prompt_logprobs=None))

    assert len(run(ask()).tokens) == 30


def test_a_request_that_the_engine_refuses_fails_alone(tmp_path: Path) -> None:
    async def ask() -> tuple[Any, Answer]:
        async with started_client(stub_client(tmp_path)) as client:
            wrong = complete(client, (500,), None, MANY)
            right = complete(client, (1,), None, MANY)
            refused, answer = await asyncio.gather(wrong, right, return_exceptions=True)
            assert isinstance(answer, Answer)
            return refused, answer

    refused, answer = run(ask())
    assert isinstance(refused, EngineError)
    assert str(refused) == "prompt token ids must be from 0 to 499"
    assert len(answer.tokens) == 30


def test_a_request_that_cannot_be_sent_leaves_nothing_behind(tmp_path: Path) -> None:
    async def ask() -> Answer:
        async with started_client(stub_client(tmp_path)) as client:
            with pytest.raises(UnicodeEncodeError):
                await complete(client, (1,), None, MANY, salt="\ud800")
            assert client._host is not None
            assert not client._host._asked
            return await complete(client, (1,), None, MANY)

    assert len(run(ask()).tokens) == 30


def test_stop_ends_every_request_and_the_process(tmp_path: Path) -> None:
    async def stop() -> list[Any]:
        client = stub_client(tmp_path)
        with pytest.raises(EngineStopped, match="not been started"):
            client.check()
        await client.start()
        requests = [asyncio.create_task(complete(client, (i,), None, LONG)) for i in range(5)]
        while not client.stats().running:
            await asyncio.sleep(0.01)
        await client.stop()
        with pytest.raises(EngineStopped, match="shutting down"):
            client.check()
        return await asyncio.gather(*requests, return_exceptions=True)

    assert [type(end) for end in run(stop())] == [EngineStopped] * 5
    assert not any(runs(pid) for pid in started(tmp_path))
