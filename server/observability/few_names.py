"""Which names may be labels of metrics: few, for good, and those that are used most.

A series must never go backwards. So a name that has its own series keeps it until the server
restarts, and what was counted before stays with the others: a place that passed from name to name
would let a counter shrink, or `other` jump, and either spoils every rate that Prometheus computes.
What is given for good must not go to whoever comes first: the n-th place goes to a name that has
been used n times. A server with few tasks shows all of them soon, one with thousands those that
are busy.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)

_CANDIDATES = 1024


class FewNames(Generic[Name]):
    """Gives at most `most` names a place of their own."""

    def __init__(self, most: int, candidates: int = _CANDIDATES) -> None:
        """Of names without a place, no more than `candidates` are counted at the same time."""
        self._most = most
        self._candidates = candidates
        self._given: set[Name] = set()
        self._uses: dict[Name, int] = {}

    def __contains__(self, name: Name) -> bool:
        """Whether the name has a place."""
        return name in self._given

    def uses(self, name: Name) -> bool:
        """Count a use of the name; whether it has a place, from this use on if not before."""
        if name in self._given:
            return True
        if len(self._given) == self._most:
            return False
        count = self._uses[name] = self._uses.get(name, 0) + 1
        if count <= len(self._given):
            self._forget_rare()
            return False
        self._given.add(name)
        del self._uses[name]
        return True

    def _forget_rare(self) -> None:
        """Keep memory bounded (Misra and Gries, 1982): no count is ever too high, and few are lost.

        Half of the names go at once, so that a use costs constant time on average.
        """
        if len(self._uses) > self._candidates:
            rare = statistics.median_low(self._uses.values())
            self._uses = {name: n - rare for name, n in self._uses.items() if n > rare}
