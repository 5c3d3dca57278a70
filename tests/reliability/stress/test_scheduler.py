"""The embedded engine at its limits, at the length of `make test`."""

from __future__ import annotations

import pytest

from reliability.proofs.stress.engine_threads import engine_threads
from reliability.proofs.stress.scheduler import FREED_TWICE, SALTLESS, SLOT_KEPT, scheduler
from support.reliability.small_base import SmallBase


def test_nothing_is_lost_or_mixed_up_at_the_limits(small_base: SmallBase) -> None:
    result = scheduler(small_base, rounds=16)
    assert result.missed == [], result.remarks
    assert result.figures["answers"] > 300


@pytest.mark.parametrize("defect", [FREED_TWICE, SLOT_KEPT, SALTLESS])
def test_a_broken_scheduler_is_found(small_base: SmallBase, defect: str) -> None:
    result = scheduler(small_base, rounds=3, defects=[defect])
    assert result.finds(["rounds with violations"])


def test_threads_get_what_their_requests_get_alone(small_base: SmallBase) -> None:
    result = engine_threads(small_base, each=40)
    assert result.missed == [], result.remarks


def test_a_slot_that_is_kept_is_found(small_base: SmallBase) -> None:
    result = engine_threads(small_base, each=20, defects=[SALTLESS])
    assert result.finds(["answers that differ from those alone"])
