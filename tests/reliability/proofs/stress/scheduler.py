"""The embedded engine's scheduler at its limits: few blocks, few slots, bursts, cancels, sharing.

What was not fatal anywhere else crashed other servers here: a cache that is nearly full, prompts of
mixed lengths, tasks and the base model together, many requests of one task at once, and clients
that leave. After every step, everything that the engine counts is counted anew; every request ends
once; and every answer is the one that the request gets alone.
"""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from polyrex.adapters.files.inventory import Inventory, load_experts
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import load_base
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.embedded.generation import Generation, Outcome
from polyrex.server.engines.embedded.runner import ModelRunner
from reliability.result import Result
from support.reliability.small_base import SmallBase
from support.reliability.stress.engine_state import violations
from support.reliability.stress.requests import LONGEST, Answer, Known, known_requests

FREED_TWICE = "freed twice"
"""One block in ten that comes back is free twice."""
SLOT_KEPT = "slot kept"
"""A request that is cancelled keeps its slot."""
SALTLESS = "saltless"
"""The prefix cache does not look at who asks, nor at the task."""

KNOWN = 200
TICKS = 60
"""Steps of a round while requests come and go; then those that are left end."""
MOST_STEPS = 5000
"""Of a round. More than all its tokens, so an engine that needs more gets nowhere."""


