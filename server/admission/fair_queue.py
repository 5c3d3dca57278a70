"""Whose completion runs next: that of the tenant which has had the fewest tokens for its weight.

Every tenant has an account of the tokens that it has had, divided by its weight. Those of running
completions are in it by estimate, until they are known. The next completion is the one that has
waited longest at the tenant whose account is lowest. Tenants that always have something waiting
therefore get tokens in proportion to their weights, whatever the size or number of their requests,
and nobody starves. A tenant that comes back begins where those stand that were served meanwhile:
time without requests earns nothing. Sheng et al. call this a virtual token counter
(https://arxiv.org/abs/2401.00588).

The queue knows no time and no bounds: those are in places.py. An operation takes a time that grows
with the logarithm of the number of tenants that wait.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_STALE = 64
"""Entries of the heap that may be out of date before all such are thrown out, at least."""


@dataclass(eq=False)
class Account(Generic[T]):
    """What a tenant has had, and what of it waits, first come first."""

    weight: float = 1.0
    used: float = 0.0  # tokens that it has had, divided by its weight
    level: float = 0.0  # the same, with the estimates of what runs
    turn: int = 0  # among accounts of the same level, the one that began to wait first is next
    entry: int = -1  # the number of its last entry in the heap, the only one that counts
    waiting: OrderedDict[Waiting[T], None] = field(default_factory=OrderedDict)
    parts: int = 0  # completions that wait
    tokens: float = 0.0  # theirs, by estimate

    def lift(self, level: float) -> None:
        """Forget what the account is below a level: nobody is owed for time without requests."""
        behind = max(0.0, level - self.level)
        self.level += behind
        self.used += behind


@dataclass(eq=False)
class Waiting(Generic[T]):
    """A request in the queue: so many completions of it wait, of `cost` tokens each by estimate."""

    account: Account[T]
    item: T
    parts: int
    cost: float
    charged: float = 0.0  # to the account, for the completions that run or have run


class FairQueue(Generic[T]):
    """The requests that wait, of all tenants."""

    def __init__(self) -> None:
        self.parts = 0  # completions that wait
        self.tokens = 0.0  # theirs, by estimate
        self._floor = 0.0  # where a tenant begins that comes back
        self._turns = itertools.count()
        # Level, turn and number; where an account has changed since, there is a later entry.
        self._heap: list[tuple[float, int, int, Account[T]]] = []
        self._entries = itertools.count()
        self._tenants_waiting = 0

    def push(self, account: Account[T], item: T, parts: int, cost: float) -> Waiting[T]:
        """Append a request of `parts` completions, each of `cost` tokens by estimate, above 0."""
        waiting = Waiting(account, item, parts, cost)
        account.waiting[waiting] = None
        self._count(account, parts, cost)
        if len(account.waiting) == 1:
            self._tenants_waiting += 1
            account.turn = next(self._turns)
            account.lift(self._floor)
            self._file(account)
        return waiting

    def first(self) -> Waiting[T] | None:
        """The request whose completion is next, if any waits."""
        while self._heap:
            if _counts(self._heap[0]):
                return next(iter(self._heap[0][3].waiting))
            heapq.heappop(self._heap)
        return None

    def take(self, waiting: Waiting[T]) -> None:
        """Take a completion of the request that `first` returned, and charge its estimate."""
        account = waiting.account
        self._floor = max(self._floor, account.used)
        charge = waiting.cost / account.weight
        waiting.charged += charge
        account.level += charge
        self._drop(waiting, 1)
        self._file(account)

    def remove(self, waiting: Waiting[T]) -> None:
        """Take out of the queue what still waits of a request."""
        if waiting.parts:
            self._drop(waiting, waiting.parts)

    def settle(self, waiting: Waiting[T], tokens: float) -> None:
        """Replace the estimate of a request that is over by the tokens that it has had."""
        account = waiting.account
        had = tokens / account.weight
        refund = waiting.charged - had
        account.used += had
        account.level -= refund
        waiting.charged = 0.0
        # Of estimates that were too high, one is owed at most: others would pay for all of them.
        account.lift(self._floor - max(0.0, refund))
        self._file(account)

    def _drop(self, waiting: Waiting[T], parts: int) -> None:
        account = waiting.account
        self._count(account, -parts, waiting.cost)
        waiting.parts -= parts
        if not waiting.parts:
            del account.waiting[waiting]
            self._tenants_waiting -= not account.waiting

    def _count(self, account: Account[T], parts: int, cost: float) -> None:
        for total in (self, account):
            total.parts += parts
            # sums of fractions drift
            total.tokens = total.tokens + parts * cost if total.parts else 0.0

    def _file(self, account: Account[T]) -> None:
        """Let the heap know where an account stands, if something of it waits."""
        if not account.waiting:
            return
        if len(self._heap) > _STALE + 4 * self._tenants_waiting:
            self._heap = [entry for entry in self._heap if _counts(entry)]
            heapq.heapify(self._heap)
        account.entry = next(self._entries)
        heapq.heappush(self._heap, (account.level, account.turn, account.entry, account))


def _counts(entry: tuple[float, int, int, Account[T]]) -> bool:
    _, _, number, account = entry
    return number == account.entry and bool(account.waiting)
