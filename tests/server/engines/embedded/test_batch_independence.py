"""A request's tokens do not depend on what else is in its batches (greedy, float32)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch

from polyrex.adapters.files.task import TaskVersion
from polyrex.kernels.routing import RoutingTable, StepRouting
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from support.engine_calls import Answer, MakeEngine, MakeTask, PlainModel, complete, prompt, started

COUNT = 32
Ids = tuple[int, ...]


@pytest.fixture(scope="module")
def tasks(make_task: MakeTask) -> list[TaskVersion]:
    return [make_task(seed) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def alone(engine: EmbeddedEngine, tasks: list[TaskVersion]) -> list[Ids]:
    """Each task's answer to its own prompt while nothing else runs."""

    async def one_by_one() -> list[Ids]:
        return [(await complete(engine, prompt(i), task)).ids for i, task in enumerate(tasks)]

    return asyncio.run(one_by_one())


async def at_once(engine: EmbeddedEngine, tasks: Sequence[TaskVersion | None]) -> list[Answer]:
    requests = [complete(engine, prompt(i), task) for i, task in enumerate(tasks)]
    return await asyncio.gather(*requests)


def test_32_tasks_at_once_answer_as_one_by_one(
    engine: EmbeddedEngine, tasks: list[TaskVersion], alone: list[Ids]
) -> None:
    assert [answer.ids for answer in asyncio.run(at_once(engine, tasks))] == alone


def test_32_tasks_answer_the_same_through_4_slots_that_change_hands(
    make_engine: MakeEngine, tasks: list[TaskVersion], alone: list[Ids]
) -> None:
    async def run() -> list[Answer]:
        async with started(make_engine(slots=5)) as engine:
            return await at_once(engine, tasks)

    assert [answer.ids for answer in asyncio.run(run())] == alone


def test_a_running_request_keeps_its_slot_while_others_change_hands(
    make_engine: MakeEngine, make_task: MakeTask, tasks: list[TaskVersion], alone: list[Ids]
) -> None:
    async def run() -> Answer:
        async with started(make_engine(slots=3)) as engine:
            first = asyncio.create_task(complete(engine, prompt(0), tasks[0]))
            await asyncio.gather(
                *(complete(engine, prompt(i), make_task(100 + i)) for i in range(3))
            )
            return await first

    assert asyncio.run(run()).ids == alone[0]


def test_base_requests_in_a_mixed_batch_are_the_plain_model(
    engine: EmbeddedEngine, tasks: list[TaskVersion], plain: PlainModel
) -> None:
    answers = asyncio.run(at_once(engine, [tasks[0], None, tasks[2], None]))
    assert answers[1].ids == plain.greedy(prompt(1), 5)
    assert answers[3].ids == plain.greedy(prompt(3), 5)


def test_routing_that_is_one_request_off_is_noticed(
    engine: EmbeddedEngine,
    tasks: list[TaskVersion],
    alone: list[Ids],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = RoutingTable.step

    def shifted(self: RoutingTable, slots: Sequence[int], dtype: torch.dtype) -> StepRouting | None:
        distinct = sorted(set(slots))
        following = dict(zip(distinct, distinct[1:] + distinct[:1], strict=True))
        return right(self, [following[slot] for slot in slots], dtype)

    monkeypatch.setattr(RoutingTable, "step", shifted)
    answers = asyncio.run(at_once(engine, tasks[:4]))
    assert [answer.ids for answer in answers] != alone[:4]


def test_a_prompt_answers_for_its_own_task_whoever_asked_it_before(
    engine: EmbeddedEngine, tasks: list[TaskVersion], make_engine: MakeEngine
) -> None:
    same = prompt(7, length=40)  # two whole blocks that a prefix cache would keep
    # Task A, then B, then A with another router; the last is A again, whose slot is still warm.
    order = [tasks[0], tasks[1], tasks[2], tasks[0]]

    async def warm() -> list[Ids]:
        return [(await complete(engine, same, task)).ids for task in order]

    async def cold(task: TaskVersion) -> Ids:
        async with started(make_engine()) as fresh:
            return (await complete(fresh, same, task)).ids

    first, second, changed, again = asyncio.run(warm())
    assert len({first, second, changed}) == 3
    assert first == again
    assert [first, second, changed] == [asyncio.run(cold(task)) for task in tasks[:3]]


def test_long_and_short_contexts_decode_together(
    engine: EmbeddedEngine, tasks: list[TaskVersion]
) -> None:
    lengths = (300, 9, 150, 17)

    async def run() -> tuple[list[Answer], list[Answer]]:
        prompts = [prompt(i, length) for i, length in enumerate(lengths)]
        single = [
            await complete(engine, tokens, task)
            for tokens, task in zip(prompts, tasks, strict=False)
        ]
        requests = (
            complete(engine, tokens, task) for tokens, task in zip(prompts, tasks, strict=False)
        )
        return single, await asyncio.gather(*requests)

    single, together = asyncio.run(run())
    assert together == single
