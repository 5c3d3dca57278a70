"""Slots of the routing table change hands only while no request uses them."""

from __future__ import annotations

import pytest

from polyrex.adapters.files.task import TaskVersion
from polyrex.server.engines.slots import SlotCache
from support.engine_calls import MakeTask

Written = dict[int, TaskVersion]


@pytest.fixture
def written() -> Written:
    """The task that was written last to each slot."""
    return {}


@pytest.fixture
def slots(written: Written) -> SlotCache:
    """Two slots, besides the base model's."""
    return SlotCache(3, written.__setitem__)


def test_a_slot_is_given_its_task(slots: SlotCache, make_task: MakeTask, written: Written) -> None:
    task = make_task(1)
    slot = slots.acquire(task)
    assert slot
    assert written == {slot: task}


def test_the_base_models_slot_stays_empty(
    slots: SlotCache, make_task: MakeTask, written: Written
) -> None:
    for seed in range(4):
        slots.acquire(make_task(seed))
        slots.release(make_task(seed))
    assert set(written) == {1, 2}


def test_a_slot_that_could_not_be_written_is_not_lost(make_task: MakeTask) -> None:
    def fail(slot: int, task: TaskVersion) -> None:
        raise OSError("no")

    slots = SlotCache(2, fail)
    for _ in range(3):
        with pytest.raises(OSError, match="no"):
            slots.acquire(make_task(1))
    assert slots.used == 0


def test_one_router_has_one_slot(slots: SlotCache, make_task: MakeTask) -> None:
    assert slots.acquire(make_task(1)) == slots.acquire(make_task(1))
    assert slots.used == 1


def test_no_slot_is_taken_from_a_running_request(slots: SlotCache, make_task: MakeTask) -> None:
    slots.acquire(make_task(1))
    slots.acquire(make_task(1))
    slots.acquire(make_task(2))
    slots.release(make_task(1))
    assert slots.acquire(make_task(3)) is None
    slots.release(make_task(1))
    assert slots.acquire(make_task(3)) is not None


def test_the_longest_unused_slot_goes_first(slots: SlotCache, make_task: MakeTask) -> None:
    kept, gone = make_task(1), make_task(2)
    for task in (kept, gone, kept):
        slots.acquire(task)
        slots.release(task)
    was = slots.acquire(kept)
    slots.release(kept)
    slots.acquire(make_task(3))
    assert slots.acquire(kept) == was
