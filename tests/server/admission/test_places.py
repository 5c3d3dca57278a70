"""Places in the engine: how many, for whom, how long one waits, and what is refused at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing, suppress

import pytest

from polyrex.server.admission.place import Place
from polyrex.server.engines.base import GenerationRequest, SamplingParams, TokenChunk
from polyrex.server.errors import (
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    Overloaded,
    ServerFull,
)
from support.admission.simulated import LONG, Seen, SteppingEngine, ask, places, request
from support.admission.virtual_time import run_virtually


def begin(*requests: object) -> list[asyncio.Task[None]]:
    """Start requests; they have asked for their places when the next line runs after a sleep."""
    return [asyncio.create_task(one) for one in requests]  # type: ignore[arg-type]


async def cancel(*tasks: asyncio.Task[None]) -> None:
    """Let clients leave."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_the_engine_gets_what_it_can_run_and_a_few_more() -> None:
    async def run() -> tuple[int, int, int]:
        engine = SteppingEngine(most_running=32)
        at = places(engine)
        tasks = begin(*(request(at, ask()) for _ in range(100)))
        await asyncio.sleep(0.001)
        found = engine.under_way, at.running, at.in_flight
        await asyncio.gather(*tasks)
        assert (engine.under_way, at.running, at.in_flight) == (0, 0, 0)
        return found

    assert run_virtually(run()) == (34, 34, 100)


def test_completions_wait_while_their_prompts_would_not_fit_the_cache() -> None:
    async def run() -> int:
        engine = SteppingEngine(most_running=32, kv_blocks=64)  # of 16 tokens
        at = places(engine)
        tasks = begin(*(request(at, ask(prompt_tokens=200.0)) for _ in range(9)))
        await asyncio.sleep(0.001)
        running = engine.under_way
        await asyncio.gather(*tasks)
        return running

    assert run_virtually(run()) == 5


def test_a_request_of_many_completions_gets_its_places_one_by_one() -> None:
    async def run() -> None:
        engine = SteppingEngine(most_running=16)
        at, seen = places(engine), Seen()
        many = begin(request(at, ask("a", completions=100), seen))
        await asyncio.sleep(0.001)
        assert (engine.under_way, at.in_flight) == (17, 100)
        await request(at, ask("b"), seen)
        assert seen.latencies[0] < 0.7  # b waited for one completion of a, not for a hundred
        await asyncio.gather(*many)
        assert len(engine.seen) == 101
        assert at.in_flight == 0

    run_virtually(run())


def test_a_reader_that_stalls_keeps_no_place_once_the_engine_is_done() -> None:
    async def run() -> None:
        engine = SteppingEngine(most_running=4)
        at, seen = places(engine), Seen()
        stalled = begin(*(request(at, ask(), stall=1000.0) for _ in range(20)))
        await asyncio.sleep(3)
        assert (at.in_flight, len(engine.seen)) == (0, 20)
        await request(at, ask(), seen)
        assert seen.latencies[0] < 1
        await cancel(*stalled)
        assert at.in_flight == 0

    run_virtually(run())


@pytest.mark.parametrize("while_queued", [True, False])
def test_a_client_that_leaves_frees_its_places_at_once(while_queued: bool) -> None:
    async def run() -> None:
        engine = SteppingEngine(most_running=4)
        at = places(engine)
        running = begin(request(at, ask(completions=5, tokens=1000)))
        await asyncio.sleep(0.1)
        queued = begin(*(request(at, ask("b", completions=2, tokens=1000)) for _ in range(3)))
        await asyncio.sleep(0.1)
        assert (at.running, at.in_flight) == (5, 11)
        await cancel(*(queued if while_queued else running))
        assert (at.running, at.in_flight) == ((5, 5) if while_queued else (4, 6))
        assert len(engine.seen) == (5 if while_queued else 9)
        await cancel(*running, *queued)
        assert (at.running, at.in_flight, at.waiting(), engine.under_way) == (0, 0, {}, 0)

    run_virtually(run())


