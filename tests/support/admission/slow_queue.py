"""The slow twin of the fair queue: lists that are searched, in place of a heap."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class SlowRequest:
    """A request of a tenant: so many completions of it wait, of `cost` tokens each."""

    tenant: str
    number: int
    parts: int
    cost: float
    running: float = 0.0  # tokens of completions that were taken, by estimate


@dataclass
class SlowQueue:
    """Serves the tenant that has had the fewest tokens for its weight."""

    weights: dict[str, float]
    requests: list[SlowRequest] = field(default_factory=list)  # that wait, oldest first
    had: dict[str, float] = field(default_factory=dict)  # tokens of requests that are over
    running: dict[str, float] = field(default_factory=dict)  # tokens by estimate
    since: dict[str, int] = field(default_factory=dict)  # when a tenant began to wait
    floor: float = 0.0
    began: int = 0

    def used(self, tenant: str) -> float:
        """Tokens that are known, divided by the weight."""
        return self.had.get(tenant, 0.0) / self.weights[tenant]

    def level(self, tenant: str) -> float:
        """The same, with the estimates of what runs."""
        total = self.had.get(tenant, 0.0) + self.running.get(tenant, 0.0)
        return total / self.weights[tenant]

    def push(self, request: SlowRequest) -> None:
        """Append a request."""
        if all(other.tenant != request.tenant for other in self.requests):
            self.since[request.tenant] = self.began
            self.began += 1
            self._lift(request.tenant, self.floor)
        self.requests.append(request)

    def first(self) -> SlowRequest | None:
        """The request whose completion is next."""
        if not self.requests:
            return None
        tenants = {request.tenant for request in self.requests}
        tenant = min(tenants, key=lambda one: (self.level(one), self.since[one]))
        return next(request for request in self.requests if request.tenant == tenant)

    def take(self, request: SlowRequest) -> None:
        """Take a completion of the first request."""
        tenant = request.tenant
        self.floor = max(self.floor, self.used(tenant))
        request.running += request.cost
        self.running[tenant] = self.running.get(tenant, 0.0) + request.cost
        request.parts -= 1
        if not request.parts:
            self.requests.remove(request)

    def remove(self, request: SlowRequest) -> None:
        """Forget what waits of a request."""
        if request in self.requests:
            self.requests.remove(request)

    def settle(self, request: SlowRequest, tokens: float) -> None:
        """A request is over, and has had so many tokens."""
        tenant = request.tenant
        refund = (request.running - tokens) / self.weights[tenant]
        self.running[tenant] = self.running.get(tenant, 0.0) - request.running
        self.had[tenant] = self.had.get(tenant, 0.0) + tokens
        request.running = 0.0
        self._lift(tenant, self.floor - max(0.0, refund))

    def _lift(self, tenant: str, level: float) -> None:
        behind = max(0.0, level - self.level(tenant))
        self.had[tenant] = self.had.get(tenant, 0.0) + behind * self.weights[tenant]


class ForgetfulQueue(SlowQueue):
    """Wrong on purpose: a tenant that comes back has credit for the time that it was away."""

    def _lift(self, tenant: str, level: float) -> None:
        return
