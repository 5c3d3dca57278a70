"""Places change hands by age, with a new key each time."""

from __future__ import annotations

from polyrex.kernels.places import Places


def test_a_place_changes_hands_with_a_new_key() -> None:
    places = Places[int](2)
    first, second = places.take(1), places.take(2)
    assert places.take(1) == first
    third = places.take(3)  # in the place of 2, the longest unused
    assert third.number == second.number
    assert third.key not in (first.key, second.key)
    places.give_back(1)
    assert 1 not in places
    assert places.take(1).number == first.number
    assert places.take(1).key not in (first.key, second.key, third.key)
    assert {places.take(holder).number for holder in (1, 3)} == {0, 1}


def test_a_holder_to_keep_does_not_lose_its_place() -> None:
    places = Places[str](2)
    oldest, newer = places.take("oldest"), places.take("newer")
    assert places.take("new", keep={"oldest"}).number == newer.number
    assert places.take("oldest") == oldest


def test_more_places_are_taken_when_there_are_more() -> None:
    places = Places[int](1)
    places.take(1)
    places.capacity = 2
    assert places.take(2).number == 1
    assert 1 in places