@dataclass
class _Round:
    """One engine of random sizes, with random requests."""

    runner: ModelRunner
    known: Sequence[Known]
    chosen: random.Random
    counts: Counter[str]
    live: dict[Generation, Known] = field(default_factory=dict)
    outcomes: dict[Generation, list[Outcome]] = field(default_factory=dict)
    cancelled: set[Generation] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Let requests come and go, and then let all end."""
        steps = 0
        for _ in range(TICKS):
            self._come_and_go()
            self._step()
        while not self.runner.idle and steps < MOST_STEPS and not self.wrong:
            self._step()
            steps += 1
        if self.runner.idle:
            self._judge_ends()
        elif not self.wrong:
            self.wrong.append(f"requests are left after {MOST_STEPS} steps")

    def _come_and_go(self) -> None:
        kind = self.chosen.random()
        if kind < 0.35:
            self._add(self.chosen.choice(self.known))
        elif kind < 0.45:
            self._burst()
        elif kind < 0.6 and self.live:
            self._cancel(self.chosen.choice([*self.live]))

    def _burst(self) -> None:
        """Many requests of one task at once."""
        task = self.chosen.choice(self.known).request.task
        own = [known for known in self.known if known.request.task is task]
        for _ in range(self.chosen.randint(3, 8)):
            self._add(self.chosen.choice(own))
        self.counts["bursts"] += 1

    def _add(self, known: Known) -> None:
        nobody: Any = None  # waits for the answer
        generation = Generation(known.request, nobody)
        self.live[generation] = known
        self.outcomes[generation] = []
        self.runner.add(generation)
        self.counts["requests"] += 1

    def _cancel(self, generation: Generation) -> None:
        self.counts["cancelled"] += 1
        self.counts["cancelled while they ran"] += bool(generation.blocks)
        self.runner.abort(generation)
        self.cancelled.add(generation)
        del self.live[generation]

    def _step(self) -> None:
        ran = {*self.runner._scheduler.running}
        with torch.inference_mode():
            self.runner.step()
        self.counts["steps"] += 1
        self._count_states(ran)
        for generation, outcome in self.runner.take_deliveries():
            self._deliver(generation, outcome)
        self.wrong += violations(self.runner)

    def _count_states(self, ran: set[Generation]) -> None:
        scheduler = self.runner._scheduler
        self.counts["sent back for room"] += len(ran.intersection(scheduler.waiting))
        held = Counter(block for one in scheduler.running for block in one.blocks)
        self.counts["steps with shared blocks"] += max(held.values(), default=0) > 1
        slots = self.runner._routing.slots
        full = scheduler.waiting and slots.used == slots._places.capacity
        self.counts["steps with all slots taken"] += bool(full)
        self.counts["steps with a full cache"] += bool(
            scheduler.waiting and self.runner._cache.pool.available < 2
        )

    def _deliver(self, generation: Generation, outcome: Outcome) -> None:
        if generation not in self.live:
            self.wrong.append("a request has got something after its end")
            return
        self.outcomes[generation].append(outcome)
        if isinstance(outcome, Exception) or outcome.finish_reason is not None:
            known = self.live.pop(generation)
            answer = Answer.of(self.outcomes[generation])
            self.counts["answers"] += 1
            if not answer.agrees(known.alone):
                self.counts["answers that differ from those alone"] += 1
                self.wrong.append(f"{known.request.id}: {answer}, alone {known.alone}")

    def _judge_ends(self) -> None:
        if self.live:
            self.wrong.append(f"{len(self.live)} requests have not ended")
        pool = self.runner._cache.pool
        if pool.available != pool._blocks:
            self.wrong.append(f"{pool.available} of {pool._blocks} blocks are free at the end")


def scheduler(
    small: SmallBase, *, rounds: int, first: int = 0, defects: Sequence[str] = ()
) -> Result:
    """Run so many rounds, whose numbers begin with `first`; a number is the seed of its round."""
    inventory = small.read_inventory()
    adapted = load_experts(inventory, load_base(str(small.base), torch.float32))
    known = known_requests(adapted, inventory, KNOWN)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for seed in range(first, first + rounds):
        found = _run_round(adapted, inventory, known, seed, counts, defects)
        counts["rounds with violations"] += bool(found)
        wrong += [f"round {seed}: {line}" for line in found[:2]]
    return _result(rounds, counts, wrong)


def _run_round(
    adapted: AdaptedModel,
    inventory: Inventory,
    known: Sequence[Known],
    seed: int,
    counts: Counter[str],
    defects: Sequence[str],
) -> list[str]:
    chosen = random.Random(seed)
    running = chosen.choice((2, 4, 8, 16))
    config = EmbeddedConfig(
        kv_cache_tokens=16 * chosen.randint(LONGEST // 16, 12),
        slots=chosen.choice((2, 3, 4, 9)),
        max_running=running,
        max_batch_tokens=max(running, chosen.choice((8, 16, 17, 64))),
        prefix_cache=chosen.random() < 0.8,
    )
    runner = ModelRunner(adapted, inventory, config)
    plant(runner, defects)
    round_ = _Round(runner, known, chosen, counts)
    try:
        round_.run()
    except Exception:  # with its seed, it can be run again
        round_.wrong.append(traceback.format_exc())
    return round_.wrong


def plant(runner: ModelRunner, defects: Sequence[str]) -> None:
    """Break an engine that has not begun."""
    books: Any = runner._scheduler
    if FREED_TWICE in defects:
        pool = runner._cache.pool
        release, turn = pool.release, iter(range(1 << 40))

        def release_twice(blocks: Sequence[int]) -> None:
            release(blocks)
            if pool._free and next(turn) % 10 == 9:
                pool._free.append(pool._free[-1])

        pool.release = release_twice  # type: ignore[method-assign, assignment]
    if SLOT_KEPT in defects:
        abort = runner.abort

        def abort_alone(generation: Generation) -> None:
            task = generation.request.task if generation in books.running else None
            abort(generation)
            if task is not None:
                books._slots.acquire(task)

        runner.abort = abort_alone  # type: ignore[method-assign]
    if SALTLESS in defects:
        add = runner.add

        def add_for_anybody(generation: Generation) -> None:
            generation.keys.append(b"anybody")
            add(generation)

        runner.add = add_for_anybody  # type: ignore[method-assign]


def _result(rounds: int, counts: Counter[str], wrong: Sequence[str]) -> Result:
    reached = (
        *("cancelled while they ran", "sent back for room", "steps with shared blocks"),
        *("steps with all slots taken", "steps with a full cache"),
    )
    none = "rounds with violations", "answers that differ from those alone"
    return Result(
        goal="the embedded engine's scheduler at its limits",
        length=f"{rounds} engines of random sizes, {counts['requests']} requests",
        figures={name: counts[name] for name in sorted({*counts, *reached, *none})},
        at_most=dict.fromkeys(none, 0),
        at_least=dict.fromkeys(reached, max(1, rounds // 4)),
        remarks=wrong,
    )
