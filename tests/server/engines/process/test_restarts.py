"""An engine that dies, stops or hangs ends its requests at once, and comes back by itself."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from polyrex.server.engines.base import GenerationRequest, SamplingParams
from polyrex.server.engines.process.client import EngineClient, Supervision
from polyrex.server.errors import EngineRestarting, EngineStopped, StartError
from support.engine_calls import Answer, complete
from support.engine_process.hosted import (
    BAD_STATUS,
    QUICK,
    SECONDS,
    runs,
    started,
    started_client,
    stub_client,
)
from support.reliability.stress.stub_engine import CRASH, HANG

T = TypeVar("T")

SHORT = SamplingParams(max_tokens=5, temperature=0.0)
LONG = SamplingParams(max_tokens=500, temperature=0.0)
IMPATIENT = replace(QUICK, stall_seconds=2.0)


def run(work: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(SECONDS):
            return await work

    return asyncio.run(limited())


async def serving(client: EngineClient) -> None:
    """Wait until the engine serves."""
    while True:
        try:
            client.check()
            return
        except EngineRestarting:
            await asyncio.sleep(0.02)


async def given_up(client: EngineClient) -> str:
    """Wait until the engine is given up; what is said of it then."""
    while True:
        try:
            client.check()
        except EngineRestarting:
            pass
        except EngineStopped as error:
            return str(error)
        await asyncio.sleep(0.02)


async def begin(client: EngineClient, count: int) -> list[asyncio.Task[Answer]]:
    """Requests of which each has had a token."""
    begun = asyncio.Semaphore(0)

    async def stream(number: int) -> Answer:
        request = GenerationRequest(f"r{number}", (1 + number,), LONG)
        async with aclosing(client.generate(request)) as chunks:
            async for _ in chunks:
                begun.release()
        return Answer((), None, None)

    tasks = [asyncio.create_task(stream(number)) for number in range(count)]
    for _ in tasks:
        await begun.acquire()
    return tasks


def kill(client: EngineClient) -> None:
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)


def stop(client: EngineClient) -> None:
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)


@pytest.mark.parametrize("fault", [kill, stop])
def test_an_engine_that_is_gone_ends_its_requests_and_comes_back(
    tmp_path: Path,
    fault: Callable[[EngineClient], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def lose() -> tuple[list[Any], Answer, Answer, int]:
        async with started_client(stub_client(tmp_path)) as client:
            before = await complete(client, (1, 2), None, SHORT)
            requests = await begin(client, 8)
            fault(client)
            ends = await asyncio.gather(*requests, return_exceptions=True)
            with pytest.raises(EngineRestarting):
                client.check()
            with pytest.raises(EngineRestarting):
                await complete(client, (1,), None, SHORT)
            await serving(client)
            after = await complete(client, (1, 2), None, SHORT)
            return ends, before, after, client.stats().restarts

    caplog.set_level(logging.WARNING)
    ends, before, after, restarts = run(lose())
    assert [type(end) for end in ends] == [EngineRestarting] * 8
    assert after == before
    assert restarts == 1
    first, second = started(tmp_path)
    assert (runs(first), runs(second)) == (False, False)
    how = "was killed by SIGKILL" if fault is kill else "was stopped by a signal"
    ours = [r.getMessage() for r in caplog.records if r.name.endswith("process.client")]
    assert ours[0] == f"the engine {how}; it is started again (1 in a row)"
    assert ours[1].startswith("the engine serves again")
    assert len(ours) == 2


def test_an_engine_that_hangs_ends_its_requests_and_comes_back(tmp_path: Path) -> None:
    async def hang() -> tuple[list[Any], Answer]:
        async with started_client(stub_client(tmp_path, IMPATIENT)) as client:
            requests = await begin(client, 4)
            requests.append(asyncio.create_task(complete(client, (HANG,), None, SHORT)))
            ends = await asyncio.gather(*requests, return_exceptions=True)
            await serving(client)
            return ends, await complete(client, (1,), None, SHORT)

    ends, answer = run(hang())
    assert [type(end) for end in ends] == [EngineRestarting] * 5
    assert len(answer.tokens) == 5
    assert len(started(tmp_path)) == 2


def test_an_idle_engine_is_left_alone(tmp_path: Path) -> None:
    async def wait() -> Answer:
        supervision = replace(QUICK, stall_seconds=0.5)
        async with started_client(stub_client(tmp_path, supervision)) as client:
            assert client._host is not None
            turns = client._host.turns
            while client._host.turns < turns + 10:  # four times as long
                await asyncio.sleep(0.05)
            return await complete(client, (1,), None, SHORT)

    assert len(run(wait()).tokens) == 5
    assert len(started(tmp_path)) == 1


def test_a_request_that_makes_the_engine_crash_does_not_end_the_next_one(tmp_path: Path) -> None:
    async def crash() -> Answer:
        async with started_client(stub_client(tmp_path)) as client:
            with pytest.raises(EngineRestarting):
                await complete(client, (CRASH,), None, SHORT)
            await serving(client)
            return await complete(client, (1,), None, SHORT)

    assert len(run(crash()).tokens) == 5


def test_three_starts_in_a_row_and_the_engine_is_given_up(tmp_path: Path) -> None:
    async def crash() -> tuple[str, int]:
        client = stub_client(tmp_path, bad_starts=(2, 3, 4, 5))
        async with started_client(client):
            kill(client)
            said = await given_up(client)
            with pytest.raises(EngineStopped, match="given up") as error:
                await complete(client, (1,), None, SHORT)
            assert type(error.value) is EngineStopped
            return said, client.stats().restarts

    assert run(crash()) == ("the engine failed too often, and is given up", 3)
    assert len(started(tmp_path)) == 4
    assert not any(runs(pid) for pid in started(tmp_path))


def test_an_engine_comes_back_at_the_third_start(tmp_path: Path) -> None:
    async def crash() -> Answer:
        async with started_client(stub_client(tmp_path, bad_starts=(2, 3))) as client:
            kill(client)
            await asyncio.sleep(0)
            await serving_after(client, restarts=3)
            return await complete(client, (1,), None, SHORT)

    assert len(run(crash()).tokens) == 5
    assert len(started(tmp_path)) == 4


async def serving_after(client: EngineClient, restarts: int) -> None:
    while client.stats().restarts < restarts:
        await asyncio.sleep(0.02)
    await serving(client)


def test_an_engine_that_served_for_a_while_may_fail_again(tmp_path: Path) -> None:
    supervision = Supervision(pauses=(0.0,), healthy_seconds=0.0)

    async def crash() -> Answer:
        async with started_client(stub_client(tmp_path, supervision)) as client:
            for restarts in (1, 2, 3):
                kill(client)
                await serving_after(client, restarts)
            return await complete(client, (1,), None, SHORT)

    assert len(run(crash()).tokens) == 5


def test_a_start_that_takes_far_longer_than_the_first_is_ended(tmp_path: Path) -> None:
    async def slow() -> str:
        client = stub_client(tmp_path, replace(QUICK, stall_seconds=1.0, pauses=(0.0,)))
        async with started_client(client):
            (tmp_path / "slow").touch()
            kill(client)
            return await given_up(client)

    assert "given up" in run(slow())
    assert not any(runs(pid) for pid in started(tmp_path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"error": "no such model"}, "^no such model$"),
        ({"bad_starts": (1,)}, f"its process ended with status {BAD_STATUS}"),
    ],
)
def test_an_engine_that_cannot_start_says_why(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    async def start() -> EngineClient:
        client = stub_client(tmp_path, **settings)
        with pytest.raises(StartError, match=said):
            await client.start()
        await client.stop()
        return client

    client = run(start())
    with pytest.raises(EngineStopped):
        client.check()
    (pid,) = started(tmp_path)
    assert not runs(pid)


def test_a_slow_start_can_be_cut_short(tmp_path: Path) -> None:
    (tmp_path / "slow").touch()

    async def start() -> None:
        client = stub_client(tmp_path)
        starting = asyncio.create_task(client.start())
        while not (tmp_path / "starts").exists():
            await asyncio.sleep(0.02)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await client.stop()

    run(start())
    (pid,) = started(tmp_path)
    assert not runs(pid)
