"""What each tenant's share of the engine is, and whether it asks for far more than that."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from .fair_queue import Account

T = TypeVar("T")

_LATELY = 10.0
"""Seconds after its last request during which a tenant's share is kept for it."""
_FIRST_GUESS = 128.0
"""Tokens that a completion is thought to have before any of its tenant has ended."""


class Mean:
    """An average in which later values count more."""

    def __init__(self, first: float | None, weight: float) -> None:
        """`weight`, up to 1, is that of a new value."""
        self.value = first
        self._weight = weight

    def add(self, value: float) -> None:
        """Count a value."""
        old = value if self.value is None else self.value
        self.value = old + self._weight * (value - old)


class DrainRate:
    """How fast the engine works, judged by the completions that ended last."""

    _KEPT = 1 - 1 / 64  # of what was known, with each completion that ends

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        """Count a completion of so many tokens, by estimate, that took so many seconds."""
        self._tokens = self._tokens * self._KEPT + tokens
        self._seconds = self._seconds * self._KEPT + seconds

    def of(self, running: int) -> float | None:
        """Tokens a second with so many completions running; None while nothing is known."""
        return running * self._tokens / self._seconds if self._seconds else None


class Pressure:
    """Whether a tenant asks, and goes on asking, for far more than its share.

    A burst is over soon, and may wait. Where requests keep coming faster than they can be served,
    waiting helps nobody: every later request would wait as long.
    """

    _SECONDS = 0.2  # in which requests are counted together
    _TIMES = 2.0  # its share is far more
    _STILL = 1.2  # times its share, once it was far more
    _REQUESTS = 4  # fewer say nothing

    def __init__(self) -> None:
        self.high = False
        self._period = 0
        self._requests = 0
        self._tokens = 0.0
        self._much_before = False

    def count(self, now: float, tokens: float, rate: float | None, waits_since: float) -> None:
        """Count a request for so many tokens, refused or not.

        `rate` is the tenant's share in tokens a second, None while unknown; something of it has
        waited without a break since `waits_since`. Times are in seconds.
        """
        period = int(now / self._SECONDS)
        if period != self._period:
            lasts = period == self._period + 1
            self.high = self.high and lasts and self._is_beyond(self._STILL, rate)
            self._much_before = lasts and self._is_beyond(self._TIMES, rate)
            self._period, self._requests, self._tokens = period, 0, 0.0
        self._requests += 1
        self._tokens += tokens
        much = self._much_before and self._is_beyond(self._TIMES, rate)
        if much and now - waits_since > 2 * self._SECONDS:
            self.high = True

    def _is_beyond(self, times: float, rate: float | None) -> bool:
        if rate is None or self._requests < self._REQUESTS:
            return False
        return self._tokens > times * rate * self._SECONDS


@dataclass(eq=False)
class Share(Generic[T]):
    """How a tenant stands."""

    account: Account[T] = field(default_factory=Account)
    weight: int = 1
    running: int = 0  # completions in the engine
    asked_at: float = 0.0  # times in seconds
    waits_since: float = 0.0
    pressure: Pressure = field(default_factory=Pressure)
    typical: Mean = field(default_factory=lambda: Mean(_FIRST_GUESS, 1 / 8))
    """Tokens of a completion."""

    @property
    def in_flight(self) -> int:
        """Completions that wait or run."""
        return self.account.parts + self.running

    def expected(self, max_tokens: int | None) -> float:
        """Tokens that a completion will probably have."""
        typical = self.typical.value or 1.0
        return typical if max_tokens is None else min(typical, max_tokens)


class Shares(Generic[T]):
    """All tenants that have come, and among them those that asked lately."""

    def __init__(self) -> None:
        self.all: dict[str, Share[T]] = {}
        self._lately: OrderedDict[str, Share[T]] = OrderedDict()
        self._weights = 0  # of those that asked lately

    def asks(self, tenant: str, weight: int, now: float) -> Share[T]:
        """The share of a tenant that asks for something now, and has this weight."""
        share = self.all.setdefault(tenant, Share())
        if tenant in self._lately:
            self._weights -= share.weight
        share.weight = share.account.weight = weight
        share.asked_at = now
        self._lately[tenant] = share
        self._lately.move_to_end(tenant)
        self._weights += weight
        self._forget(now)
        return share

    def fraction(self, share: Share[T]) -> float:
        """A tenant's part of the engine, among those that asked lately, it included."""
        return share.weight / max(self._weights, share.weight)

    def _forget(self, now: float) -> None:
        while self._lately:
            tenant, oldest = next(iter(self._lately.items()))
            if now - oldest.asked_at <= _LATELY:
                return
            if oldest.in_flight:  # that is as good as asking
                oldest.asked_at = now
                self._lately.move_to_end(tenant)
            else:
                del self._lately[tenant]
                self._weights -= oldest.weight