def test_a_failure_in_the_engine_gives_the_place_back() -> None:
    class Failing(SteppingEngine):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
            raise EngineError("no memory")
            yield  # makes it a generator

    async def run() -> None:
        at, seen = places(Failing()), Seen()
        await asyncio.gather(*(request(at, ask(), seen) for _ in range(40)))
        assert seen.errors == {"EngineError": 40}
        assert (at.in_flight, at.rate) == (0, None)

    run_virtually(run())


def test_more_completions_than_there_are_places_for_are_the_clients_error() -> None:
    async def run() -> None:
        at = places(SteppingEngine(), max_in_flight=8)
        with pytest.raises(InvalidRequest, match="at most 8, got 9"):
            at.admit(ask(completions=9), LONG)

    run_virtually(run())


def fill(held: ExitStack, tenant: str, completions: int, at: object) -> list[Place]:
    """Let a tenant ask for as much, one completion a request."""
    admit = at.admit  # type: ignore[attr-defined]
    return [held.enter_context(admit(ask(tenant), LONG)) for _ in range(completions)]


def test_a_tenant_alone_fills_three_quarters_and_then_gets_429() -> None:
    async def run() -> None:
        at = places(SteppingEngine(most_running=4), max_in_flight=100)
        with ExitStack() as held:
            with pytest.raises(Overloaded) as refused:
                fill(held, "a", 100, at)
            assert not isinstance(refused.value, ServerFull)
            assert refused.value.retry_after >= 1
            assert at.in_flight == 75
            assert at.refusals == {"share": 1}
            fill(held, "b", 10, at)  # there is room for another
        assert at.in_flight == 0

    run_virtually(run())


def test_a_tenant_that_has_less_than_its_share_gets_503_where_others_fill_the_server() -> None:
    async def run() -> None:
        at = places(SteppingEngine(most_running=4), max_in_flight=16)
        with ExitStack() as held:
            for tenant in "abcdefgh":
                with suppress(Overloaded):
                    fill(held, tenant, 16, at)
            assert at.in_flight == 16
            with pytest.raises(ServerFull):
                at.admit(ask("new"), LONG)
            with pytest.raises(Overloaded) as refused:
                at.admit(ask("a"), LONG)
            assert not isinstance(refused.value, ServerFull)

    run_virtually(run())


def test_no_share_is_kept_for_others_where_nobody_has_to_wait() -> None:
    async def run() -> None:
        at = places(SteppingEngine(most_running=64), max_in_flight=8)
        with ExitStack() as held:
            fill(held, "a", 8, at)
            assert at.running == 8

    run_virtually(run())


def test_queued_tokens_are_bounded_but_one_request_may_always_wait() -> None:
    async def run() -> None:
        at = places(SteppingEngine(most_running=1), max_queued_tokens=1000)
        with ExitStack() as held:
            fill(held, "a", 2, at)
            long = ask(prompt_tokens=2000.0)
            held.enter_context(at.admit(long, LONG))
            with pytest.raises(Overloaded):
                at.admit(ask(), LONG)
        assert at.waiting() == {}
        with ExitStack() as held:
            fill(held, "a", 2, at)
            with pytest.raises(Overloaded):
                fill(held, "a", 100, at)
            ((_, tokens),) = at.waiting().values()
            assert 700 < tokens < 760

    run_virtually(run())


