"""Places in the engine, and who waits for one.

The engine gets as many completions as it can run at once, and a few more so that it never lacks
one. Further ones wait here, before anything of them is tokenised, and get their places in the order
of fair_queue.py; a request of several completions gets them one by one. A request is refused where
too much waits already, or where it would wait too long.

Where other tenants have asked lately, one that has its share already leaves some places free, so
that the others need not wait for one of its completions to end.

Everything here belongs to the event loop.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from polyrex.server.config import ServerConfig
from polyrex.server.engines.base import Engine
from polyrex.server.errors import DeadlineExceeded, InvalidRequest, Overloaded, ServerFull

from .fair_queue import FairQueue
from .place import Place
from .shares import DrainRate, Mean, Share, Shares

_SPARE = 16
"""One place in so many is for the engine to have the next completion at hand, or for others."""
_MOST_OF_FREE = 3
"""A tenant may have so many times what is left free; alone, three quarters of everything."""
_SURELY = 0.75
"""Of the longest wait: where more is expected, it may well be too long, and all in vain."""
_LONGEST_RETRY = 60
"""Seconds that a client is told to stay away at most."""


@dataclass(frozen=True)
class Ask:
    """What a request asks of the engine, as far as that is known before it is tokenised."""

    tenant: str
    weight: int
    completions: int
    prompt_tokens: float  # of all prompts, by estimate
    max_tokens: int | None  # of a completion


class Places:
    """The places in the engine of one server."""

    def __init__(
        self, config: ServerConfig, engine: Engine, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` gives seconds, and never goes back."""
        self.running = 0  # completions that have a place
        self.refusals: Counter[str] = Counter()
        self.engine = engine
        self.clock = clock
        self.drain = DrainRate()
        self.first_token = Mean(None, 1 / 16)  # seconds from a place to its first token
        self._config = config
        self._queue: FairQueue[Place] = FairQueue()
        self._shares: Shares[Place] = Shares()
        self._running_tokens = 0.0
        self._cache_tokens = 0  # 0 while the engine has not said

    @property
    def in_flight(self) -> int:
        """Completions that wait for a place or have one."""
        return self._queue.parts + self.running

    @property
    def rate(self) -> float | None:
        """Tokens a second, by estimate, that the engine takes off the queue; None while unknown."""
        return self.drain.of(max(1, self.running))

    def waiting(self) -> dict[str, tuple[int, float]]:
        """The completions that wait, and their estimated tokens, by tenant."""
        return {
            tenant: (share.account.parts, share.account.tokens)
            for tenant, share in self._shares.all.items()
            if share.account.parts
        }

    def admit(self, ask: Ask, left: float) -> Place:
        """Let a request wait for its places, which it gives back when the context of it ends.

        It may take `left` seconds. Raises Overloaded where its tenant's share is full, ServerFull
        where the server is, InvalidRequest where there is never room for as much.
        """
        most = self._config.max_in_flight
        if ask.completions > most:
            raise InvalidRequest(
                f"prompts times n may be at most {most}, got {ask.completions}", "n"
            )
        now = self.clock()
        share = self._shares.asks(ask.tenant, ask.weight, now)
        prompt = ask.prompt_tokens / ask.completions
        cost = min(max(1.0, prompt + share.expected(ask.max_tokens)), self.engine.context_length)
        self._press(share, cost * ask.completions, now)
        self._check(share, ask.completions, cost, left)
        place = Place(self, share, ask.completions, min(prompt, cost), now)
        place.longest = min(left, self._config.max_queue_seconds)
        place.waiting = self._queue.push(share.account, place, ask.completions, cost)
        self.fill()
        return place

    def fill(self) -> None:
        """Give the places that are free to those whose turn it is."""
        now = self.clock()
        while (waiting := self._queue.first()) is not None:
            place = waiting.item
            if not place.granted and now - place.since > place.longest:
                self.refuse(place, self.too_late(place))
            elif self._has_room(place.share, waiting.cost, 1):
                self._queue.take(waiting)
                self._count(place, 1)
                place.grant(now)
            else:
                return

    def give_back(self, place: Place, completions: int) -> None:
        """Free places for others: the engine has nothing more to do for them."""
        self._count(place, -completions)
        self.fill()

    def leave(self, place: Place, tokens: float) -> None:
        """Forget a request that is over, and has had so many tokens."""
        self._queue.remove(place.waiting)
        self._queue.settle(place.waiting, tokens)
        self.give_back(place, place.running)

    def refuse(self, place: Place, error: Overloaded | DeadlineExceeded) -> None:
        """Take a request out of the queue that waits for its first place."""
        self._queue.remove(place.waiting)
        place.refuse(error)

    def too_late(self, place: Place) -> Overloaded | DeadlineExceeded:
        """The error of a request that has waited as long as it may."""
        if place.longest < self._config.max_queue_seconds:
            self.refusals["deadline"] += 1
            return DeadlineExceeded("the request's time was over before it had a place")
        self.refusals["old"] += 1
        return ServerFull(
            f"no place in the engine became free in {place.longest:g} s", self._retry(place.share)
        )

    def _count(self, place: Place, completions: int) -> None:
        place.running += completions
        place.share.running += completions
        self.running += completions
        self._running_tokens += completions * place.waiting.cost
        if not self.running:
            self._running_tokens = 0.0  # sums of fractions drift

    def _press(self, share: Share[Place], tokens: float, now: float) -> None:
        """Count what a tenant asks for; where that is far too much, its queue becomes short."""
        if not share.account.parts:
            share.waits_since = now
        was_high = share.pressure.high
        share.pressure.count(now, tokens, self._rate_of(share), share.waits_since)
        if share.pressure.high and not was_high:
            self._shed(share)

    def _shed(self, share: Share[Place]) -> None:
        """Refuse a tenant's latest requests, until the others wait no longer than they may."""
        for waiting in reversed(list(share.account.waiting)):
            if self._expected_wait(share) <= self._patience(share):
                return
            if not waiting.item.granted:
                self.refusals["shed"] += 1
                error = Overloaded("far more is asked for than can be served", self._retry(share))
                self.refuse(waiting.item, error)

    def _check(self, share: Share[Place], completions: int, cost: float, left: float) -> None:
        """Raise Overloaded or ServerFull where a request may not wait."""
        queue, config, tokens = self._queue, self._config, completions * cost
        waits = queue.parts > 0 or not self._has_room(share, cost, completions)
        bounds: list[tuple[float, float, float, float]] = [
            (share.in_flight, completions, self.in_flight, config.max_in_flight)
        ]
        if queue.parts:
            waiting = share.account.tokens
            bounds.append((waiting, tokens, queue.tokens, config.max_queued_tokens))
        for own, more, total, most in bounds:
            free = most - total
            if more > free or (waits and own + more > _MOST_OF_FREE * free):
                if own >= total * self._shares.fraction(share):
                    self.refusals["share"] += 1
                    raise Overloaded(
                        "too many completions of this tenant are under way", self._retry(share)
                    )
                self.refusals["full"] += 1
                raise ServerFull("too many completions are under way", self._retry(share))
        wait = self._expected_wait(share, cost) if waits else 0.0
        if wait > min(left, self._patience(share)):
            self.refusals["wait"] += 1
            raise Overloaded("too many completions of this tenant are waiting", self._retry(share))

    def _has_room(self, share: Share[Place], cost: float, completions: int) -> bool:
        """Whether the engine can take so many completions more, of `cost` tokens each."""
        if not self.running and completions == 1:
            return True
        places = self.engine.most_running
        part = self._shares.fraction(share)
        spare = int(places / _SPARE + 0.5)  # round would make 0 of a half
        crowded = part < 1 and share.running >= places * part
        spare = -spare if crowded else max(1, spare)
        if self.running + completions > places + spare:
            return False
        cache = self._cache() * (1 + spare / places)
        return not cache or self._running_tokens + completions * cost <= cache

    def _cache(self) -> int:
        """Tokens whose keys and values the engine can hold at once; 0 while it has not said."""
        if not self._cache_tokens:
            stats = self.engine.stats()
            self._cache_tokens = stats.kv_blocks * stats.kv_block_size
        return self._cache_tokens

    def _patience(self, share: Share[Place]) -> float:
        """Seconds that a tenant's next request may be expected to wait.

        Where far too much is asked for, no longer than the engine itself takes to a first token.
        """
        longest, usual = _SURELY * self._config.max_queue_seconds, self.first_token.value
        return min(longest, usual) if share.pressure.high and usual is not None else longest

    def _expected_wait(self, share: Share[Place], cost: float = 0.0) -> float:
        """Seconds until all that waits of a tenant has a place, and `cost` tokens more.

        0 while the rate is unknown.
        """
        rate, own = self.rate, self._rate_of(share)
        if rate is None or own is None:
            return 0.0
        return min((share.account.tokens + cost) / own, (self._queue.tokens + cost) / rate)

    def _rate_of(self, share: Share[Place]) -> float | None:
        """Tokens a second that a tenant can count on."""
        return None if self.rate is None else self.rate * self._shares.fraction(share)

    def _retry(self, share: Share[Place]) -> int:
        """Seconds after which a refused request may come again."""
        return max(1, min(_LONGEST_RETRY, math.ceil(self._expected_wait(share))))
