"""The routing table, and the rows that one step reads."""

from __future__ import annotations

import pytest
import torch

from polyrex.kernels import routing
from polyrex.kernels.places import Places
from polyrex.kernels.routing import RoutingTable, StepRouting
from polyrex.kernels.step_plan import TaskStates

MODULES, WIDTH = 3, 4


@pytest.fixture
def table() -> RoutingTable:
    table = RoutingTable(6, MODULES, WIDTH, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for slot in range(1, 6):
        table.write(slot, torch.rand(MODULES, WIDTH, generator=generator))
    return table


def test_batch_of_base_requests_has_no_routing(table: RoutingTable) -> None:
    assert table.step([0, 0, 0], torch.float32) is None


def test_empty_batch_has_no_routing(table: RoutingTable) -> None:
    assert table.step([], torch.float32) is None


def test_every_token_gets_the_weights_of_its_slot(table: RoutingTable) -> None:
    slots = [4, 0, 2, 4, 5]
    step = table.step(slots, torch.float32)
    assert step is not None
    for module in range(MODULES):
        routing = step.module(module)
        assert torch.equal(routing.token_weights, table.weights[slots, module])
        assert torch.equal(routing.weights[routing.rows], table.weights[slots, module])


def test_step_holds_each_slot_once(table: RoutingTable) -> None:
    step = table.step([4, 2, 4, 4, 2], torch.float32)
    assert step is not None
    assert len(step.weights) == 2


def test_base_tokens_in_a_mixed_batch_read_zeros(table: RoutingTable) -> None:
    step = table.step([3, 0], torch.float32)
    assert step is not None
    assert torch.equal(step.module(1).token_weights[1], torch.zeros(WIDTH))


def test_token_weights_are_in_the_compute_dtype(table: RoutingTable) -> None:
    step = table.step([1, 2], torch.bfloat16)
    assert step is not None
    routing = step.module(0)
    assert routing.token_weights.dtype == torch.bfloat16
    assert routing.weights.dtype == torch.float32


def test_step_keeps_its_weights_when_a_slot_is_written_again(table: RoutingTable) -> None:
    before = table.weights[2].clone()
    step = table.step([2], torch.float32)
    assert step is not None
    table.write(2, torch.full((MODULES, WIDTH), 7.0))
    assert torch.equal(step.module(1).weights[0], before[1])


def test_steps_alike_read_what_was_written_between_them(table: RoutingTable) -> None:
    for value in (7.0, 8.0):
        table.write(2, torch.full((MODULES, WIDTH), value))
        step = table.step([2, 0], torch.float32)
        assert step is not None
        assert torch.equal(step.module(1).token_weights[0], torch.full((WIDTH,), value))


def test_steps_alike_share_what_they_gathered(table: RoutingTable) -> None:
    first, again, other = (table.step(slots, torch.float32) for slots in ([2, 3], [2, 3], [3, 2]))
    assert first is not None
    assert again is not None
    assert other is not None
    assert again.weights is first.weights
    assert torch.equal(other.module(0).token_weights, first.module(0).token_weights.flip(0))


def test_slot_zero_cannot_be_written(table: RoutingTable) -> None:
    with pytest.raises(AssertionError, match="base model"):
        table.write(0, torch.ones(MODULES, WIDTH))


@pytest.fixture
def by_slot(table: RoutingTable, monkeypatch: pytest.MonkeyPatch) -> RoutingTable:
    """The same table, read as on a GPU."""
    monkeypatch.setattr(routing, "reads_by_slot", lambda _device: True)
    planner = TaskStates(Places(8))
    found = RoutingTable(6, MODULES, WIDTH, torch.device("cpu"), planner=planner, max_tokens=8)
    found.weights.copy_(table.weights)
    return found


def step_of(table: RoutingTable, slots: list[int]) -> StepRouting:
    step = table.step(slots, torch.float32)
    assert step is not None
    return step


def test_by_slot_tokens_read_the_table_itself(by_slot: RoutingTable) -> None:
    slots = [4, 0, 2, 4]
    step = step_of(by_slot, slots)
    assert step.weights is by_slot.weights
    assert step.rows.tolist() == slots
    for module in range(MODULES):
        found = step.module(module)
        assert torch.equal(found.token_weights, by_slot.weights[slots, module])
        by_slot.write(4, torch.full((MODULES, WIDTH), 7.0))
        assert torch.equal(found.token_weights[0], torch.full((WIDTH,), 7.0))  # as it is now


def test_by_slot_a_kept_step_reads_the_tokens_of_the_next(by_slot: RoutingTable) -> None:
    kept = step_of(by_slot, [1, 2, 3])
    places = kept.places.tolist()
    assert len(set(places)) == 3
    assert -1 not in places
    following = step_of(by_slot, [3, 0])
    assert kept.rows.tolist() == [3, 0, 0]
    assert kept.places.tolist() == [places[2], -1, -1]
    assert kept.rows.data_ptr() == following.rows.data_ptr()
    assert kept.places.data_ptr() == following.places.data_ptr()


def test_by_slot_a_step_of_the_base_model_leaves_no_task_behind(by_slot: RoutingTable) -> None:
    kept = step_of(by_slot, [1, 2, 3])
    assert by_slot.step([0, 0], torch.float32) is None
    assert kept.rows.tolist() == [0, 0, 0]
    assert kept.places.tolist() == [-1, -1, -1]


def test_by_slot_a_task_that_gets_another_place_is_found_there(by_slot: RoutingTable) -> None:
    first = step_of(by_slot, [1, 2]).places.tolist()
    by_slot.write(1, torch.ones(MODULES, WIDTH))
    by_slot.write(2, torch.ones(MODULES, WIDTH))
    again = step_of(by_slot, [1, 2])  # the same tokens, whose states are to be derived anew
    assert [place.number for _, place in again.plan.places] == again.places.tolist()
    assert sorted(again.places.tolist()) == sorted(first)


def test_by_slot_more_tokens_than_the_buffers_hold_are_refused(by_slot: RoutingTable) -> None:
    with pytest.raises(AssertionError, match="9 tokens, the table is for 8"):
        by_slot.step([1] * 9, torch.float32)
