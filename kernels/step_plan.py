"""Which way each step runs its adapters, and the tasks whose adapters are kept ready for it.

Rank-space methods can run a step `shared` (every token with the whole inventory) or `composed`
(runs of tokens of one task, each with that task's own A and B, built once and kept). Methods whose
weights are products of small factors always need a task's own factors.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A place where layers keep what they made for one task.

    `key` is new whenever the place changes hands: a layer that holds another key makes it anew.
    """

    place: int
    key: object


class Run(NamedTuple):
    """Consecutive tokens of one task."""

    begin: int
    end: int
    row: int  # of the step's distinct rows of routing weights
    entry: Entry


@dataclass(frozen=True)
class Plan:
    """How one step runs. `shared` needs neither runs nor entries."""

    path: str
    reason: str
    runs: tuple[Run, ...] = ()
    entries: tuple[tuple[int, Entry], ...] = ()
    """By distinct row of routing weights, for methods that need every task's own state."""


SHARED = Plan("shared", "the only way there is")


class Kept:
    """A fixed number of places for tasks' states, by slot; the longest unused is given away."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[int, Entry] = OrderedDict()  # the longest unused first
        self._free: list[int] = []  # places that were given back

    def has(self, slot: int) -> bool:
        """Whether the slot's task has a place."""
        return slot in self._entries

    def entry(self, slot: int) -> Entry:
        """The slot's place, taken from another where none is free.

        No more than `capacity` slots may be asked for in one step.
        """
        if slot not in self._entries:
            place = self._free.pop() if self._free else len(self._entries)
            if place >= self.capacity:
                _, (place, _) = self._entries.popitem(last=False)
            self._entries[slot] = Entry(place, object())
        self._entries.move_to_end(slot)
        return self._entries[slot]

    def forget(self, slot: int) -> None:
        """The slot has another task now; its place is free."""
        if slot in self._entries:
            self._free.append(self._entries.pop(slot).place)


class Planner(Protocol):
    """Decides for one model how its steps run."""

    def plan(self, slots: Sequence[int], rows: dict[int, int]) -> Plan:
        """The plan for tokens of `slots` [T]; `rows` numbers the distinct ones."""

    def forget(self, slot: int) -> None:
        """The slot has another task now."""


@dataclass(frozen=True)
class Costs:
    """What the choice weighs, in units of one token's products with one expert.

    Round figures from `python -m bench.kernels.layers` on SmolLM2-135M's shapes, between
    what it finds in bfloat16 and in float32.
    """

    run: int = 40  # calling the operators once more, and reading a task's A and B
    compose: int = 200  # building a task's A and B
    worth: int = 100
    """What composing must save at least: for less, a task's first short request should not run in
    another way, and another time, than its tenth."""


class SharedOrComposed:
    """Plans for rank-space methods with `experts` experts.

    A task is composed when its steps so far, run shared, could have saved what composing costs, or
    when this one can: at worst, twice the work of a plan that knows the future. A task that comes
    once, with a short prompt, is never composed.
    """

    def __init__(self, kept: Kept, experts: int, costs: Costs | None = None) -> None:
        self._kept = kept
        self._experts = experts
        self._costs = costs or Costs()
        self._missed: Counter[int] = Counter()  # by slot: what composing would have saved so far

    def plan(self, slots: Sequence[int], rows: dict[int, int]) -> Plan:
        costs, kept, missed = self._costs, self._kept, self._missed
        tasks = [slot for slot in rows if slot]
        if len(tasks) > kept.capacity:
            return Plan("shared", f"{len(tasks)} tasks, of which {kept.capacity} can be kept")
        spans = []
        begin = 0
        for slot, same in itertools.groupby(slots):
            end = begin + sum(1 for _ in same)
            if slot:
                spans.append((begin, end, slot))
            begin = end
        shared = len(slots) * self._experts
        fresh = {slot for slot in tasks if not kept.has(slot)}
        composed = sum(end - begin + costs.run for begin, end, _ in spans)
        composed += sum(max(0, costs.compose - missed[slot]) for slot in fresh)
        reason = f"{len(slots)} tokens in {len(spans)} runs, {len(fresh)} tasks new: "
        reason += f"shared costs {shared}, composed {composed}"
        if shared - composed < costs.worth:
            for begin, end, slot in spans:
                if slot in fresh:
                    missed[slot] += max(0, (end - begin) * (self._experts - 1) - costs.run)
            return Plan("shared", reason)
        for slot in fresh:
            del missed[slot]
        runs = tuple(Run(b, e, rows[slot], kept.entry(slot)) for b, e, slot in spans)
        return Plan("composed", reason, runs)

    def forget(self, slot: int) -> None:
        self._kept.forget(slot)
        del self._missed[slot]


class OwnStates:
    """Plans for methods that keep a small state for every task of a step."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._last = SHARED

    def plan(self, slots: Sequence[int], rows: dict[int, int]) -> Plan:
        tasks = [slot for slot in rows if slot]
        # A step cannot do without: where it has more tasks than places, there are more from now on.
        self._kept.capacity = max(self._kept.capacity, len(tasks))
        entries = tuple((rows[slot], self._kept.entry(slot)) for slot in tasks)
        if entries != self._last.entries:  # the same plan tells layers that nothing is new
            self._last = Plan("own states", f"{len(tasks)} tasks", entries=entries)
        return self._last

    def forget(self, slot: int) -> None:
        self._kept.forget(slot)


class SharedOnly:
    """Plans for methods that run in one way only."""

    def plan(self, slots: Sequence[int], rows: dict[int, int]) -> Plan:
        return SHARED

    def forget(self, slot: int) -> None:
        """Nothing is kept."""


def log_change(before: Plan, after: Plan) -> None:
    """Say, at level debug, why steps run in another way than they did."""
    if before.path != after.path:
        logger.debug("adapters run %s: %s", after.path, after.reason)
