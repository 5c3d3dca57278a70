"""When steps run shared or composed, and whose states they need."""

from __future__ import annotations

import logging

import pytest
import torch

from polyrex.kernels.places import Places
from polyrex.kernels.routing import RoutingTable
from polyrex.kernels.step_plan import Costs, Planner, SharedOrComposed, StepPlan, TaskStates

EXPERTS = 8


def plan(planner: Planner, slots: list[int]) -> StepPlan:
    return planner.plan(slots, {slot: row for row, slot in enumerate(sorted(set(slots)))})


@pytest.fixture
def planner() -> SharedOrComposed:
    return SharedOrComposed(Places(4), EXPERTS, Costs(run=40, compose=200, worth=100))


def test_many_tasks_decoding_share(planner: SharedOrComposed) -> None:
    assert plan(planner, list(range(1, 33))).path == "shared"
    assert plan(planner, [1, 2, 3, 4] * 8).path == "shared"  # runs of one token


def test_one_task_and_long_prompts_are_composed(planner: SharedOrComposed) -> None:
    assert plan(planner, [7] * 60).path == "composed"
    assert [plan(planner, [5] * 32).path for _ in range(3)] == ["shared", "composed", "composed"]
    found = plan(planner, [3] * 512 + [0] + [9] * 256)
    assert [(run.begin, run.end, run.row) for run in found.runs] == [(0, 512, 1), (513, 769, 2)]


def test_short_requests_share_the_first_time_and_the_tenth(planner: SharedOrComposed) -> None:
    assert [plan(planner, [1] * 17).path for _ in range(10)] == ["shared"] * 10


def test_more_tasks_than_places_share(planner: SharedOrComposed) -> None:
    found = plan(planner, [slot for slot in range(1, 6) for _ in range(500)])
    assert found.path == "shared"
    assert "5 tasks, of which 4 can be kept" in found.reason


def test_a_task_that_is_not_kept_must_be_worth_composing() -> None:
    planner = SharedOrComposed(Places(4), EXPERTS, Costs(run=1, compose=200, worth=0))
    assert plan(planner, [1] * 20).path == "shared"  # 160 against 20 + 1 + 200
    assert plan(planner, [2] * 40).path == "composed"
    assert plan(planner, [2] * 20).path == "composed"  # it is kept now


def test_tasks_are_composed_once_it_would_have_paid() -> None:
    """A prompt of 17 tokens runs composed for 7 * 17 - 40 = 79 less than shared."""
    planner = SharedOrComposed(Places(32), EXPERTS, Costs(run=40, compose=200, worth=100))
    prompts = [slot for slot in range(1, 33) for _ in range(17)]
    paths = [plan(planner, prompts).path for _ in range(4)]
    assert paths == ["shared", "shared", "composed", "composed"]
    for slot in set(prompts):
        planner.forget(slot)  # it is another task's now
    assert plan(planner, prompts).path == "shared"


def test_task_states_name_every_task_once() -> None:
    planner = TaskStates(Places(4))
    found = plan(planner, [5, 0, 5, 6])
    assert [row for row, _ in found.places] == [1, 2]
    assert plan(planner, [6, 5, 0]) is found  # nothing is new
    planner.forget(5)
    assert plan(planner, [6, 5, 0]) is not found
    more = plan(planner, [1, 2, 3, 4, 5])  # than fit
    assert len({place.number for _, place in more.places}) == 5


def test_a_step_never_takes_the_place_of_one_of_its_own_tasks() -> None:
    planner = TaskStates(Places(2))
    first = dict(plan(planner, [5, 6]).places)
    both = plan(planner, [6, 7])
    assert dict(both.places)[0] == first[1]  # that of slot 6, derived already
    assert plan(planner, [5, 6]).places[1][1] == first[1]


def test_a_change_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    planner = SharedOrComposed(Places(4), EXPERTS)
    table = RoutingTable(4, 1, EXPERTS, torch.device("cpu"), planner=planner)
    with caplog.at_level(logging.DEBUG, logger="polyrex.kernels.step_plan"):
        for slots in ([1, 2, 3], [2, 1, 3], [1] * 64):
            table.step(slots, torch.float32)
    (message,) = caplog.messages
    assert message.startswith("adapters run composed: 64 tokens in 1 runs, 1 tasks new")


def test_writing_a_slot_makes_its_task_new() -> None:
    planner = SharedOrComposed(Places(4), EXPERTS)
    table = RoutingTable(4, 1, EXPERTS, torch.device("cpu"), planner=planner)
    keys = []
    for _ in range(2):
        table.write(1, torch.ones(1, EXPERTS))
        step = table.step([1] * 64, torch.float32)
        assert step is not None
        keys.append(step.plan.runs[0].place.key)
    assert keys[0] != keys[1]
