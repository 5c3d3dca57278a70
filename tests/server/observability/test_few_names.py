"""Which names get a series of their own."""

from __future__ import annotations

import random

from polyrex.server.observability.few_names import FewNames


def test_the_nth_place_costs_n_uses() -> None:
    few: FewNames[str] = FewNames(3)
    assert few.uses("a")
    assert [few.uses("b"), few.uses("b")] == [False, True]
    assert [few.uses("c"), few.uses("c"), few.uses("c")] == [False, False, True]
    assert not any(few.uses("d") for _ in range(100))  # there are no more
    assert few.uses("a")


def test_a_place_is_given_for_good_whatever_comes_later() -> None:
    few: FewNames[int] = FewNames(5)
    draw = random.Random(0)
    with_place: set[int] = set()
    for _ in range(20_000):
        name = draw.randrange(1000)
        if few.uses(name):
            with_place.add(name)
        else:
            assert name not in with_place
    assert len(with_place) == 5


def test_busy_names_get_places_beside_thousands_of_rare_ones() -> None:
    few: FewNames[int] = FewNames(50)
    draw = random.Random(1)
    # One use in ten is of one of 20 busy names, the others are spread over 100,000.
    uses = [
        draw.randrange(20) if draw.random() < 0.1 else draw.randrange(100_000)
        for _ in range(60_000)
    ]
    with_place = {name for name in uses if few.uses(name)}
    assert set(range(20)) <= with_place
    assert len(with_place) <= 50


def test_memory_is_bounded_whatever_names_come() -> None:
    few: FewNames[int] = FewNames(50, candidates=64)
    for name in range(10_000):
        few.uses(name)
        assert len(few._uses) <= 65