def test_one_that_would_wait_too_long_is_refused_at_once_with_an_estimate() -> None:
    async def run() -> None:
        engine = SteppingEngine(most_running=4, step_seconds=0.1)
        at, seen = places(engine, max_queue_seconds=5.0), Seen()
        await asyncio.gather(*(request(at, ask()) for _ in range(8)))  # it learns the rate
        tasks = begin(*(request(at, ask(), seen) for _ in range(40)))
        await asyncio.sleep(0.001)
        with pytest.raises(Overloaded, match="waiting") as refused:
            at.admit(ask(), LONG)
        assert refused.value.retry_after in (4, 5)
        await asyncio.sleep(3)
        at.admit(ask(), LONG).__exit__()
        with pytest.raises(Overloaded):  # its client would not wait as long
            at.admit(ask(), 1.0)
        await asyncio.gather(*tasks)
        assert seen.errors.total() == 40 - len(seen.latencies)
        assert max(seen.first_tokens) < 7
        assert max(seen.refusals) == 0

    run_virtually(run())


def test_a_request_is_dropped_when_it_has_waited_as_long_as_it_may() -> None:
    async def run() -> None:
        engine = SteppingEngine(most_running=1)
        at = places(engine, max_queue_seconds=3.0)
        running = begin(request(at, ask(completions=2, tokens=4000)))
        await asyncio.sleep(0.1)
        clock = asyncio.get_running_loop().time
        for left, error, waits, reason in (
            (LONG, ServerFull, 3.0, "old"),
            (2.0, DeadlineExceeded, 2.0, "deadline"),
        ):
            began = clock()
            with pytest.raises(error), at.admit(ask("b"), left) as place:
                await place.wait()
            assert clock() - began == pytest.approx(waits)
            assert at.refusals[reason] == 1
        assert (len(engine.seen), at.in_flight) == (2, 2)
        await cancel(*running)

    run_virtually(run())


def test_one_whose_time_is_over_is_not_started_though_its_timer_is_late() -> None:
    async def run() -> None:
        now = [0.0]
        engine = SteppingEngine(most_running=1)
        at = places(engine)
        at.clock = lambda: now[0]
        first = at.admit(ask(completions=2), LONG)
        with at.admit(ask(), 2.0) as late:
            now[0] = 3.0  # the event loop was busy until now
            first.__exit__()
            assert late.waits
            with pytest.raises(DeadlineExceeded):
                await late.wait()
        assert (at.running, at.in_flight) == (0, 0)

    run_virtually(run())


@pytest.mark.parametrize(("most", "full", "left"), [(64, 68, 60), (24, 26, 22), (8, 9, 7)])
def test_others_find_free_places_beside_a_tenant_that_has_its_share(
    most: int, full: int, left: int
) -> None:
    async def run() -> list[int]:
        found = []
        at = places(SteppingEngine(most_running=most))
        with ExitStack() as held:
            for others in (False, True):
                if others:
                    with at.admit(ask("b"), LONG):
                        pass
                with ExitStack() as flood:
                    fill(flood, "a", 100, at)
                    found.append(at.running)
                    if others:
                        assert not any(place.waits for place in fill(held, "b", full - left, at))
                        assert at.running == full
        return found

    assert run_virtually(run()) == [full, left]


def test_weights_divide_the_engine() -> None:
    async def run() -> float:
        engine = SteppingEngine(most_running=8)
        at = places(engine, max_queue_seconds=1000.0)
        tasks = begin(
            *(request(at, ask("a", weight=3)) for _ in range(60)),
            *(request(at, ask("b", weight=1)) for _ in range(60)),
        )
        await asyncio.sleep(3)
        served = engine.seen.count("a") / engine.seen.count("b")
        await cancel(*tasks)
        return served

    assert run_virtually(run()) == pytest.approx(3, rel=0.15)


def test_a_client_that_leaves_early_has_had_what_was_expected_of_it() -> None:
    async def run() -> float:
        engine = SteppingEngine(most_running=1)
        at = places(engine)
        asked = GenerationRequest("x", (1,), SamplingParams(100))
        for _ in range(3):
            with at.admit(ask(tokens=100), LONG) as place:
                async with aclosing(place.generate(asked)) as chunks:
                    await anext(chunks)
        return place.share.account.used

    assert run_virtually(run()) == pytest.approx(303, rel=0.01)
