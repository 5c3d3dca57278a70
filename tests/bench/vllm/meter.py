"""Measuring engines that answer alike requests in turn."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NamedTuple

from .engines import IN_FLIGHT, Contender


@dataclass(frozen=True)
class Workload:
    """Requests that are sent at once, all of one shape."""

    name: str
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        """What the throughput counts: new tokens, and the prompt's where those are the work."""
        counted = self.new if self.prompt < self.new else self.prompt + self.new
        return IN_FLIGHT * counted


Turn = tuple[str, Contender, str, int]
"""A name for the rates, who answers, the popularity of tasks, and how many tasks there are."""

DECODE, PREFILL = Workload("decode", 17, 32), Workload("prefill", 512, 8)


class Comparison(NamedTuple):
    """How many times faster one was than the other: median and quartiles of all turns."""

    ratio: float
    quartiles: tuple[float, float]


@dataclass
class Meter:
    """Measures contenders with requests that are alike for all of them."""

    seed: int = 0
    rates: dict[str, dict[int, float]] = field(default_factory=dict)
    """Of every name: the rate of each of its turns, by the turn's number."""
    turn: int = 0

    async def round(self, work: Workload, turns: Sequence[Turn]) -> None:
        """Every turn once, with the same choice of tasks for all."""
        for name, contender, popularity, tasks in turns:
            chosen = popular(popularity, tasks, random.Random(self.seed))
            rate = await self._rate(work, contender, chosen)
            self.rates.setdefault(name, {})[self.turn] = rate
            self.turn += 1
            print(f"{name}: {rate:.1f} tokens/s", flush=True)
        self.seed += 1

    async def _rate(
        self, work: Workload, contender: Contender, tasks: Sequence[int | None]
    ) -> float:
        draw = random.Random(time.monotonic_ns())  # never the same prompt twice

        async def one(task: int | None) -> int:
            prompt = [draw.randrange(100, 40_000) for _ in range(work.prompt)]
            async with aclosing(contender.answer(prompt, work.new, task)) as tokens:
                return sum([count async for count in tokens])

        started = time.perf_counter()
        found = sum(await asyncio.gather(*(one(task) for task in tasks)))
        assert found == IN_FLIGHT * work.new
        return work.tokens / (time.perf_counter() - started)

    def compare(self, over: str, under: str) -> Comparison:
        """One's rates over the nearest rates, before and after, of the other."""

        def near(turn: int) -> float:
            known = self.rates[under]
            before = max((t for t in known if t < turn), default=None)
            after = min((t for t in known if t > turn), default=None)
            return statistics.mean(known[t] for t in (before, after) if t is not None)

        found = [rate / near(turn) for turn, rate in self.rates[over].items()]
        quartiles = statistics.quantiles(found, method="inclusive") if len(found) > 1 else found * 3
        low, ratio, high = (round(value, 3) for value in quartiles)
        return Comparison(ratio, (low, high))

    def medians(self) -> dict[str, float]:
        return {
            name: round(statistics.median(rates.values()), 1) for name, rates in self.rates.items()
        }


def popular(popularity: str, tasks: int, draw: random.Random) -> list[int | None]:
    """The tasks of IN_FLIGHT requests."""
    everyone = range(tasks)
    if popularity == "none":
        return [None] * IN_FLIGHT
    if popularity == "identical":
        return [0] * IN_FLIGHT
    if popularity == "distinct":
        return list(range(IN_FLIGHT))
    if popularity == "uniform":
        return [draw.choice(everyone) for _ in range(IN_FLIGHT)]
    assert popularity == "zipf"
    weights = [1 / (rank + 1) for rank in everyone]
    return list(draw.choices(everyone, weights, k=IN_FLIGHT))
