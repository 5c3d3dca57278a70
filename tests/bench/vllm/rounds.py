"""The rounds of `make bench-vllm`: which requests are sent to which engine, in which order."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from bench.cases import MAIN, NEW_TOKENS, PROMPT_TOKENS, REQUESTS
from bench.engine_requests import tokens_per_second
from bench.harness import Turns

from .engines import Contender


@dataclass(frozen=True)
class Workload:
    """The lengths of a request."""

    prompt: int
    new: int

    @property
    def counted(self) -> int:
        """The tokens that throughput counts: new ones, and the prompt's where they are the work."""
        return self.new if self.prompt < self.new else self.prompt + self.new


DECODE, PREFILL = Workload(PROMPT_TOKENS, NEW_TOKENS), Workload(512, 8)


class Batch(NamedTuple):
    """Requests that are sent at once, as one turn: their tasks are drawn from `tasks`."""

    name: str
    contender: Contender
    popularity: str = "none"
    tasks: int = 0


async def take_turns(into: Turns, work: Workload, batches: Sequence[Batch]) -> None:
    """Send every batch once; all of them draw their tasks alike."""
    seed = into.turn
    for batch in batches:
        chosen = popular(batch.popularity, batch.tasks, random.Random(seed))
        draw = random.Random(time.monotonic_ns())  # never the same prompt twice
        prompts = [[draw.randrange(100, 40_000) for _ in range(work.prompt)] for _ in chosen]
        answers = map(partial(batch.contender.answer, new=work.new), prompts, chosen)
        rate = await tokens_per_second(answers, work.new) * work.counted / work.new
        into.add(batch.name, rate)
        print(f"{batch.name}: {rate:.1f} tokens/s", flush=True)


def popular(popularity: str, tasks: int, draw: random.Random) -> list[int | None]:
    """The task of each request."""
    everyone = range(tasks)
    if popularity == "none":
        return [None] * REQUESTS
    if popularity == "identical":
        return [0] * REQUESTS
    if popularity == "distinct":
        return list(range(REQUESTS))
    if popularity == "uniform":
        return [draw.choice(everyone) for _ in range(REQUESTS)]
    assert popularity == "zipf"
    weights = [1 / (rank + 1) for rank in everyone]
    return list(draw.choices(everyone, weights, k=REQUESTS))


def decode_round(engines: dict[str, Any]) -> list[Batch]:
    """The decode-heavy round, with the base model between all others."""
    base = Batch("base", engines["base"])
    batches = [base]
    for name in MAIN:
        if name in engines:
            for popularity in ("distinct", "identical"):
                ours = Batch(f"{name} {popularity}", engines[name], popularity, REQUESTS)
                batches += [ours, base]
    return batches


def rare_round(engines: dict[str, Any]) -> list[Batch]:
    """The batches that are sent before every fourth decode-heavy round."""
    theirs, ours = engines["multilora"], engines["tensorpoly-1"]
    return [
        *(
            Batch(f"multilora {popularity}", theirs, popularity, REQUESTS)
            for popularity in ("identical", "uniform", "zipf", "distinct")
        ),
        Batch("tensorpoly-1 uniform of 1", ours, "uniform", 1),
        *(Batch(f"tensorpoly-1 zipf of {tasks}", ours, "zipf", tasks) for tasks in (32, 10_000)),
    ]


def flat_round(engines: dict[str, Any]) -> list[Batch]:
    """Decode-heavy batches that should all be alike: no task, then tasks out of more and more."""
    ours = engines["tensorpoly-1"]
    plain = Batch("base", engines["base"])
    few, more, most = (
        Batch(f"tensorpoly-1 uniform of {tasks}", ours, "uniform", tasks)
        for tasks in (32, 1_000, 10_000)
    )
    return [plain, Batch("idle", ours), plain, few, more, few, most, few]


def prefill_round(engines: dict[str, Any]) -> list[Batch]:
    """The prefill-heavy round."""
    base = Batch("base", engines["base"])
    distinct, identical = (
        Batch(f"tensorpoly-1 {popularity}", engines["tensorpoly-1"], popularity, REQUESTS)
        for popularity in ("distinct", "identical")
    )
    return [base, distinct, base, identical, base]
