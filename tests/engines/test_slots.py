"""Rows of the routing table change hands only when nobody uses them."""

from __future__ import annotations

import pytest
import torch

from polyrex.adapters.inventory import Inventory
from polyrex.server.engines.slots import SlotCache

from .conftest import MakeTask


@pytest.fixture
def slots(random_inventory: Inventory) -> SlotCache:
    """Two slots beside the base model's."""
    return SlotCache(random_inventory, 3, torch.device("cpu"))


def test_a_slot_holds_its_routing_weights(
    slots: SlotCache, make_task: MakeTask, random_inventory: Inventory
) -> None:
    task = make_task(1)
    slot = slots.acquire(task)
    assert slot
    assert torch.equal(slots.table.weights[slot], random_inventory.route(task.router.logits))


def test_the_base_models_slot_stays_empty(slots: SlotCache, make_task: MakeTask) -> None:
    for seed in range(4):
        slots.acquire(make_task(seed))
        slots.release(make_task(seed))
    assert not slots.table.weights[0].any()


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
