"""What clients see in overload, in virtual time: the real admission before a simulated engine."""

from __future__ import annotations

import asyncio

import pytest

from support.admission.simulated import (
    Seen,
    SteppingEngine,
    ask,
    open_loop,
    percentile,
    places,
    request,
)
from support.admission.virtual_time import run_virtually

MOST_RUNNING, STEP, TOKENS = 16, 0.02, 16
CAPACITY = MOST_RUNNING / (STEP * TOKENS)
"""Completions a second."""


async def load(times: float, seconds: float, stalled: float = 0.0) -> Seen:
    """What one tenant sees that asks for so many times the capacity."""
    seen = Seen()
    at = places(SteppingEngine(MOST_RUNNING, STEP))
    await open_loop(at, ask(tokens=TOKENS), times * CAPACITY, seconds, seen, stalled=stalled)
    assert at.in_flight == 0
    return seen


@pytest.fixture(scope="module")
def at_capacity() -> Seen:
    return run_virtually(load(1, 30))


def test_at_ten_times_the_load_accepted_requests_are_as_fast_as_at_capacity(
    at_capacity: Seen,
) -> None:
    overload = run_virtually(load(10, 20))
    once, ten_times = (percentile(seen.first_tokens, 0.99) for seen in (at_capacity, overload))
    assert ten_times <= 2 * once
    assert len(overload.latencies) / 20 >= 0.9 * CAPACITY
    assert overload.errors.keys() == {"Overloaded"}
    assert percentile(overload.refusals, 0.98) == 0  # all but those of the first moment


def test_readers_that_stall_take_nothing_from_the_others() -> None:
    seen = run_virtually(load(10, 10, stalled=0.2))
    assert len(seen.latencies) / 10 >= 0.8 * 0.9 * CAPACITY
    assert percentile(seen.latencies, 0.9) < 1


def test_a_burst_is_served_whole_if_nothing_comes_after_it() -> None:
    async def burst() -> Seen:
        seen = Seen()
        at = places(SteppingEngine(MOST_RUNNING, STEP))
        await request(at, ask(tokens=TOKENS))
        tasks = []
        for _ in range(150):
            tasks.append(asyncio.create_task(request(at, ask(tokens=TOKENS), seen)))
            await asyncio.sleep(0.35 / 150)
        await asyncio.gather(*tasks)
        return seen

    seen = run_virtually(burst())
    assert (len(seen.latencies), seen.errors.total()) == (150, 0)


def test_all_is_as_before_seconds_after_an_overload() -> None:
    async def run() -> Seen:
        at, before, after = places(SteppingEngine(MOST_RUNNING, STEP)), Seen(), Seen()
        await open_loop(at, ask(tokens=TOKENS), 10 * CAPACITY, 5, before)
        await open_loop(at, ask(tokens=TOKENS), 0.5 * CAPACITY, 10, after)
        return after

    after = run_virtually(run())
    assert after.errors.total() == 0
    assert percentile(after.first_tokens, 0.99) < 4 * STEP


def neighbours(other: bool, seconds: float = 20) -> tuple[Seen, Seen]:
    """What a tenant sees at half its share, alone or beside one that floods, and that one."""

    async def run() -> tuple[Seen, Seen]:
        own, flood = Seen(), Seen()
        at = places(SteppingEngine(MOST_RUNNING, STEP))
        wanted = ask("own", tokens=TOKENS)
        work = [open_loop(at, wanted, CAPACITY / 4, seconds, own, seed=1)]
        if other:
            wanted = ask("flood", tokens=TOKENS)
            work.append(open_loop(at, wanted, CAPACITY * 10, seconds, flood, seed=2))
        await asyncio.gather(*work)
        return own, flood

    return run_virtually(run())


def test_a_tenant_at_half_its_share_hardly_notices_one_that_floods() -> None:
    alone, _ = neighbours(other=False)
    beside, flood = neighbours(other=True)
    assert beside.errors.total() == 0
    assert len(beside.latencies) == len(alone.latencies)
    slowest = [percentile(seen.latencies, 0.99) for seen in (alone, beside)]
    assert slowest[1] <= 1.5 * slowest[0]
    assert len(flood.latencies) / 20 >= 0.9 * 0.75 * CAPACITY - 2  # and the flood has the rest
