"""A fixed number of places, shared by more holders than fit: the longest unused loses its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Hashable
from typing import Generic, NamedTuple, TypeVar

H = TypeVar("H", bound=Hashable)


class Place(NamedTuple):
    """A numbered place, from 0, and a key that is new whenever the place changes hands.

    Whoever stores something in a place stores the key beside it, and stores anew under another key.
    """

    number: int
    key: object


class Places(Generic[H]):
    """Which holder has which of `capacity` places."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._taken: OrderedDict[H, Place] = OrderedDict()  # the longest unused first
        self._free: list[int] = []  # given back

    def __contains__(self, holder: H) -> bool:
        return holder in self._taken

    def take(self, holder: H, keep: Container[H] = ()) -> Place:
        """The holder's place: its own, a free one, or that of the longest unused not in `keep`.

        `keep` must leave at least one of the places.
        """
        if holder not in self._taken:
            number = self._free.pop() if self._free else len(self._taken)
            if number >= self.capacity:
                oldest = next(other for other in self._taken if other not in keep)
                number = self._taken.pop(oldest).number
            self._taken[holder] = Place(number, object())
        self._taken.move_to_end(holder)
        return self._taken[holder]

    def give_back(self, holder: H) -> None:
        """Free the holder's place, if it has one."""
        if holder in self._taken:
            self._free.append(self._taken.pop(holder).number)
