"""How a step runs its adapters, and which tasks' adapters are kept ready for it.

Rank-space methods run a step `shared` (every token with the whole inventory) or `composed` (runs of
tokens of one task, each run with the task's own A and B, which are built once and kept). Methods
whose weights are products of small factors need a state of every task in the step.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .places import Place, Places

logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """Consecutive tokens of one task."""

    begin: int
    end: int
    row: int  # among the step's distinct rows of routing weights
    place: Place  # of the task's composed A and B


@dataclass(frozen=True)
class StepPlan:
    """How one step runs. A `shared` step needs neither runs nor places."""

    path: str
    reason: str
    runs: tuple[Run, ...] = ()
    places: tuple[tuple[int, Place], ...] = ()
    """The place of each task's state, by distinct row of routing weights."""


SHARED = StepPlan("shared", "the only way there is")


class Planner(Protocol):
    """Decides how the steps of one model run."""

    def plan(self, slots: Sequence[int], rows: dict[int, int]) -> StepPlan:
        """The plan for tokens of `slots` [T]; `rows` numbers the distinct slots."""

    def forget(self, slot: int) -> None:
        """Drop what is kept for the slot: it holds another task now."""


@dataclass(frozen=True)
class Costs:
    """The weights of the choice, in units of one token's products with one expert.

    Round figures from `python -m bench.kernels.layers` on SmolLM2-135M's shapes, between those that
    it measures in bfloat16 and in float32.
    """

    run: int = 40  # calling the operators once more, and reading a task's A and B
    compose: int = 200  # building a task's A and B
    worth: int = 100
    """The least saving for which a step is composed. Without it, a task's first short request would
    take another path, and another time, than its tenth."""


class SharedOrComposed:
    """Plans the steps of rank-space methods with `experts` experts.

    A task is composed once its steps so far, run shared, could have saved the cost of composing, or
    when this step alone saves it: at worst, that is twice the work of a plan that knows the future.
    A task that comes once, with a short prompt, is never composed.
    """

    def __init__(self, kept: Places[int], experts: int, costs: Costs | None = None) -> None:
        """`kept` are the places of tasks' A and B, by slot."""
        self._kept = kept
        self._experts = experts
        self._costs = costs or Costs()
        self._missed: Counter[int] = Counter()  # savings missed so far, by slot

    def plan(self, slots: Sequence[int], rows: dict[int, int]) -> StepPlan:
        costs, kept, missed = self._costs, self._kept, self._missed
        tasks = [slot for slot in rows if slot]
        if len(tasks) > kept.capacity:
            return StepPlan("shared", f"{len(tasks)} tasks, of which {kept.capacity} can be kept")
        spans = []
        begin = 0
        for slot, same in itertools.groupby(slots):
            end = begin + sum(1 for _ in same)
            if slot:
                spans.append((begin, end, slot))
            begin = end
        shared = len(slots) * self._experts
        fresh = {slot for slot in tasks if slot not in kept}
        composed = sum(end - begin + costs.run for begin, end, _ in spans)
        composed += sum(max(0, costs.compose - missed[slot]) for slot in fresh)
        reason = f"{len(slots)} tokens in {len(spans)} runs, {len(fresh)} tasks new: "
        reason += f"shared costs {shared}, composed {composed}"
        if shared - composed < costs.worth:
            for begin, end, slot in spans:
                if slot in fresh:
                    missed[slot] += max(0, (end - begin) * (self._experts - 1) - costs.run)
            return StepPlan("shared", reason)
        for slot in fresh:
            del missed[slot]
        runs = tuple(Run(b, e, rows[slot], kept.take(slot)) for b, e, slot in spans)
        return StepPlan("composed", reason, runs)

    def forget(self, slot: int) -> None:
        self._kept.give_back(slot)
        del self._missed[slot]


class TaskStates:
    """Plans the steps of methods that need a state of every task in a step."""

    def __init__(self, kept: Places[int]) -> None:
        """`kept` are the places of tasks' states, by slot."""
        self._kept = kept
        self._last = SHARED

    def plan(self, slots: Sequence[int], rows: dict[int, int]) -> StepPlan:
        tasks = [slot for slot in rows if slot]
        # Every task of the step needs a place: if there are too few, there are more from now on.
        self._kept.capacity = max(self._kept.capacity, len(tasks))
        places = tuple((rows[slot], self._kept.take(slot, keep=rows)) for slot in tasks)
        if places != self._last.places:  # an unchanged plan tells layers that nothing is new
            self._last = StepPlan("own states", f"{len(tasks)} tasks", places=places)
        return self._last

    def forget(self, slot: int) -> None:
        self._kept.give_back(slot)


class SharedOnly:
    """Plans the steps of methods that run in one way only."""

    def plan(self, slots: Sequence[int], rows: dict[int, int]) -> StepPlan:
        return SHARED

    def forget(self, slot: int) -> None:
        """Do nothing: nothing is kept."""


def log_change(before: StepPlan, after: StepPlan) -> None:
    """Log at level debug that steps change their path, and why."""
    if before.path != after.path:
        logger.debug("adapters run %s: %s", after.path, after.reason)
