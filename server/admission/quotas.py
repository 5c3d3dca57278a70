"""Tenants' quotas of requests, tokens and completions at once, as far as one server sees them.

Each server counts for itself: behind a balancer, a tenant may use up its quota on each of them.
Tokens are counted when a request ends, for only then are they known; a tenant whose tokens are used
up is refused until the minute is over.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import Storage
from limits.strategies import FixedWindowRateLimiter

from polyrex.server.errors import RateLimited
from polyrex.server.registry.tenants.directory import Directory

from .gate import Gate

_NEVER = 60
"""Seconds that a client is told to wait where no time is enough."""


class _Generated(Protocol):
    """A part of an answer, which says for how many tokens it stands, and whether it is the last."""

    @property
    def generated(self) -> int: ...
    @property
    def finish_reason(self) -> str | None: ...


_Part = TypeVar("_Part", bound=_Generated)


@dataclass
class Meter:
    """What one request has had, counted while it runs."""

    tokens: int = 0  # of prompts and completions
    generated: int = 0  # of completions alone
    finished: int = 0  # completions that have been read to their end

    async def count(
        self, pieces: AsyncGenerator[tuple[int, _Part], None]
    ) -> AsyncGenerator[tuple[int, _Part], None]:
        """Pass the pieces on, and count what was generated for them."""
        async with aclosing(pieces):
            async for index, piece in pieces:
                self.tokens += piece.generated
                self.generated += piece.generated
                self.finished += piece.finish_reason is not None
                yield index, piece


class TenantQuotas:
    """Holds tenants to their quotas; for the event loop alone."""

    def __init__(self, directory: Directory, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds, and never goes back."""
        self._directory = directory
        self._clock = clock
        self._used = FixedWindowRateLimiter(_Windows(clock))
        self._gates: dict[str, Gate] = {}

    @contextmanager
    def admit(self, tenant: str, completions: int) -> Iterator[Meter]:
        """Count a request, and its completions as under way while the context lasts.

        When it ends, the meter's tokens are counted. Raises RateLimited, Overloaded where too many
        completions are under way, InvalidRequest where there is never room for as many.
        """
        limits = self._minute_limits(tenant)
        for kind, limit in limits.items():
            if not self._used.test(limit, kind, tenant):
                wait = self._reset(kind, limit, tenant) if limit.amount else _NEVER
                raise RateLimited(
                    f"this minute's {limit.amount} {kind} of the tenant are used up",
                    max(1, wait),
                    self.headers(tenant),
                )
        with self._gate(tenant, completions):
            if "requests" in limits:
                self._used.hit(limits["requests"], "requests", tenant)
            meter = Meter()
            try:
                yield meter
            finally:
                if "tokens" in limits and meter.tokens:
                    self._used.hit(limits["tokens"], "tokens", tenant, cost=meter.tokens)

    def headers(self, tenant: str) -> dict[str, str]:
        """OpenAI's headers on what is left of this minute, for the quotas that the tenant has."""
        headers = {}
        for kind, limit in self._minute_limits(tenant).items():
            left = self._used.get_window_stats(limit, kind, tenant).remaining
            headers[f"x-ratelimit-limit-{kind}"] = str(limit.amount)
            headers[f"x-ratelimit-remaining-{kind}"] = str(left)
            headers[f"x-ratelimit-reset-{kind}"] = f"{self._reset(kind, limit, tenant)}s"
        return headers

    def _minute_limits(self, tenant: str) -> dict[str, RateLimitItem]:
        quotas = self._directory.tenant(tenant).quotas
        found = {"requests": quotas.requests_per_minute, "tokens": quotas.tokens_per_minute}
        return {kind: _Minute(amount) for kind, amount in found.items() if amount is not None}

    def _gate(self, tenant: str, completions: int) -> AbstractContextManager[None]:
        limit = self._directory.tenant(tenant).quotas.concurrent
        if limit is None:
            return nullcontext()
        gate = self._gates.setdefault(tenant, Gate(limit))
        gate.limit = limit  # it may have changed
        return gate.admit(completions)

    def _reset(self, kind: str, limit: RateLimitItem, tenant: str) -> int:
        """Seconds, rounded up, until the tenant's window ends."""
        end = self._used.get_window_stats(limit, kind, tenant).reset_time
        return max(0, math.ceil(end - self._clock()))


class _Minute(RateLimitItemPerMinute):
    """So many in a minute. Where a quota changes, what has been counted goes on counting."""

    def key_for(self, *identifiers: bytes | str | float) -> str:
        """The library's own key has the amount in it."""
        return "/".join(map(str, identifiers))


class _Windows(Storage):
    """Counters in memory, each for a window that begins when something is counted.

    The library's own follow the wall clock: where that is set back an hour, a minute's quota would
    be used up for an hour.
    """

    STORAGE_SCHEME = None
    base_exceptions = ValueError

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._counts: dict[str, tuple[float, int]] = {}  # the window's end, and the count

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        now = self._clock()
        end, count = self._counts.get(key, (now, 0))
        if end <= now:
            end, count = now + expiry, 0
        self._counts[key] = end, count + amount
        return count + amount

    def get(self, key: str) -> int:
        end, count = self._counts.get(key, (0.0, 0))
        return count if end > self._clock() else 0

    def get_expiry(self, key: str) -> float:
        now = self._clock()
        return max(now, self._counts.get(key, (now, 0))[0])

    def check(self) -> bool:
        return True

    def reset(self) -> int:
        count = len(self._counts)
        self._counts.clear()
        return count

    def clear(self, key: str) -> None:
        self._counts.pop(key, None)
