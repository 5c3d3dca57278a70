"""Whether anybody gets at what another asker's prompts left in an engine's prefix cache.

An asker is a tenant with one of its tasks, or with the base model. Askers may only find what they
have computed themselves. The controls are prompts that an asker sends again: without hits among
them, nothing would have been shown.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from polyrex.adapters.files.task import TaskVersion
from polyrex.server.engines.base import Engine
from support.engine_calls import GREEDY, complete
from support.small_model import VOCABULARY

Ids = tuple[int, ...]
Salt = Callable[[str, str, str], str]
"""Makes a salt of a tenant, a router's sha256 and the client's own salt, as CacheSalts.of does."""

_ANSWER = replace(GREEDY, max_tokens=2)
_SALTS_BETWEEN_CONTROLS = 50


@dataclass(frozen=True)
class Asker:
    """A tenant that asks one of its tasks, or the base model."""

    tenant: str
    task: TaskVersion | None

    @property
    def router(self) -> str:
        return "" if self.task is None else self.task.info.router_sha256


@dataclass(frozen=True)
class Isolation:
    """What was tried, and what came of it."""

    pairs: int  # of one asker after another with the same prompt
    salts: int  # tries to name the prefixes of another asker
    leaks: int  # requests of both kinds that found tokens in the cache
    deviations: int  # answers that are not those of an engine without a prefix cache
    controls: int  # prompts that an asker sent again
    hits: int  # controls that found tokens in the cache

    @property
    def passed(self) -> bool:
        """Whether nothing leaked and nothing was answered wrongly, while the cache was at work."""
        return not self.leaks and not self.deviations and self.hits == self.controls > 0


async def run_isolation(
    engine: Engine,
    reference: Engine,
    tasks: Sequence[TaskVersion],
    salt: Salt,
    *,
    pairs: int,
    salts: int,
    length: int = 40,
) -> Isolation:
    """Send prompts of `length` tokens as many askers, for at least `pairs` ordered pairs of them.

    `engine` has a prefix cache that holds a prompt of every asker; `reference` has none, and the
    same model. `length` is more than two blocks of the cache.
    """
    askers = _askers(tasks, pairs)
    run = _Run(engine, reference, salt, length)
    for number, order in enumerate((askers, askers[::-1])):
        prompt = run.prompt(number)
        for asker in order:
            await run.must_miss(asker, prompt)
        for asker in order:
            await run.must_hit(asker, prompt)
    await _try_salts(run, tasks, salt, salts)
    return Isolation(
        len(askers) * (len(askers) - 1),
        salts,
        run.leaks,
        run.deviations,
        run.controls,
        run.hits,
    )


def _askers(tasks: Sequence[TaskVersion], pairs: int) -> list[Asker]:
    """So many askers that there are as many pairs; tenants have the same tasks, byte for byte."""
    found: list[Asker] = []
    for tenant in itertools.count():
        for task in (*tasks, None):
            if len(found) * (len(found) - 1) >= pairs:
                return found
            found.append(Asker(f"tenant-{tenant}", task))
    raise AssertionError("there are as many tenants as it takes")


async def _try_salts(run: _Run, tasks: Sequence[TaskVersion], salt: Salt, count: int) -> None:
    """Other askers, and the victim's own tenant with the base model, guess what it is known by."""
    victim, prompt = Asker("tenant-0", tasks[0]), run.prompt(2)
    attackers = (
        Asker("tenant-1", tasks[0]),
        Asker("tenant-1", None),
        Asker("tenant-0", None),
        Asker("tenant", tasks[0]),
    )
    await run.must_miss(victim, prompt)
    guesses = itertools.product(adversarial_salts(victim, tasks, salt, count), attackers)
    for number, (own, attacker) in enumerate(itertools.islice(guesses, count)):
        await run.must_miss(attacker, prompt, own)
        if number % _SALTS_BETWEEN_CONTROLS == 0:
            await run.must_hit(victim, prompt)


def adversarial_salts(
    victim: Asker, tasks: Sequence[TaskVersion], salt: Salt, count: int
) -> list[str]:
    """Different strings that a client might send to get at a victim's prefixes."""
    real = salt(victim.tenant, victim.router, "")
    names = [f"{task.info.name}@{task.info.version}" for task in tasks]
    routers = [task.info.router_sha256 for task in tasks]
    tails = [victim.tenant[at:] for at in range(len(victim.tenant))]
    words = [real, *routers, *tails, *names, *(task.info.name for task in tasks), "v1"]
    words += [word.encode().hex() for word in words]
    words += [bytes.fromhex(real).decode("latin-1"), real.upper(), real[:32]]
    found: dict[str, None] = {}
    for repeat in itertools.count(1):
        for parts in itertools.product(dict.fromkeys(words), repeat=repeat):
            spelled = [glue.join(parts) for glue in ("", ":", "\0", "\0\0\0\0\0\0\0\x40")]
            hashed = hashlib.sha256("".join(parts).encode()).hexdigest()
            found |= dict.fromkeys(one[:256] for one in (*spelled, hashed))
            if len(found) >= count:
                return list(found)[:count]
    raise AssertionError("there is always a longer string")


class _Run:
    """Sends requests, and counts."""

    def __init__(self, engine: Engine, reference: Engine, salt: Salt, length: int) -> None:
        self.leaks = self.deviations = self.controls = self.hits = 0
        self._engine, self._reference, self._salt = engine, reference, salt
        self._length = length
        self._cold: dict[tuple[str, Ids], Ids] = {}

    def prompt(self, seed: int) -> Ids:
        """A random prompt."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(VOCABULARY, (self._length,), generator=generator).tolist())

    async def must_miss(self, asker: Asker, prompt: Ids, own: str = "") -> None:
        """Send a prompt that this asker has not sent with this salt of its own."""
        self.leaks += await self._cached(asker, prompt, own) > 0

    async def must_hit(self, asker: Asker, prompt: Ids) -> None:
        """Send a prompt again."""
        self.controls += 1
        self.hits += await self._cached(asker, prompt, "") > 0

    async def _cached(self, asker: Asker, prompt: Ids, own: str) -> int:
        salt = self._salt(asker.tenant, asker.router, own)
        answer = await complete(self._engine, prompt, asker.task, _ANSWER, salt)
        cold = self._cold.get((asker.router, prompt))
        if cold is None:
            cold = (await complete(self._reference, prompt, asker.task, _ANSWER)).ids
            self._cold[asker.router, prompt] = cold
        self.deviations += answer.ids != cold
        return answer.cached
